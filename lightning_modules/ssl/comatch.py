"""CoMatch: pseudo-labels smoothed by a memory of embeddings, embeddings made alike where pseudo-labels are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.ssl.alignment import Alignment
from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Views
from lightning_modules.ssl.parts import cross_entropy, embedding_network, soft_cross_entropy
from lightning_modules.ssl.projector import Projector
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import at_least_zero, require_above_zero


class CoMatch(Method):
    """Lu = mean 1[max q >= tau] H(q, p(s(u))) + lambda_c Lc, q = alpha p(w(u)) + (1 - alpha) (average of neighbours).

    Li et al., "CoMatch", arXiv 2011.11183, section 3. p is aligned to uniform by the last 32 batches. The neighbours of
    an image are the entries of a queue of embeddings z and probabilities of weak views (one-hot for labelled ones),
    weighted by softmax(z z' / T). Lc is the cross-entropy
    between the graph Q of pseudo-labels, q_i q_j with ones on the diagonal, nothing below `graph_threshold`, rows
    summing to 1, and the graph of embeddings, softmax(z(s(u_i)) z(s'(u_j)) / T).

    Reference settings, CIFAR-10: tau 0.95, alpha 0.9, T 0.2, embeddings of 64 numbers, graph threshold 0.8, lambda_c
    1, a queue of 5 batches (2560 images of 64 + 448 a batch), 7 unlabelled images for a labelled one.

    Deviations: the queue is counted in images, as batches may have any size, and smoothing begins when it is full.
    One forward of all views as in the CIFAR code; the ImageNet code has a momentum encoder.

    Buffers: queue_embeddings [queue, size], queue_probabilities [queue, K], filled [], images ever written.

    Args:
        threshold: tau >= 0.
        alpha: Share of an image's own prediction in its pseudo-label, in [0, 1]; 1 is no smoothing.
        temperature: T > 0.
        graph_threshold: Edges of the graph of pseudo-labels are at least as heavy; above 1 only the diagonal is left.
        contrast: lambda_c >= 0.
        size: Numbers of an embedding.
        queue: Images in the queue, positive.
        align_queue: Batches that the alignment averages over, >= 0; 0 takes a moving average.

    Raises:
        ValueError: An argument is out of range.
        TypeError: The network does not embed.
    """

    views = Views(labeled=("weak",), unlabeled=("weak", "strong", "strong"))
    batch_norm = "joint"
    ramp = Ramp(weight=1.0)
    queue_embeddings: Tensor
    queue_probabilities: Tensor
    filled: Tensor

    def __init__(
        self,
        threshold: float = 0.95,
        alpha: float = 0.9,
        temperature: float = 0.2,
        graph_threshold: float = 0.8,
        contrast: float = 1.0,
        size: int = 64,
        queue: int = 2560,
        align_queue: int = 32,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            msg = f"Expected `alpha` in [0, 1], got {alpha}; 1 does not smooth."
            raise ValueError(msg)
        require_above_zero(temperature=temperature, size=size, queue=queue)
        self.threshold = at_least_zero("threshold", threshold)
        self.graph_threshold = at_least_zero("graph_threshold", graph_threshold)
        self.contrast = at_least_zero("contrast", contrast)
        self.alpha = alpha
        self.temperature = temperature
        self.size = size
        self.queue = queue
        self.alignment = Alignment("uniform", align_queue)

    def setup(self, m: Host) -> None:
        """Build projector and queue."""
        self.projector = Projector(embedding_network(m.network, "CoMatch").num_features, self.size)
        self.register_buffer("queue_embeddings", torch.zeros(self.queue, self.size))
        self.register_buffer("queue_probabilities", torch.zeros(self.queue, m.num_classes))
        self.register_buffer("filled", torch.tensor(0))
        self.alignment.setup(m)

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu (Lu + lambda_c Lc) of a batch, in one forward."""
        network = embedding_network(m.network, "CoMatch")
        views = [labeled["image"], unlabeled["weak"], unlabeled["strong"], unlabeled["strong_2"]]
        features = network.embed(torch.cat(views))
        sizes = [len(view) for view in views]
        x, weak, strong, _ = torch.split(network.classify(features).float(), sizes)
        zx, zw, z0, z1 = torch.split(self.projector(features), sizes)
        with torch.no_grad():
            aligned = self.alignment(m, weak.softmax(-1), x.softmax(-1))
            q = self.smoothed(aligned, zw)
            confidence, label = q.max(-1)
            weight = (confidence >= self.threshold).float()
            onehot = F.one_hot(labeled["label"], m.num_classes).to(aligned)
            self.remember(*m.gather(torch.cat([zw, zx]), torch.cat([aligned, onehot])))
        fit = (weight * soft_cross_entropy(strong, q)).mean()
        contrast = soft_cross_entropy(z0 @ z1.T / self.temperature, self.graph(q)).mean()
        return Loss(
            sup=cross_entropy(x, labeled["label"]),
            unsup=fit + self.contrast * contrast,
            logs={"contrast": contrast},
            guess=Guess(label, confidence, weight),
        )

    def smoothed(self, probabilities: Tensor, embedding: Tensor) -> Tensor:
        """Return alpha p + (1 - alpha) of the neighbours' probabilities; p until the queue is full.

        Args:
            probabilities: p [B, K].
            embedding: Unit vectors [B, size].

        Returns:
            [B, K], each row summing to 1.
        """
        nearness = (embedding @ self.queue_embeddings.T / self.temperature).softmax(-1)
        alpha = torch.where(self.filled >= self.queue, self.alpha, 1.0)
        return alpha * probabilities + (1 - alpha) * (nearness @ self.queue_probabilities)

    def remember(self, embedding: Tensor, probabilities: Tensor) -> None:
        """Write images into the queue in place of the oldest; of more than it holds, the last ones.

        Args:
            embedding: Unit vectors [n, size].
            probabilities: [n, K].
        """
        n = len(embedding)
        kept = min(n, self.queue)
        self.filled += n
        place = (self.filled - kept + torch.arange(kept, device=embedding.device)) % self.queue
        self.queue_embeddings[place] = embedding[n - kept :]
        self.queue_probabilities[place] = probabilities[n - kept :]

    def graph(self, q: Tensor) -> Tensor:
        """The graph Q [B, B] of pseudo-labels [B, K]; its rows sum to 1."""
        edges = (q @ q.T).fill_diagonal_(1)
        edges = torch.where(edges >= self.graph_threshold, edges, 0.0).fill_diagonal_(1)
        return edges / edges.sum(-1, keepdim=True)
