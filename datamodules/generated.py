"""Generated data for runs that need no download: the embedded default."""

from typing import Any

from datamodules.lesions import Domain, check_arguments, draw_lesions
from datamodules.segmentation.base import SegmentationDataModule
from datamodules.segmentation.pairs import LabelledArrays

__all__ = ["Domain", "GeneratedLesionsDataModule", "draw_lesions"]


class GeneratedLesionsDataModule(SegmentationDataModule):
    """Generated skin lesions (see `draw_lesions`): a source and a target domain without any download.

    The images are drawn in memory when the run begins; no file is read or written.

    Args:
        domain: Which of the two related domains.
        num_images: Number of images drawn, labelled or not.
        images_seed: Seed of the images; another one draws other images of the same domain.
        kwargs: Passed on to SegmentationDataModule.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_classes = 2
    class_names = ("background", "lesion")

    def __init__(
        self,
        domain: Domain = "source",
        num_images: int = 2000,
        images_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; nothing is drawn before `setup`."""
        super().__init__(root="", **kwargs)
        self.domain = domain
        self.num_images = num_images
        self.images_seed = images_seed
        check_arguments(num_images, self.image_size, domain, images_seed, "images_seed")

    def check(self) -> None:
        """Nothing can be missing: the images are drawn."""

    def make_arrays(self) -> LabelledArrays:
        """Draw all images.

        Returns:
            Images and masks with names that tell domain, seed and number.
        """
        images, masks = draw_lesions(self.num_images, self.image_size, self.domain, self.images_seed)
        keys = [f"{self.domain}_{self.images_seed}/{number:06d}.png" for number in range(self.num_images)]
        return LabelledArrays(images, masks, keys)
