"""Whether a segmenter is as often right as it says."""

import torch
from torch import Tensor
from torchmetrics import Metric

# Confidences are summed as whole multiples of float32's own step in [0.5, 1): no rounding, no order, any device.
_STEPS = 2**24


class CalibrationError(Metric):
    """Expected calibration error of the predicted class, over all labelled pixels (Guo et al., 2017).

    The confidence of a pixel is its largest probability, and it is right when that class is the true one. With the
    pixels sorted by confidence into bins B_m of equal width, (lo, hi], the error is (arXiv 1706.04599, equations 3
    and 5)

        ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)|.

    Only three whole numbers a bin are kept, so neither the size of the data nor how it was divided into batches or
    processes matters.

    Args:
        num_classes: Number of classes K, background (class 0) included.
        num_bins: How many bins [0, 1] is divided into; 15 in the paper.
        ignore_index: Pixels of this value in the true mask are left out.

    Raises:
        ValueError: A number is outside its range.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    steps: Tensor
    right: Tensor
    count: Tensor

    def __init__(self, num_classes: int, num_bins: int = 15, ignore_index: int = 255) -> None:
        """Check the arguments and start at zero."""
        super().__init__()
        if num_classes < 2:
            msg = (
                f"Expected argument `num_classes` to be at least 2 but got {num_classes}. Count the background: a "
                "binary mask has 2 classes."
            )
            raise ValueError(msg)
        if num_bins < 1:
            msg = f"Expected argument `num_bins` to be at least 1 but got {num_bins}. The paper has 15."
            raise ValueError(msg)
        if 0 <= ignore_index < num_classes:
            msg = (
                f"Expected argument `ignore_index` to be no class id (0..{num_classes - 1}) but got "
                f"{ignore_index}. Use 255, or -1."
            )
            raise ValueError(msg)
        self.num_classes = num_classes
        self.num_bins = num_bins
        self.ignore_index = ignore_index
        for state in ("steps", "right", "count"):
            self.add_state(state, torch.zeros(num_bins, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, mask: Tensor) -> None:
        """Add a batch of images.

        Args:
            probabilities: [B, K, H, W], non-negative, summing to 1 over the classes.
            mask: True class ids [B, H, W]; an image of `ignore_index` only is padding and adds nothing.

        Raises:
            ValueError: A shape, type or value is not what is described above.
        """
        self._check(probabilities, mask)
        confidence, labels = probabilities.detach().max(1)
        valid = mask != self.ignore_index
        confidence, right = confidence[valid].float().clamp(max=1), labels[valid] == mask[valid]
        # The upper edges k / num_bins, each rounded once: 0.6 of 15 bins then falls into the bin that ends there.
        edges = torch.arange(1, self.num_bins, device=confidence.device, dtype=torch.float32) / self.num_bins
        number = torch.bucketize(confidence, edges)
        steps = (confidence * _STEPS).round().long()
        # Bin by bin: no table of pixels times bins, and unlike a weighted histogram deterministic on GPUs.
        for m in range(self.num_bins):
            member = number == m
            self.steps[m] += torch.where(member, steps, 0).sum()
            self.right[m] += (member & right).sum()
            self.count[m] += member.sum()

    def compute(self) -> Tensor:
        """Error over all pixels seen.

        Returns:
            Scalar in [0, 1]; NaN when no pixel counted.
        """
        gap = (self.right * _STEPS - self.steps).abs().sum()
        return gap.float() / _STEPS / self.count.sum().float()

    def bins(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a reliability diagram shows, over all processes; every one of them has to ask.

        Returns:
            Mean confidence and accuracy of each bin, [num_bins] float32 in [0, 1], NaN where no pixel fell, and the
            number of pixels, [num_bins] int64.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            count = self.count.clone()
            confidence = self.steps.float() / _STEPS / count.float()
            accuracy = self.right.float() / count.float()
        return confidence, accuracy, count

    def _check(self, probabilities: Tensor, mask: Tensor) -> None:
        shape = tuple(probabilities.shape)
        if len(shape) != 4 or shape[1] != self.num_classes or not probabilities.is_floating_point():
            msg = (
                f"Expected argument `probabilities` to be floating [B, {self.num_classes}, H, W] but got "
                f"{probabilities.dtype} of shape {shape}. Class ids do not tell how sure they are: pass what they are "
                "the argmax of, and fix `num_classes`."
            )
            raise ValueError(msg)
        if tuple(mask.shape) != (shape[0], *shape[2:]):
            msg = (
                "Expected arguments `probabilities` and `mask` to agree in batch and image size but got shapes "
                f"{shape} and {tuple(mask.shape)}. Resize the masks with nearest."
            )
            raise ValueError(msg)
        if mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool:
            msg = f"Expected argument `mask` to hold integer class ids but got {mask.dtype}. Convert it with `.long()`."
            raise ValueError(msg)
        total = probabilities.detach().float().sum(1)
        # In half precision the rounding of each probability alone may add up to more than 1e-3.
        tolerance = max(1e-3, torch.finfo(probabilities.dtype).eps)
        if not bool(((total - 1).abs() <= tolerance).all() & (probabilities >= 0).all()):
            msg = (
                f"Expected argument `probabilities` to be non-negative and to sum to 1 over the classes but got values "
                f"from {float(probabilities.min()):.4g} with sums from {float(total.min()):.4g} to "
                f"{float(total.max()):.4g}. Pass logits through `softmax(1)`; NaN means that training diverged."
            )
            raise ValueError(msg)
        wrong = (mask != self.ignore_index) & ((mask < 0) | (mask >= self.num_classes))
        if bool(wrong.any()):
            msg = (
                f"Expected argument `mask` to hold class ids in 0..{self.num_classes - 1} but got "
                f"{torch.unique(mask[wrong])[:5].tolist()}. Mark pixels without a label as {self.ignore_index}."
            )
            raise ValueError(msg)
