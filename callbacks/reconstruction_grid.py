"""Pictures of what an autoencoder makes of images, in TensorBoard while it trains."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import pytorch_lightning as pl
from torch import Tensor

from callbacks.drawing import Pixels, captioned, sheet, to_pixels
from callbacks.image_grid import FirstImages
from callbacks.picture import lacks_method


@runtime_checkable
class Reconstructs(Protocol):
    """A module that takes images apart and puts them together again."""

    def reconstruct(self, image: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] from images [B, C, H, W] in [0, 1]."""
        ...


class ReconstructionGrid(FirstImages):
    """One row an image: the original, its reconstruction, and how far they are apart, enlarged four times.

    The images are the first ones of the validation or test data (of the training data, where there is no validation),
    so one picture compares with the next. Each reconstruction carries its mean absolute error.

    Args:
        every_n_epochs: Epochs between pictures; the last epoch always has one.
        num_images: Images in a picture.

    Raises:
        ValueError: A number is below 1.
    """

    tag = "reconstruction"

    def __init__(self, every_n_epochs: int = 1, num_images: int = 8) -> None:
        """Check the arguments."""
        super().__init__(every_n_epochs, num_images)

    def draw_items(self, pl_module: pl.LightningModule, items: Mapping[str, Tensor]) -> Pixels | None:
        """Draw the picture.

        Args:
            pl_module: A module that can `reconstruct`.
            items: `image` [B, C, H, W] in [0, 1].

        Returns:
            [height, width, 3].

        Raises:
            TypeError: The module has no `reconstruct`.
        """
        if not isinstance(pl_module, Reconstructs):
            raise TypeError(lacks_method(pl_module, "reconstruct(image)", type(self)))
        original = items["image"]
        again = pl_module.reconstruct(original)
        rows = []
        for one, other in zip(original.float(), again.float(), strict=True):
            wrong = (one - other).abs()
            cells = [to_pixels(image, 128)[0] for image in (one, other, 4 * wrong)]
            cells[1] = captioned(cells[1], f"error {float(wrong.mean()):.4f}")
            rows.append(cells)
        return sheet(["original", "reconstruction", "difference x 4"], rows)
