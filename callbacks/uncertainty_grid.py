"""Where a segmenter is unsure, beside what it says and what is true."""

import math
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import pytorch_lightning as pl
from torch import Tensor

from callbacks.drawing import (
    PREDICTION,
    TRUTH,
    Pixels,
    captioned,
    color_bar,
    draw_contours,
    enlarge,
    heat,
    sheet,
    tint,
    to_pixels,
)
from callbacks.image_grid import ImageGrid, predicted_masks
from callbacks.picture import lacks_method

Scale = Literal["log_classes", "largest"]


@runtime_checkable
class KnowsUncertainty(Protocol):
    """A module that segments images and says where it is unsure."""

    def segment(self, image: Tensor) -> Tensor:
        """Class probabilities [B, K, H, W] of images [B, 3, H, W] in [0, 1]."""
        ...

    def uncertainty(self, image: Tensor) -> Tensor:
        """Uncertainty of each pixel [B, H, W] of images [B, 3, H, W] in [0, 1], in nats."""
        ...


class UncertaintyGrid(ImageGrid):
    """One row an image: the input, the true outline, the predicted outline, and a heat map of the uncertainty.

    The images are those of `SegmentationGrid`: the first ones of the validation or test data (of the training data,
    where there is no validation). A colour bar below says what the colours mean, in nats.

    Args:
        every_n_epochs: Epochs between pictures; the last epoch always has one.
        num_images: Images in a picture.
        scale: Where the colours end. `log_classes`: at log K for K classes, the most that an entropy can be, so that
            pictures compare. `largest`: at the largest uncertainty in the picture, for modules whose uncertainties
            are all small.

    Raises:
        ValueError: A number is below 1, or `scale` is no choice.
    """

    tag = "uncertainty"

    def __init__(self, every_n_epochs: int = 1, num_images: int = 8, scale: Scale = "log_classes") -> None:
        """Check the arguments."""
        super().__init__(every_n_epochs, num_images)
        if scale not in get_args(Scale):
            msg = f"Expected `scale` to be one of {', '.join(get_args(Scale))}, got {scale!r}; choose one."
            raise ValueError(msg)
        self.scale: Scale = scale

    def picture(self, pl_module: pl.LightningModule, image: Tensor, mask: Tensor) -> Pixels | None:
        """Draw the picture.

        Args:
            pl_module: A module that can `segment` and knows its `uncertainty`.
            image: [B, 3, H, W] in [0, 1].
            mask: [B, H, W] class ids, 255 where there is no label.

        Returns:
            [height, width, 3]; nothing for objective "generative", which trains no masks.

        Raises:
            TypeError: The module has no `segment` or no `uncertainty`.
        """
        if getattr(pl_module, "objective", None) == "generative":
            self.say("objective 'generative' trains no masks, nothing is drawn.")
            return None
        if not isinstance(pl_module, KnowsUncertainty):
            raise TypeError(lacks_method(pl_module, "segment(image) and uncertainty(image)", type(self)))
        probabilities = pl_module.segment(image)
        uncertainty = pl_module.uncertainty(image).detach().float().cpu()
        classes, labels = probabilities.shape[1], predicted_masks(pl_module, image, probabilities).cpu()
        if self.scale == "log_classes":
            top, meaning = math.log(classes), f"log {classes}, the most there is"
        else:
            top, meaning = float(uncertainty.nan_to_num().max()), "the largest in this picture"
        rows = []
        for i in range(len(image)):
            plain, scale = to_pixels(image[i], 192)
            true, predicted = enlarge(mask[i].cpu(), scale), enlarge(labels[i], scale)
            width = 2 if classes == 2 else 1
            truth = draw_contours(tint(plain, true, classes), true, TRUTH, width)
            said = draw_contours(tint(plain, predicted, classes), predicted, PREDICTION, width)
            hot = captioned(heat(enlarge(uncertainty[i], scale), top), f"mean {float(uncertainty[i].mean()):.3g}")
            rows.append([plain, truth, said, hot])
        drawn = sheet(["input", "truth (green)", "prediction (red)", "uncertainty"], rows)
        return np.concatenate([drawn, color_bar(drawn.shape[1], top, f"uncertainty in nats: white is {meaning}")])
