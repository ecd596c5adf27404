"""What is measured on predicted masks, by every module that predicts any."""

from torch import Tensor
from torchmetrics import ClasswiseWrapper, MetricCollection

from lightning_modules.metrics.calibration import CalibrationError
from lightning_modules.metrics.segmentation import MeanDice, MeanJaccard, PooledJaccard


def mask_metrics(num_classes: int) -> MetricCollection:
    """Overlap and calibration, updated with (probabilities [B, K, H, W], mask [B, H, W]).

    Args:
        num_classes: K, the background included.

    Returns:
        `jaccard` and `dice` (means over images of the foreground's overlap), `jaccard_isic2018` (the same, an image
        below 0.65 counting 0), `miou` (pooled over the images, mean over classes), `iou_class_<k>` (its terms) and
        `ece` (expected calibration error over pixels).
    """
    labels = [f"class_{k}" for k in range(num_classes)]
    return MetricCollection(
        {
            "jaccard": MeanJaccard(num_classes),
            "jaccard_isic2018": MeanJaccard(num_classes, threshold=0.65),
            "dice": MeanDice(num_classes),
            "miou": PooledJaccard(num_classes),
            "iou": ClasswiseWrapper(PooledJaccard(num_classes, average="none"), labels=labels, prefix="iou_"),
            "ece": CalibrationError(num_classes),
        },
        compute_groups=False,
    )


def reliability_bins(metrics: MetricCollection) -> tuple[Tensor, Tensor, Tensor]:
    """The bins behind `ece`, over all processes: mean confidence, accuracy and number of pixels of each.

    Args:
        metrics: A collection made by `mask_metrics` that has seen images.
    """
    error = metrics["ece"]
    if not isinstance(error, CalibrationError):
        msg = f"Expected `metrics` from mask_metrics(), got {type(error).__name__} as their `ece`."
        raise TypeError(msg)
    return error.bins()
