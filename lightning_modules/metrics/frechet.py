"""Distance of two sets of features, each taken as a Gaussian."""

import torch
from torch import Tensor

from lightning_modules.metrics.generation import GenerationMetric


class FrechetDistance(GenerationMetric):
    """Frechet distance of drawn and real images: FID on any features (Heusel et al., 2017).

    With the means m and covariances C of the features (arXiv 1706.08500, equation 6),

        d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)).

    Only sums are kept, in float64, so neither batches nor processes matter. Logged as `fid`; the mean over the
    distances of each class as `cw_fid`. That one keeps K * D^2 numbers of each of the two sets, and as many to start
    again from: 134 MB for each class with the 2048 features of Inception. The distance depends on the number of
    images, the more so the more features there are: compare values of equal numbers only.

    Args:
        per_class: Take the distance of each class by itself and the mean over the classes.
    """

    higher_is_better = False
    least = 2

    real_sum: Tensor
    real_outer: Tensor
    drawn_sum: Tensor
    drawn_outer: Tensor

    def __init__(self, per_class: bool = False) -> None:
        super().__init__(per_class)
        self.name = "cw_fid" if per_class else "fid"

    def add_states(self) -> None:
        """Sums of the features and of their products, of each group that is compared."""
        groups, d = self.num_classes if self.per_class else 1, self.num_features
        for kind in ("real", "drawn"):
            self.add_state(f"{kind}_sum", torch.zeros(groups, d, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_outer", torch.zeros(groups, d, d, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, features: Tensor, labels: Tensor, probabilities: Tensor, real: bool, images: Tensor | None) -> None:
        """Add a batch to the sums of its groups."""
        total, outer = (self.real_sum, self.real_outer) if real else (self.drawn_sum, self.drawn_outer)
        features = features.double()
        # Group by group: all products at once would be B * D^2 numbers.
        for group in torch.unique(labels).tolist() if self.per_class else [0]:
            own = features[labels == group] if self.per_class else features
            total[group] += own.sum(0)
            outer[group] += own.mT @ own

    def compute(self) -> Tensor:
        """Squared distance of all images seen, or its mean over the classes.

        Returns:
            Float64 scalar, at least 0.

        Raises:
            ValueError: A group has fewer than two images.
        """
        self.require_images(self.real_count, self.drawn_count)
        values = []
        for group in range(len(self.real_sum)):
            pick = [group] if self.per_class else slice(None)
            real = moments(self.real_sum[group], self.real_outer[group], int(self.real_count[pick].sum()))
            drawn = moments(self.drawn_sum[group], self.drawn_outer[group], int(self.drawn_count[pick].sum()))
            values.append(gaussian_distance(*real, *drawn))
        return torch.stack(values).mean()


def moments(total: Tensor, outer: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and unbiased covariance [D, D] from sums of `count` vectors and of their outer products."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def gaussian_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    """Squared Frechet distance of two Gaussians (Dowson & Landau, 1982).

    Args:
        mean_1: [D] float64.
        cov_1: [D, D], symmetric, no eigenvalue below 0 but for rounding.
        mean_2: As `mean_1`.
        cov_2: As `cov_1`.

    Returns:
        Scalar, at least 0.
    """
    # C_1 C_2 has the eigenvalues of the symmetric R C_2 R with R = C_1^(1/2). Solvers for symmetric matrices are
    # several times as fast as the general one that torchmetrics asks, and cannot return complex numbers.
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    distance: Tensor = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return torch.clamp(distance, min=0)
