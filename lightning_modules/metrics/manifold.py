"""How much of two sets of features lies in each other's neighbourhood."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.metrics.generation import KeepingMetric

_NAMES = ("precision", "recall", "density", "coverage")


class ManifoldMetrics(KeepingMetric):
    """Precision and recall (Kynkaanniemi et al., 2019), density and coverage (Naeem et al., 2020).

    Around each image lies a ball that reaches to its k-th nearest other image of the same set. With real images X_i,
    their balls B(X_i), and drawn images Y_j (arXiv 1904.06991, equations 1 and 2; arXiv 2002.09797, equations 3 and 4)

    - precision: share of Y_j that lie in any B(X_i); recall: share of X_i in any B(Y_j),
    - density: number of B(X_i) that Y_j lies in, over k, mean over j; may be above 1,
    - coverage: share of B(X_i) with any Y_j inside.

    Balls are closed. Logged as `precision_k3` and so on for k = 3, since values of different k do not compare; the
    means over classes as `cw_precision_k3`. All features are kept; their distances are not, however many there are.

    Args:
        k: Number of the neighbour that the balls reach to: 3 in the first paper, 5 in the second.
        per_class: Compare the images of each class by themselves and take the mean over the classes.
        chunk_size: Rows of distances held at once; changes memory, not results.

    Raises:
        ValueError: `k` or `chunk_size` is below 1.
    """

    def __init__(self, k: int = 3, per_class: bool = False, chunk_size: int = 1024) -> None:
        super().__init__(per_class)
        for name, value in (("k", k), ("chunk_size", chunk_size)):
            if value < 1:
                msg = f"Expected `{name}` to be at least 1, got {value}; the papers take k = 3 and k = 5."
                raise ValueError(msg)
        self.k = k
        self.chunk_size = chunk_size
        self.least = k + 1
        self.name = f"{'cw_' if per_class else ''}prdc_k{k}"

    def compute(self) -> dict[str, Tensor]:
        """The four numbers over all images seen, or their means over the classes.

        Returns:
            Scalars by name.

        Raises:
            ValueError: There are not more than k real or drawn images.
        """
        self.require_images(self.real_count, self.drawn_count)
        real, drawn = dim_zero_cat(self.real_features), dim_zero_cat(self.drawn_features)
        if not self.per_class:
            values = prdc(real, drawn, self.k, self.chunk_size)
        else:
            of_real, of_drawn = dim_zero_cat(self.real_labels), dim_zero_cat(self.drawn_labels)
            classes = [
                prdc(real[of_real == c], drawn[of_drawn == c], self.k, self.chunk_size) for c in range(self.num_classes)
            ]
            values = torch.stack(classes).mean(0)
        prefix = "cw_" if self.per_class else ""
        return {f"{prefix}{name}_k{self.k}": value for name, value in zip(_NAMES, values, strict=True)}


def prdc(real: Tensor, drawn: Tensor, k: int, chunk_size: int = 1024) -> Tensor:
    """Precision, recall, density and coverage; see `ManifoldMetrics`.

    Args:
        real: [N, D], N > k.
        drawn: [M, D], M > k.
        k: Number of the neighbour that a ball reaches to.
        chunk_size: Rows of distances held at once.

    Returns:
        [4] float64.
    """
    # Squared distances as |x|^2 + |y|^2 - 2 x y: in float64 and around the mean, where nothing cancels that matters.
    center = real.double().mean(0)
    real, drawn = real.double() - center, drawn.double() - center
    reach_real, reach_drawn = (_reach(own, k, chunk_size) for own in (real, drawn))
    nearest = torch.full_like(reach_real, torch.inf)
    recalled = torch.zeros_like(reach_real, dtype=torch.bool)
    precise, inside = 0, 0
    for rows, squared in _squared_distances(drawn, real, chunk_size):
        within = squared <= reach_real
        precise += int(within.any(1).sum())
        inside += int(within.sum())
        nearest = torch.minimum(nearest, squared.amin(0))
        recalled |= (squared <= reach_drawn[rows, None]).any(0)
    m = len(drawn)
    coverage = (nearest <= reach_real).double().mean().item()
    values = (precise / m, recalled.double().mean().item(), inside / (k * m), coverage)
    return torch.tensor(values, dtype=torch.float64, device=real.device)


def _reach(features: Tensor, k: int, chunk_size: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row."""
    found = []
    for rows, squared in _squared_distances(features, features, chunk_size):
        itself = torch.arange(rows.start, rows.stop, device=features.device)
        squared[itself - rows.start, itself] = torch.inf
        found.append(squared.kthvalue(k, 1).values)
    return torch.cat(found)


def _squared_distances(a: Tensor, b: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the table of squared distances, [chunk_size, len(b)] at a time."""
    norms = b.square().sum(1)
    for start in range(0, len(a), chunk_size):
        rows = slice(start, min(start + chunk_size, len(a)))
        part = a[rows]
        yield rows, (part.square().sum(1)[:, None] + norms - 2 * part @ b.mT).clamp_(min=0)
