"""What a semi-supervised method needs of the data, and whether a batch has it."""

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_modules.ssl.base import Method, Split, view_keys


@runtime_checkable
class FeedsMethods(Protocol):
    """A datamodule that can give methods what they ask for (SemiSupervisedDataModule)."""

    num_labeled: int
    num_unlabeled: int

    def declare_views(self, labeled: tuple[str, ...], unlabeled: tuple[str, ...]) -> None:
        """Make these views from now on."""
        ...

    def sweep_dataloader(self, split: Split) -> Iterable[dict[str, Tensor]]:
        """The training images of a split, unaugmented and in order."""
        ...

    def labels_of(self, split: Split) -> Tensor:
        """Their given labels, -1 where there is none."""
        ...

    def select(self, split: Split, indices: Tensor | None) -> None:
        """Draw from these images from the next epoch on."""
        ...


@runtime_checkable
class LearnsAugmentation(Protocol):
    """A method with a table of augmentation magnitudes that the data draw from (CTAugment)."""

    rates: Tensor


@runtime_checkable
class SharesRates(Protocol):
    """A datamodule whose augmentations draw their magnitudes from such a table."""

    def share_rates(self, rates: Tensor) -> None:
        """Draw from this table, whatever is in it at the time."""
        ...


def required_parts(batch: object, method: Method) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return copies of the labelled and the unlabelled part of a batch, if the method finds there what it needs.

    Args:
        batch: What the loader gave.
        method: The method.

    Raises:
        ValueError: A view, the labels or the index is missing.
    """
    views = method.views
    needed = {
        "labeled": (*view_keys(views.labeled, labeled=True), "label"),
        "unlabeled": (*view_keys(views.unlabeled), *(("index",) if views.index and views.unlabeled else ())),
    }
    found = dict(batch) if isinstance(batch, Mapping) else {}
    parts = {name: dict(found.get(name, {})) for name in needed}
    for name, keys in needed.items():
        missing = [key for key in keys if key not in parts[name]]
        if missing:
            msg = (
                f"Expected training batches with {', '.join(keys)} under `{name}` for {type(method).__name__}, got "
                f"{', '.join(sorted(parts[name])) or 'nothing'}; use SemiSupervisedDataModule, or let your data give "
                f"{', '.join(missing)}."
            )
            raise ValueError(msg)
    return parts["labeled"], parts["unlabeled"]


def require_labels(label: Tensor, num_classes: int, low: int = 0) -> None:
    """Refuse labels outside the classes.

    Args:
        label: Class ids.
        num_classes: Classes K.
        low: The least id that is allowed; -1 where it stands for "unknown".

    Raises:
        ValueError: A label is below `low` or not below `num_classes`.
    """
    wrong = label[(label < low) | (label >= num_classes)]
    if len(wrong):
        msg = (
            f"Expected labels from {low} to {num_classes - 1} (`num_classes` = {num_classes}), got {int(wrong[0])}; "
            "set `num_classes` to that of the data, or map the labels."
        )
        raise ValueError(msg)
