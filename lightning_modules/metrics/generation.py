"""What the metrics of drawn images have in common: features in, classes known, sizes told once."""

from typing import Self

import torch
from torch import Tensor
from torchmetrics import Metric

Values = Tensor | dict[str, Tensor]


class GenerationMetric(Metric):
    """A number that compares drawn images with real ones, or judges them by a classifier.

    Images are turned into features and class probabilities once, for all metrics. What a metric keeps depends on the
    number of features and classes, which are told by `set_up` before the first `update`. States of several processes
    add up or are put one behind the other, so the result is that of one process.

    Args:
        per_class: Compare the images of each class by themselves and take the mean over the classes.

    Attributes:
        name: What the value is logged as, before the name of the feature extractor.
        least: Images, of each class where `per_class`, without which there is no value.
        needs_images: Whether `update` wants the images themselves, real ones being those of the test.
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    needs_images = False

    name: str
    least: int = 1
    real_count: Tensor
    drawn_count: Tensor

    def __init__(self, per_class: bool = False) -> None:
        """Keep nothing yet: sizes are not known."""
        super().__init__()
        self.per_class = per_class
        self.num_features = 0
        self.num_classes = 0

    def set_up(self, num_features: int, num_classes: int) -> Self:
        """Tell the sizes, and forget what was kept under others.

        Args:
            num_features: Features D of an image.
            num_classes: Classes K.

        Returns:
            The metric itself.

        Raises:
            ValueError: One of them is below 1.
        """
        for name, value in (("num_features", num_features), ("num_classes", num_classes)):
            if value < 1:
                msg = f"Expected argument `{name}` to be at least 1, got {value}; ask the extractor and the data."
                raise ValueError(msg)
        self.num_features, self.num_classes = num_features, num_classes
        for name in ("real_count", "drawn_count"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_states()
        self.reset()
        return self

    def add_states(self) -> None:
        """Declare what is kept, with `add_state`; the sizes are known."""
        raise NotImplementedError

    def add(self, features: Tensor, labels: Tensor, probabilities: Tensor, real: bool, images: Tensor | None) -> None:
        """Take a checked batch into the states; arguments as for `update`."""
        raise NotImplementedError

    def update(
        self, features: Tensor, labels: Tensor, probabilities: Tensor, real: bool, images: Tensor | None = None
    ) -> None:
        """Add a batch of images.

        Args:
            features: [B, D], finite.
            labels: [B] class ids: of real images their class, of drawn ones the class that was asked for.
            probabilities: [B, K'] what the extractor's classifier says.
            real: Whether these are real images, or drawn ones.
            images: [B, C, H, W] in [0, 1]; only metrics with `needs_images` look at them.

        Raises:
            ValueError: A shape or value is not what is described above.
            RuntimeError: `set_up` was not called.
        """
        self._check(features, labels, probabilities, images)
        count = torch.bincount(labels, minlength=self.num_classes)
        if real:
            self.real_count += count
        else:
            self.drawn_count += count
        self.add(features.detach(), labels, probabilities.detach(), real, images)

    def require_images(self, real: Tensor, drawn: Tensor) -> None:
        """Refuse to compare too few images; asked before the first is drawn and again in `compute`.

        Args:
            real: [K] real images of each class.
            drawn: [K] drawn ones.

        Raises:
            ValueError: There are fewer than `least` of either.
        """
        for kind, count in (("real", real), ("drawn", drawn)):
            if self.per_class:
                short = (count < self.least).nonzero().flatten().tolist()
                if short:
                    msg = (
                        f"Expected at least {self.least} {kind} images of every class for `{self.name}`, got "
                        f"{int(count[short[0]])} of class {short[0]}"
                        f"{f' and too few of {len(short) - 1} more' if len(short) > 1 else ''}; give more, or leave "
                        "`per_class` off."
                    )
                    raise ValueError(msg)
            elif int(count.sum()) < self.least:
                msg = (
                    f"Expected at least {self.least} {kind} images for `{self.name}`, got {int(count.sum())}; give "
                    "more, or leave the metric out."
                )
                raise ValueError(msg)

    def _check(self, features: Tensor, labels: Tensor, probabilities: Tensor, images: Tensor | None) -> None:
        if not self.num_classes:
            msg = f"Call set_up(num_features, num_classes) of {type(self).__name__} before update: sizes are not known."
            raise RuntimeError(msg)
        sizes = tuple(features.shape), tuple(labels.shape), tuple(probabilities.shape)
        if (
            features.ndim != 2
            or labels.shape != features.shape[:1]
            or probabilities.ndim != 2
            or (features.shape[1] != self.num_features or len(probabilities) != len(features))
        ):
            msg = (
                f"Expected `features` [B, {self.num_features}], `labels` [B] and `probabilities` [B, K'], got shapes "
                f"{', '.join(map(str, sizes))}; pass what the extractor returned, and its `num_features` to set_up."
            )
            raise ValueError(msg)
        if labels.is_floating_point() or bool(((labels < 0) | (labels >= self.num_classes)).any()):
            msg = (
                f"Expected `labels` to hold class ids in 0..{self.num_classes - 1}, got {labels.dtype} from "
                f"{labels.min().item()} to {labels.max().item()}; leave images without a class out."
            )
            raise ValueError(msg)
        if not bool(torch.isfinite(features).all() & torch.isfinite(probabilities).all()):
            msg = (
                "Expected finite `features` and `probabilities`, got NaN or infinity; where drawn images have them, "
                "training or sampling has diverged."
            )
            raise ValueError(msg)
        if self.needs_images and (images is None or images.ndim != 4 or len(images) != len(labels)):
            shape = None if images is None else tuple(images.shape)
            msg = f"Expected `images` [B, C, H, W] for `{self.name}`, got {shape}; pass them to update(images=...)."
            raise ValueError(msg)


class KeepingMetric(GenerationMetric):
    """Keeps the features and labels of all images, since pairs of them are compared."""

    real_features: list[Tensor]
    real_labels: list[Tensor]
    drawn_features: list[Tensor]
    drawn_labels: list[Tensor]

    def add_states(self) -> None:
        """Four lists, put one behind the other over processes."""
        for name in ("real_features", "real_labels", "drawn_features", "drawn_labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def add(self, features: Tensor, labels: Tensor, probabilities: Tensor, real: bool, images: Tensor | None) -> None:
        """Append a batch."""
        if real:
            self.real_features.append(features.float())
            self.real_labels.append(labels)
        else:
            self.drawn_features.append(features.float())
            self.drawn_labels.append(labels)
