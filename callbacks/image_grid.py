"""Pictures of what a segmenter sees and says, in TensorBoard while it trains."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from callbacks.drawing import (
    IGNORED,
    PREDICTION,
    TRUTH,
    Pixels,
    captioned,
    draw_contours,
    enlarge,
    shade,
    sheet,
    tint,
    to_pixels,
)
from callbacks.picture import Picture, evaluating, lacks_method, require_positive


@runtime_checkable
class Segments(Protocol):
    """A module that segments images."""

    def segment(self, image: Tensor) -> Tensor:
        """Class probabilities [B, K, H, W] of images [B, 3, H, W] in [0, 1]."""
        ...


@runtime_checkable
class Denoises(Protocol):
    """A module that takes noise of a level in [0, 1] out of images."""

    def denoise(
        self, image: Tensor, level: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images, denoised images (both in [0, 1]) and class probabilities."""
        ...


class FirstImages(Picture):
    """A picture of the first images of the validation or test data; subclasses draw it.

    Where there is no validation it is the first training images, unaugmented.
    """

    tag: str
    parts: tuple[str, ...] = ("image",)
    """What an item of the data needs to have."""

    def __init__(self, every_n_epochs: int, num_images: int) -> None:
        super().__init__(every_n_epochs)
        require_positive(num_images=num_images)
        self.num_images = num_images

    def draw_items(self, pl_module: pl.LightningModule, items: Mapping[str, Tensor]) -> Pixels | None:
        """Draw the picture.

        Args:
            pl_module: The module, in evaluation mode.
            items: The `parts` of the images, each [B, ...]; `image` is on the device of the module.

        Returns:
            [height, width, 3], or nothing when the module has nothing to show.
        """
        raise NotImplementedError

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the first validation images.

        Args:
            trainer: The trainer.
            pl_module: The module to ask.
        """
        if self.is_due_after_validation(trainer):
            self._draw(trainer, pl_module, "val", trainer.val_dataloaders)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the first test images.

        Args:
            trainer: The trainer.
            pl_module: The module to ask.
        """
        self._draw(trainer, pl_module, "test", trainer.test_dataloaders)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the first training images, where there is no validation that would draw.

        Args:
            trainer: The trainer.
            pl_module: The module to ask.
        """
        if not self.validates(trainer) and self.is_due(trainer):
            self._draw(trainer, pl_module, "train", trainer.train_dataloader)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str, loaders: object) -> None:
        if not trainer.is_global_zero:
            return
        add_image = self.sink(trainer)
        if add_image is None:
            return
        items = self._first_items(loaders)
        if not items:
            self.say(
                f"the {split} data has no items with {' and '.join(f'`{p}`' for p in self.parts)}, nothing is drawn."
            )
            return
        with evaluating(trainer, pl_module):
            precision = trainer.strategy.precision_plugin
            stacked = {name: torch.stack([item[name] for item in items]) for name in self.parts}
            stacked["image"] = precision.convert_input(stacked["image"].to(pl_module.device))
            drawn = self.draw_items(pl_module, stacked)
        if drawn is not None:
            add_image(f"{split}/{self.tag}", drawn, trainer.global_step, dataformats="HWC")

    def _first_items(self, loaders: object) -> list[Mapping[str, Tensor]]:
        """The first images of the first loader: asked by number, a data set does not augment them."""
        while isinstance(loaders, Sequence | Mapping):
            values = list(loaders.values()) if isinstance(loaders, Mapping) else list(loaders)
            loaders = values[0] if values else None
        data: Any = getattr(loaders, "dataset", None)
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            return []
        items = [data[i] for i in range(min(self.num_images, len(data)))]
        return [item for item in items if isinstance(item, Mapping) and set(self.parts) <= item.keys()]


class ImageGrid(FirstImages):
    """A picture of the first images and their masks; subclasses draw it."""

    parts = ("image", "mask")

    def draw_items(self, pl_module: pl.LightningModule, items: Mapping[str, Tensor]) -> Pixels | None:
        """Draw the picture, see `picture`."""
        return self.picture(pl_module, items["image"], items["mask"])

    def picture(self, pl_module: pl.LightningModule, image: Tensor, mask: Tensor) -> Pixels | None:
        """Draw the picture.

        Args:
            pl_module: The module, in evaluation mode.
            image: [B, 3, H, W] in [0, 1], on the device of the module.
            mask: [B, H, W] class ids, 255 where there is no label.

        Returns:
            [height, width, 3], or nothing when the module has nothing to show.
        """
        raise NotImplementedError


class SegmentationGrid(ImageGrid):
    """One row an image: the input, the true outline over it, and the predicted outline.

    The images are the first ones of the validation or test data (of the training data, unaugmented, where
    there is no validation), so one picture compares with the next. Each prediction carries its Jaccard index.

    Args:
        every_n_epochs: Epochs between pictures; the last epoch always has one.
        num_images: Images in a picture.

    Raises:
        ValueError: A number is below 1.
    """

    tag = "segmentation"

    def __init__(self, every_n_epochs: int = 1, num_images: int = 8) -> None:
        """Check the arguments."""
        super().__init__(every_n_epochs, num_images)

    def picture(self, pl_module: pl.LightningModule, image: Tensor, mask: Tensor) -> Pixels | None:
        """Draw the picture.

        Args:
            pl_module: A module that can `segment`.
            image: [B, 3, H, W] in [0, 1].
            mask: [B, H, W] class ids, 255 where there is no label.

        Returns:
            [height, width, 3].

        Raises:
            TypeError: The module has no `segment`.
        """
        if getattr(pl_module, "objective", None) == "generative":
            self.say("objective 'generative' trains no masks, nothing is drawn.")
            return None
        if not isinstance(pl_module, Segments):
            raise TypeError(lacks_method(pl_module, "segment(image)", type(self)))
        probabilities = pl_module.segment(image)
        classes, labels = probabilities.shape[1], predicted_masks(pl_module, image, probabilities).cpu()
        rows = []
        for i in range(len(image)):
            plain, scale = to_pixels(image[i], 192)
            true, predicted = enlarge(mask[i].cpu(), scale), enlarge(labels[i], scale)
            # Many classes show by their colours, so that thin lines of their own are enough.
            width = 2 if classes == 2 else 1
            truth = draw_contours(tint(plain, true, classes), true, TRUTH, width)
            both = truth if classes == 2 else tint(plain, predicted, classes)
            both = draw_contours(both, predicted, PREDICTION, width)
            rows.append([plain, truth, captioned(both, f"Jaccard {_jaccard(predicted, true):.3f}")])
        return sheet(["input", "truth (green)", "prediction (red)"], rows)


class DenoisingGrid(ImageGrid):
    """Three rows an image: noisy, denoised, predicted mask; one column a noise level.

    The noise is the same for all levels and in all pictures. Modules of objective "supervised" do not
    denoise: one line says so and nothing is drawn.

    Args:
        levels: Noise levels in [0, 1], one a column.
        num_images: Images in a picture.
        every_n_epochs: Epochs between pictures; the last epoch always has one.

    Raises:
        ValueError: A number is below 1, or a level outside [0, 1].
    """

    tag = "denoising"

    def __init__(
        self,
        levels: tuple[float, ...] = (0.25, 0.5, 0.75, 0.95),
        num_images: int = 4,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(every_n_epochs, num_images)
        if not levels or not all(0 <= level <= 1 for level in levels):
            msg = f"Expected `levels` to hold noise levels in [0, 1], got {levels}; give one for each column."
            raise ValueError(msg)
        self.levels = tuple(levels)

    def picture(self, pl_module: pl.LightningModule, image: Tensor, mask: Tensor) -> Pixels | None:
        """Draw the picture.

        Args:
            pl_module: A module that can `denoise`.
            image: [B, 3, H, W] in [0, 1].
            mask: [B, H, W] class ids, 255 where there is no label.

        Returns:
            [height, width, 3], or nothing for objective "supervised".

        Raises:
            TypeError: The module has no `denoise`.
        """
        objective = getattr(pl_module, "objective", None)
        if objective == "supervised":
            self.say("objective 'supervised' does not denoise, nothing is drawn.")
            return None
        if not isinstance(pl_module, Denoises):
            raise TypeError(lacks_method(pl_module, "denoise(image, level, generator)", type(self)))
        # On the CPU and seeded anew: the noise is the same on every machine, and training's own is untouched.
        columns = [pl_module.denoise(image, level, torch.Generator().manual_seed(0)) for level in self.levels]
        rows = []
        for i in range(len(image)):
            plain, scale = to_pixels(image[i], 128)
            truth = draw_contours(plain, enlarge(mask[i].cpu(), scale), TRUTH)
            rows.append([plain, *(to_pixels(noisy[i], 128)[0] for noisy, _, _ in columns)])
            rows.append([truth, *(to_pixels(clean[i], 128)[0] for _, clean, _ in columns)])
            if objective != "generative":
                known = torch.where(mask[i] == IGNORED, 0, mask[i]).cpu()
                exact = nn.functional.one_hot(known, columns[0][2].shape[1]).movedim(-1, 0)
                masks = [exact, *(probabilities[i] for _, _, probabilities in columns)]
                rows.append([to_pixels(shade(p), 128)[0] for p in masks])
        for row, name in zip(rows, ("noisy", "denoised", "mask")[: len(rows) // len(image)], strict=False):
            row[1] = captioned(row[1], name)
        return sheet(["input and truth", *(f"level {level:g}" for level in self.levels)], rows)


def predicted_masks(pl_module: pl.LightningModule, image: Tensor, probabilities: Tensor) -> Tensor:
    """Class ids [B, H, W]: the module's own verdict where it has one (`masks(image)`), else the likeliest class."""
    masks = getattr(pl_module, "masks", None)
    labels: Tensor = masks(image) if callable(masks) else probabilities.argmax(1)
    return labels


def _jaccard(predicted: Tensor, true: Tensor) -> float:
    """Jaccard index of one image: mean over the foreground classes that it has, 1 where it has none."""
    valid = true != IGNORED
    scores = []
    for k in range(1, int(max(predicted.max(), true[valid].max() if valid.any() else 0)) + 1):
        p, g = (predicted == k) & valid, (true == k) & valid
        if (p | g).any():
            scores.append(float((p & g).sum() / (p | g).sum()))
    return sum(scores) / len(scores) if scores else 1.0
