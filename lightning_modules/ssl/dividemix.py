"""DivideMix: learning with noisy labels as semi-supervised learning (Li, Socher & Hoi, arXiv 2002.07394)."""

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from lightning_modules.networks.modes import evaluating
from lightning_modules.ssl.base import Batch, Host, Loss, Method, Views
from lightning_modules.ssl.companions import agreed, with_classes
from lightning_modules.ssl.parts import (
    beta_samples,
    class_divergence,
    cross_entropy,
    entropy,
    mix,
    sharpen,
    soft_cross_entropy,
    squared_error,
)
from lightning_modules.ssl.ramps import Ramp


def clean_probability(losses: Tensor) -> Tensor:
    """How likely each label is right: the share of the component of small losses in a mixture of two Gaussians.

    Args:
        losses: One an image [N], in [0, 1].

    Returns:
        w [N] in [0, 1]; ones where the losses do not differ, as nothing then speaks against any label.
    """
    if len(losses) < 2 or float(losses.max() - losses.min()) < 1e-6:
        return torch.ones_like(losses)
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0)
    values = losses.double().cpu().numpy()[:, None]
    with warnings.catch_warnings():
        # Ten iterations are the method's choice, whether or not they converge.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(values)
    share = mixture.predict_proba(values)[:, int(mixture.means_[:, 0].argmin())]
    return torch.from_numpy(share).to(losses)


def divide(w: Tensor, label: Tensor, threshold: float, floor: int) -> Tensor:
    """Which images keep their labels: those with w above the threshold, and of each class at least a few.

    Args:
        w: Probability [N] that the label is right.
        label: Given labels [N].
        threshold: In [0, 1].
        floor: How many images of each class are kept at least, those with the largest w.

    Returns:
        Booleans [N].
    """
    clean = w > threshold
    for number in torch.bincount(label).nonzero()[:, 0]:
        members = (label == number).nonzero()[:, 0]
        best = w[members].sort(descending=True, stable=True).indices[:floor]
        clean[members[best]] = True
    return clean


class Ensemble(nn.Module):
    """Two networks as one whose logits are the sum of theirs.

    Args:
        first: Image -> logits.
        second: Image -> logits.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second
        # Being asked for must not change the mode that the networks are in.
        self.training = first.training

    def forward(self, image: Tensor) -> Tensor:
        """Return the sum of the logits [B, K]."""
        total: Tensor = self.first(image) + self.second(image)
        return total


class DivideMix(Method):
    """Two networks tell each other which labels to trust; what is not trusted is relabelled and mixed in.

    Both networks learn all labels for some epochs. Then, before each epoch, a mixture of two Gaussians is fitted to
    each network's losses of all images; w, the share of the lower one, is how likely a label is right. Each network
    trains on the division that the other made (co-divide): where w > 0.5 the target is w y + (1 - w) times its own
    guess (co-refine), elsewhere the guess of both networks (co-guess), all averaged over two views and sharpened. All
    images are mixed with each other by one lambda ~ Beta(alpha, alpha), folded to >= 1/2. L = Lx + mu Lu + Lreg
    (equation 12): cross-entropy, squared error and the divergence of the mean prediction from the uniform one.
    Predictions are the sum of both networks' logits; no moving average.

    Reference settings (CIFAR-10, PreActResNet18): batches of 64, SGD 0.02 divided by 10 after 150 of 300 epochs, weight
    decay 5e-4; mu 0, 25, 50 or 150 by the amount of noise. `warmup_epochs` 10 (CIFAR-100: 30).

    What deviates: a batch is divided after it is drawn, instead of drawing from two loaders, so its clean and noisy
    parts vary in size, and each loss is its part's sum over the size of the whole batch. Networks guess in evaluation
    mode and before either has learnt the batch. The networks alternate batch by batch, not epoch by epoch. Of each
    class `min_clean` images are always taken as clean, as a split can be empty otherwise. With batches well below 64
    or rates above 0.02 a weight of 25 can collapse to one class; lower mu or the rate then.

    Args:
        warmup_epochs: Epochs of plain cross-entropy.
        ramp_epochs: Epochs after these in which mu grows linearly to what the ramp says; 0 is no ramp.
        threshold: w above which a label counts as clean, in [0, 1].
        temperature: T of the sharpened targets, >= 0.
        alpha: Of the Beta distribution, > 0.
        memory: Epochs whose losses are averaged before they are divided; the paper takes 5 for 90 % noise.
        min_clean: Images of each class that count as clean at least.
        confidence_penalty: Subtract the entropy from the warm-up's loss; the paper does for asymmetric noise.
        second: The second network; None makes one like the first, with weights of its own.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak", "weak"), unlabeled=())
    batch_norm = "joint"
    ramp = Ramp(25.0)

    w: Tensor
    clean: Tensor
    history: Tensor
    num_sweeps: Tensor
    clean_share: Tensor

    def __init__(
        self,
        warmup_epochs: int = 10,
        ramp_epochs: int = 16,
        threshold: float = 0.5,
        temperature: float = 0.5,
        alpha: float = 4.0,
        memory: int = 1,
        min_clean: int = 1,
        confidence_penalty: bool = False,
        second: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if min(warmup_epochs, ramp_epochs, min_clean) < 0 or memory < 1:
            msg = (
                "Expected `warmup_epochs`, `ramp_epochs`, `min_clean` >= 0 and `memory` >= 1, got "
                f"{warmup_epochs}, {ramp_epochs}, {min_clean} and {memory}."
            )
            raise ValueError(msg)
        if not 0 <= threshold <= 1 or temperature < 0 or alpha <= 0:
            msg = (
                "Expected `threshold` in [0, 1], `temperature` >= 0 and `alpha` > 0, got "
                f"{threshold}, {temperature} and {alpha}."
            )
            raise ValueError(msg)
        self.warmup_epochs = warmup_epochs
        self.ramp_epochs = ramp_epochs
        self.threshold = threshold
        self.temperature = temperature
        self.alpha = alpha
        self.memory = memory
        self.min_clean = min_clean
        self.confidence_penalty = confidence_penalty
        self.second = second

    def setup(self, m: Host) -> None:
        """Build the second network, and make room for the losses and divisions of both."""
        self.second = m.new_network() if self.second is None else with_classes(self.second, m.num_classes)
        # Row 0 is what the first network found, which the second learns from; row 1 the other way round.
        self.register_buffer("w", torch.ones(2, m.num_labeled))
        self.register_buffer("clean", torch.ones(2, m.num_labeled, dtype=torch.bool))
        self.register_buffer("history", torch.zeros(2, self.memory, m.num_labeled))
        self.register_buffer("num_sweeps", torch.zeros((), dtype=torch.long))
        self.register_buffer("clean_share", torch.ones(m.num_classes))

    def networks(self, m: Host) -> tuple[nn.Module, nn.Module]:
        """The two networks.

        Args:
            m: The module.

        Raises:
            RuntimeError: The method is not set up.
        """
        if self.second is None:
            msg = "Expected DivideMix to be set up by its module before it is used."
            raise RuntimeError(msg)
        return m.network, self.second

    def players(self, m: Host) -> dict[str, nn.Module]:
        """Both networks."""
        return dict(zip("ab", self.networks(m), strict=True))

    def predictor(self, m: Host) -> nn.Module:
        """The sum of both networks' logits."""
        return Ensemble(*self.networks(m))

    def epoch_start(self, m: Host) -> None:
        """Each network divides the data."""
        if m.current_epoch < self.warmup_epochs:
            return
        a, b = self.networks(m)
        label = m.labels_of("labeled")
        with evaluating(a, b):
            logits = m.sweep(lambda image: torch.stack([a(image), b(image)], dim=1), "labeled").float()
        losses = -logits.log_softmax(-1).gather(2, label[:, None, None].expand(-1, 2, -1))[..., 0].T
        low, high = losses.amin(1, keepdim=True), losses.amax(1, keepdim=True)
        self.history[:, int(self.num_sweeps) % self.memory] = (losses - low) / (high - low).clamp_min(1e-12)
        self.num_sweeps += 1
        remembered = self.history[:, : min(int(self.num_sweeps), self.memory)].mean(1)
        self.w.copy_(agreed(m, torch.stack([clean_probability(row) for row in remembered])))
        for row in range(2):
            self.clean[row] = divide(self.w[row], label, self.threshold, self.min_clean)
        kept = torch.zeros_like(self.clean_share).index_add_(0, label, self.clean.float().mean(0))
        self.clean_share.copy_(kept / torch.bincount(label, minlength=m.num_classes).clamp_min(1))

    def turns(self, m: Host, labeled: Batch, unlabeled: Batch) -> Iterator[tuple[str, Loss]]:
        """Each network learns the batch."""
        networks = self.networks(m)
        if m.current_epoch < self.warmup_epochs:
            for name, network in zip("ab", networks, strict=True):
                yield name, self._warmup_loss(network, labeled)
            return
        guesses = self.guesses(m, labeled)
        for number, (name, network) in enumerate(zip("ab", networks, strict=True)):
            yield name, self.player_loss(m, network, number, labeled, guesses)

    def _warmup_loss(self, network: nn.Module, labeled: Batch) -> Loss:
        logits = network(labeled["image"])
        loss = Loss(sup=cross_entropy(logits, labeled["label"]))
        if self.confidence_penalty:
            loss.aux = -entropy(logits.float()).mean()
        return loss

    @torch.no_grad()
    def guesses(self, m: Host, labeled: Batch) -> Tensor:
        """What each network takes the images for: the mean of its probabilities over the two views [2, B, K].

        Args:
            m: The module.
            labeled: The batch.
        """
        networks = self.networks(m)
        views = labeled["image"], labeled["weak_2"]
        with evaluating(*networks):
            each = [torch.stack([network(view).float().softmax(-1) for view in views]).mean(0) for network in networks]
        return torch.stack(each)

    def targets(self, number: int, labeled: Batch, guesses: Tensor) -> tuple[Tensor, Tensor]:
        """What a network learns.

        Args:
            number: Which network, 0 or 1.
            labeled: The batch.
            guesses: Of both networks [2, B, K].

        Returns:
            Targets [B, K], and which of them rest on a label that is trusted [B].
        """
        index = labeled["index"]
        w, clean = self.w[1 - number, index][:, None], self.clean[1 - number, index]
        given = F.one_hot(labeled["label"], guesses.shape[-1]).to(guesses)
        refined = w * given + (1 - w) * guesses[number]
        return sharpen(torch.where(clean[:, None], refined, guesses.mean(0)), self.temperature), clean

    def player_loss(self, m: Host, network: nn.Module, number: int, labeled: Batch, guesses: Tensor) -> Loss:
        """The loss of one network.

        Args:
            m: The module.
            network: The network.
            number: Which one, 0 or 1.
            labeled: The batch.
            guesses: Of both networks [2, B, K].
        """
        target, clean = self.targets(number, labeled, guesses)
        image, target, clean = torch.cat([labeled["image"], labeled["weak_2"]]), target.repeat(2, 1), clean.repeat(2)
        order = torch.randperm(len(image), device=image.device)
        lam = beta_samples(self.alpha, 1, target)
        logits = network(mix(image, image[order], lam.to(image))).float()
        mixed = mix(target, target[order], lam)
        trusted, other = clean.float(), 1 - clean.float()
        # Over the whole batch: as a mean of its part, one image that is alone in it would weigh as much as all others.
        lx = (trusted * soft_cross_entropy(logits, mixed)).mean()
        lu = (other * squared_error(logits.softmax(-1), mixed)).mean()
        return Loss(
            sup=lx,
            unsup=self.growth(m) * lu,
            aux=class_divergence(logits),
            logs={f"trusted_{'ab'[number]}": trusted.mean()},
        )

    def growth(self, m: Host) -> float:
        """Share of mu that counts by now: linear over `ramp_epochs` from the end of the warm-up.

        Args:
            m: The module.
        """
        done = m.batch_number / m.batches_per_epoch - self.warmup_epochs
        return min(1.0, max(0.0, done / self.ramp_epochs)) if self.ramp_epochs else 1.0

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Not used: the networks take `turns`."""
        return super().loss(m, labeled, unlabeled)

    def per_class(self) -> dict[str, Tensor]:
        """Share of the images with each given label that is trusted."""
        return {"trusted": self.clean_share}
