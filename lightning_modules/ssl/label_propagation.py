"""Label Propagation: pseudo-labels from a graph of the images' features (Iscen et al., arXiv 1904.04717)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.networks.modes import evaluating
from lightning_modules.ssl.base import Batch, Guess, Host, Loss, Method, Views
from lightning_modules.ssl.companions import agreed
from lightning_modules.ssl.graph import certainty, neighbor_graph, normalized, propagate
from lightning_modules.ssl.parts import cross_entropy, embedding_network, joint
from lightning_modules.ssl.ramps import Ramp


class LabelPropagation(Method):
    """Before each epoch, labels spread over the graph of nearest neighbours; the network learns them, weighted.

    L = mean of zeta_y H(y, p(x)) + mu * mean of omega_j zeta_y' H(y'_j, p(u_j)), with the propagated
    label y'_j, its certainty omega_j and class weights zeta_c = (N / K) / |class c|. The first epochs
    train on the labelled images alone (stage 1 of the paper, here in the same fit; 0 if the network comes trained).

    Reference settings (CIFAR-10): 180 epochs of stage 1, then 180 more; half of each batch of 100 labelled; SGD 0.05,
    weight decay 2e-4, cosine. Features here are those of the moving average, which is also what is evaluated; where
    there is no average they are the network's, as in the paper.

    Args:
        warmup_epochs: Epochs on the labelled images alone; an `epoch` is one of the fit.
        neighbors: Neighbours k of an image in the graph.
        exponent: gamma, to which similarities are raised.
        alpha: How far labels spread, in [0, 1).
        iterations: Steps of the solver for each class.
        max_class_weight: Limit of zeta. Without it a class that won no unlabelled image would weigh its few labelled
            ones hundreds of times.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak",), index=True)
    batch_norm = "joint"
    ramp = Ramp(1.0)

    label: Tensor
    omega: Tensor
    zeta: Tensor

    def __init__(
        self,
        warmup_epochs: int = 10,
        neighbors: int = 50,
        exponent: float = 3.0,
        alpha: float = 0.99,
        iterations: int = 20,
        max_class_weight: float = 10.0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha < 1:
            msg = f"Expected `alpha` in [0, 1), got {alpha}; the paper takes 0.99."
            raise ValueError(msg)
        if warmup_epochs < 0 or neighbors < 1 or iterations < 1 or max_class_weight <= 0:
            msg = (
                "Expected `warmup_epochs` >= 0, `neighbors` >= 1, `iterations` >= 1 and `max_class_weight` > 0, got "
                f"{warmup_epochs}, {neighbors}, {iterations} and {max_class_weight}."
            )
            raise ValueError(msg)
        self.warmup_epochs = warmup_epochs
        self.neighbors = neighbors
        self.exponent = exponent
        self.alpha = alpha
        self.iterations = iterations
        self.max_class_weight = max_class_weight

    def setup(self, m: Host) -> None:
        """Make room for a label and a weight of each unlabelled image.

        Raises:
            TypeError: The network does not embed.
        """
        embedding_network(m.network, type(self).__name__)
        self.register_buffer("label", torch.zeros(m.num_unlabeled, dtype=torch.long))
        self.register_buffer("omega", torch.zeros(m.num_unlabeled))
        self.register_buffer("zeta", torch.ones(m.num_classes))

    def epoch_start(self, m: Host) -> None:
        """Build the graph and propagate."""
        if m.current_epoch < self.warmup_epochs:
            return
        network = embedding_network(m.ema_network, type(self).__name__)
        given = m.labels_of("unlabeled")
        # A labelled image that is also an unlabelled one must be one node, or it would be its own nearest neighbour.
        rest = given < 0
        with evaluating(m.ema_network):
            found = [m.sweep(network.embed, "labeled"), m.sweep(network.embed, "unlabeled")[rest]]
        features = F.normalize(torch.cat(found).float(), dim=1)
        known = torch.cat([m.labels_of("labeled"), given[rest]])
        graph = normalized(neighbor_graph(features, self.neighbors, self.exponent))
        z = propagate(graph, known.cpu().numpy(), m.num_classes, self.alpha, self.iterations)
        label = torch.where(known >= 0, known, torch.from_numpy(z.argmax(axis=1)).to(known))
        omega = torch.from_numpy(certainty(z)).to(self.omega)
        unlabelled = slice(len(known) - int(rest.sum()), None)
        self.label.copy_(agreed(m, given.masked_scatter(rest, label[unlabelled])))
        self.omega.copy_(agreed(m, torch.ones_like(self.omega).masked_scatter(rest, omega[unlabelled])))
        size = agreed(m, torch.bincount(label, minlength=m.num_classes)).clamp_min(1)
        self.zeta.copy_((len(known) / m.num_classes / size).clamp_max(self.max_class_weight))

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Return cross-entropy with given labels, and weighted cross-entropy with propagated ones."""
        if m.current_epoch < self.warmup_epochs:
            return Loss(sup=cross_entropy(m.network(labeled["image"]), labeled["label"]))
        x, u = joint(m.network, labeled["image"], unlabeled["weak"])
        sup = self.zeta[labeled["label"]] * F.cross_entropy(x.float(), labeled["label"], reduction="none")
        label, omega = self.label[unlabeled["index"]], self.omega[unlabeled["index"]]
        weight = omega * self.zeta[label]
        unsup = weight * F.cross_entropy(u.float(), label, reduction="none")
        return Loss(sup=sup.mean(), unsup=unsup.mean(), guess=Guess(label, omega, weight))

    def per_class(self) -> dict[str, Tensor]:
        """Class weights zeta."""
        return {"class_weight": self.zeta}
