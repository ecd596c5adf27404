"""Overlap of predicted and true masks: per image (Jaccard, Dice) and pooled over a data set.

All three take class ids or scores, leave out pixels marked `ignore_index`, and keep only sums, so that the
result does not depend on how the images were divided into batches or processes.
"""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric


class _Overlap(Metric):
    """Checks the arguments and counts pixels per image and class; subclasses turn the counts into a score."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        super().__init__()
        if num_classes < 2:
            msg = (
                f"Expected argument `num_classes` to be at least 2 but got {num_classes}. Count the "
                "background: a binary mask has 2 classes."
            )
            raise ValueError(msg)
        if 0 <= ignore_index < num_classes:
            msg = (
                f"Expected argument `ignore_index` to be no class id (0..{num_classes - 1}) but got "
                f"{ignore_index}. Use 255, or -1."
            )
            raise ValueError(msg)
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def _counts(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Count the pixels that are not ignored.

        Returns:
            Per image and class [B, K]: pixels in both masks, pixels predicted, pixels true; and [B] whether
            the image has any pixel to be judged by (one that has none is padding).
        """
        labels = self._class_ids(preds, target)
        valid = target != self.ignore_index
        self._check_range("preds", labels, torch.ones_like(valid), "Fix `num_classes`, or pass [B, K, H, W].")
        self._check_range("target", target, valid, f"Mark pixels without a label as {self.ignore_index}.")
        batch, k = len(labels), self.num_classes
        # One histogram for the batch: bin (image, class), and bin K of each image takes what is ignored.
        offset = (torch.arange(batch, device=labels.device) * (k + 1)).view(batch, 1, 1)

        def histogram(ids: Tensor, where: Tensor) -> Tensor:
            cells = (torch.where(where, ids.long(), k) + offset).flatten()
            return torch.bincount(cells, minlength=batch * (k + 1)).view(batch, k + 1)[:, :k]

        both = histogram(target, valid & (labels == target))
        return both, histogram(labels, valid), histogram(target, valid), valid.flatten(1).any(1)

    def _class_ids(self, preds: Tensor, target: Tensor) -> Tensor:
        if target.ndim != 3 or preds.ndim not in (3, 4):
            msg = (
                "Expected argument `target` to be [B, H, W] and `preds` to be [B, H, W] or [B, K, H, W] but "
                f"got shapes {tuple(target.shape)} and {tuple(preds.shape)}. Add a batch dimension."
            )
            raise ValueError(msg)
        if preds.ndim == 4 and (preds.shape[1] != self.num_classes or not preds.is_floating_point()):
            msg = (
                "Expected argument `preds` with four dimensions to hold floating scores of "
                f"{self.num_classes} classes in dimension 1 but got {preds.dtype} of shape "
                f"{tuple(preds.shape)}. Fix `num_classes` or pass class ids [B, H, W]."
            )
            raise ValueError(msg)
        labels = preds.argmax(1) if preds.ndim == 4 else preds
        if labels.shape != target.shape:
            msg = (
                "Expected arguments `preds` and `target` to agree in batch and image size but got shapes "
                f"{tuple(preds.shape)} and {tuple(target.shape)}. Resize the masks with nearest."
            )
            raise ValueError(msg)
        for name, ids in (("preds", labels), ("target", target)):
            if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                msg = (
                    f"Expected argument `{name}` to hold integer class ids but got {ids.dtype}. Convert it "
                    "with `.long()`, after a threshold where it holds probabilities."
                )
                raise ValueError(msg)
        return labels

    def _check_range(self, name: str, ids: Tensor, where: Tensor, remedy: str) -> None:
        wrong = where & ((ids < 0) | (ids >= self.num_classes))
        if bool(wrong.any()):
            found = torch.unique(ids[wrong])[:5].tolist()
            msg = f"Expected argument `{name}` to hold class ids in 0..{self.num_classes - 1} but got {found}. {remedy}"
            raise ValueError(msg)


class _PerImage(_Overlap):
    """Mean over images of one score per image."""

    total: Tensor
    count: Tensor

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        super().__init__(num_classes, ignore_index)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _ratio(self, both: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        raise NotImplementedError

    def _accept(self, score: Tensor) -> Tensor:
        return score

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of images.

        Args:
            preds: Class ids [B, H, W], or scores [B, K, H, W] whose largest decides.
            target: Class ids [B, H, W]; an image of `ignore_index` only is padding and does not count.

        Raises:
            ValueError: A shape, type or class id is not what is described above.
        """
        both, predicted, true, judged = self._counts(preds, target)
        # Class 0 is background. A foreground class that neither mask has says nothing about this image.
        present = (predicted + true)[:, 1:] > 0
        per_class = self._ratio(both, predicted, true)[:, 1:]
        classes = present.sum(1)
        mean = torch.where(present, per_class, 0.0).sum(1) / classes.clamp(min=1)
        score = torch.where(classes > 0, mean, 1.0)
        self.total += self._accept(score)[judged].sum()
        self.count += judged.sum()

    def compute(self) -> Tensor:
        """Mean over the images seen.

        Returns:
            Scalar in [0, 1]; NaN when no image counted.
        """
        return self.total / self.count


class MeanJaccard(_PerImage):
    """Average Jaccard index per image; with a threshold, the score of the ISIC-2018 challenge.

    Of each image, |P & G| / |P | G| of the foreground, 1 when both masks are empty: the ranking score of the
    ISIC-2017 challenge (arXiv 1710.05006); its successor of 2018 set scores below 0.65 to 0 (arXiv
    1902.03368). With more than two classes: the mean over the foreground classes that either mask of the
    image has, 1 when there is none.

    Args:
        num_classes: Number of classes K, background (class 0) included.
        threshold: An image whose score is below this counts as 0, in [0, 1]; 0.65 for ISIC 2018.
        ignore_index: Pixels of this value in the true mask count neither for nor against.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, num_classes: int, threshold: float = 0.0, ignore_index: int = 255) -> None:
        """Check the arguments and start at zero."""
        super().__init__(num_classes, ignore_index)
        if not 0 <= threshold <= 1:
            msg = f"Expected argument `threshold` to lie in [0, 1] but got {threshold}. ISIC 2018 uses 0.65."
            raise ValueError(msg)
        self.threshold = threshold

    def _ratio(self, both: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        return both / (predicted + true - both)

    def _accept(self, score: Tensor) -> Tensor:
        return torch.where(score < self.threshold, 0.0, score)


class MeanDice(_PerImage):
    """Average Dice coefficient per image: 2 |P & G| / (|P| + |G|), with `MeanJaccard`'s conventions.

    Args:
        num_classes: Number of classes K, background (class 0) included.
        ignore_index: Pixels of this value in the true mask count neither for nor against.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        """Check the arguments and start at zero."""
        super().__init__(num_classes, ignore_index)

    def _ratio(self, both: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        return 2 * both / (predicted + true)


class PooledJaccard(_Overlap):
    """Intersection over union of each class, pooled over the data set, and its mean over all classes.

    IoU_k = I_k / (U_k + 1e-8) with I_k and U_k summed over all images, then the unweighted mean over all K
    classes, background included. A class that neither masks nor predictions have counts as 0, as in the code
    of LEDM (arXiv 2112.03126). One thing differs from that code on purpose: a pixel without a label is left
    out altogether, whereas there it stays in the union of whatever was predicted on it, as a false positive
    that nobody can check.

    torchmetrics' `MeanIoU` is another quantity: it averages within each image first.

    Args:
        num_classes: Number of classes K, background (class 0) included.
        average: "macro" for the mean, "none" for one value per class (`ClasswiseWrapper` gives them names).
        ignore_index: Pixels of this value in the true mask are left out.

    Raises:
        ValueError: A number is outside its range, or `average` is no choice.
    """

    intersection: Tensor
    union: Tensor

    def __init__(self, num_classes: int, average: Literal["macro", "none"] = "macro", ignore_index: int = 255) -> None:
        """Check the arguments and start at zero."""
        super().__init__(num_classes, ignore_index)
        if average not in ("macro", "none"):
            msg = f"Expected argument `average` to be 'macro' or 'none' but got {average!r}. Choose one."
            raise ValueError(msg)
        self.average = average
        # Whole numbers: float32 no longer holds every pixel count after 256 images of 256 x 256.
        self.add_state("intersection", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("union", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of images.

        Args:
            preds: Class ids [B, H, W], or scores [B, K, H, W] whose largest decides.
            target: Class ids [B, H, W], or `ignore_index`.

        Raises:
            ValueError: A shape, type or class id is not what is described above.
        """
        both, predicted, true, _ = self._counts(preds, target)
        self.intersection += both.sum(0)
        self.union += (predicted + true - both).sum(0)

    def compute(self) -> Tensor:
        """Pooled intersection over union.

        Returns:
            Scalar, or [K] with `average="none"`; in [0, 1].
        """
        iou = self.intersection / (self.union + 1e-8)
        return iou.mean() if self.average == "macro" else iou
