"""What a classifier says of drawn images."""

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.metrics.generation import GenerationMetric


class ClassifierScore(GenerationMetric):
    """Inception score with any classifier: exp E KL(p(y | x) || p(y)) (Salimans et al., 2016, arXiv 1606.03498).

    From 1, where all drawn images look alike to the classifier, to the number of its classes. Logged as `is`, and with
    several splits also the standard deviation over them, as `is_std`. Real images do not count.

    Args:
        splits: Parts that the images are divided into at random, the score being the mean over parts; 10 in the paper.

    Raises:
        ValueError: `splits` is below 1.
    """

    name = "is"

    drawn: list[Tensor]

    def __init__(self, splits: int = 1) -> None:
        super().__init__()
        if splits < 1:
            msg = f"Expected `splits` to be at least 1, got {splits}; the paper takes 10 for 50,000 images."
            raise ValueError(msg)
        self.splits = splits

    def add_states(self) -> None:
        """A list of probabilities: parts are drawn from all images."""
        self.add_state("drawn", [], dist_reduce_fx="cat")

    def add(self, features: Tensor, labels: Tensor, probabilities: Tensor, real: bool, images: Tensor | None) -> None:
        """Append a batch of drawn images."""
        if not real:
            self.drawn.append(probabilities.float())

    def require_images(self, real: Tensor, drawn: Tensor) -> None:
        """Refuse fewer drawn images than parts.

        Raises:
            ValueError: There are fewer.
        """
        if int(drawn.sum()) < self.splits:
            msg = (
                f"Expected at least {self.splits} drawn images for as many `splits`, got {int(drawn.sum())}; draw more."
            )
            raise ValueError(msg)

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Score of the drawn images seen.

        Returns:
            Float64 scalar; with several splits mean and standard deviation by name.

        Raises:
            ValueError: There are fewer images than splits.
        """
        self.require_images(self.real_count, self.drawn_count)
        p = dim_zero_cat(self.drawn).double()
        # In the order they were drawn in, images of one class may stand together.
        order = torch.randperm(len(p), generator=torch.Generator().manual_seed(0)).to(p.device)
        scores = torch.stack([_score(part) for part in p[order].tensor_split(self.splits)])
        if self.splits == 1:
            return scores[0]
        return {self.name: scores.mean(), f"{self.name}_std": scores.std()}


def _score(p: Tensor) -> Tensor:
    """Exponential of the mean divergence of each row of p [N, K] from their mean; 0 log 0 = 0."""
    divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))
    return torch.exp(divergence.sum(1).mean())


class LabelConsistency(GenerationMetric):
    """Share of drawn images in which a classifier sees the class that was asked for.

    The classifier should have learned from clean labels, and what it gets wrong of real images it gets wrong here.
    Logged as `label_consistency`, beside `label_consistency_real`: the share of the real images in which it sees their
    class, which is what to expect of perfect images.
    """

    name = "label_consistency"

    real_right: Tensor
    drawn_right: Tensor

    def add_states(self) -> None:
        """Two numbers of images."""
        for name in ("real_right", "drawn_right"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def add(self, features: Tensor, labels: Tensor, probabilities: Tensor, real: bool, images: Tensor | None) -> None:
        """Count a batch."""
        if probabilities.shape[1] != self.num_classes:
            msg = (
                f"Expected `probabilities` of the {self.num_classes} classes of the data for `{self.name}`, got "
                f"{probabilities.shape[1]}; take an extractor that was trained on these classes (ClassifierFeatures)."
            )
            raise ValueError(msg)
        right = (probabilities.argmax(1) == labels).sum()
        if real:
            self.real_right += right
        else:
            self.drawn_right += right

    def require_images(self, real: Tensor, drawn: Tensor) -> None:
        """Refuse to judge no image.

        Raises:
            ValueError: None was drawn.
        """
        if not int(drawn.sum()):
            msg = f"Expected drawn images for `{self.name}`, got none; call update(real=False)."
            raise ValueError(msg)

    def compute(self) -> dict[str, Tensor]:
        """Shares of the drawn and of the real images seen.

        Returns:
            Scalars in [0, 1] by name; that of real images is NaN where there are none.

        Raises:
            ValueError: No image was drawn.
        """
        self.require_images(self.real_count, self.drawn_count)
        drawn, real = self.drawn_right / self.drawn_count.sum(), self.real_right / self.real_count.sum()
        return {self.name: drawn, f"{self.name}_real": real}
