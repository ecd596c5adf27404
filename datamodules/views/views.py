"""Weakly and strongly augmented views, of batches on any device or of single images in a DataLoader's workers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.ctaugment import RATES_SHAPE
from datamodules.views.batch_ops import apply_operations, crop_images, cut_holes, shift_images
from datamodules.views.crops import MultiCrop
from datamodules.views.policies import Plan, StrongName, ViewSettings, WeakName, draw_plan
from datamodules.views.worker_ops import apply_plan

# Of a part of a batch on the CPU. Strong views of 128 images of 224 pixels took 0.6 of the time they took at once.
_PART_NUMBERS = 2**22


class _Views:
    """Settings, names and CTAugment's table, which both kinds of views have."""

    def __init__(
        self,
        image_size: int,
        weak: WeakName = "flip_crop",
        strong: StrongName = "randaugment",
        num_ops: int = 2,
        cutout: float = 0.5,
        crop_padding: int | float = 0.125,
        fill: float = 0.5,
        crops: MultiCrop | None = None,
    ) -> None:
        self.settings = ViewSettings(image_size, weak, strong, num_ops, cutout, crop_padding, fill, crops)
        self._rates: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the views that can be made: "plain", "weak", "strong"; "probe" with CTAugment; those of `crops`."""
        return self.settings.names

    def share_rates(self, rates: Tensor) -> None:
        """Take CTAugment's table, which is read anew at every call.

        Args:
            rates: Table [19, 2, 17], as `datamodules.ctaugment.OPS` orders it; in shared memory if it changes while
                other processes make views.

        Raises:
            ValueError: It has another shape.
        """
        if tuple(rates.shape) != RATES_SHAPE:
            msg = f"Expected argument `rates` to have shape {RATES_SHAPE}, but got {tuple(rates.shape)}."
            raise ValueError(msg)
        self._rates = rates

    def _draw(self, names: Sequence[str], count: int, generator: torch.Generator) -> list[tuple[str, str, Plan]]:
        """Name, number suffix and plan of each view."""
        for name in names:
            if name not in self.names:
                msg = f"Expected argument `names` to hold names of views out of {self.names}, but got {name!r}."
                raise ValueError(msg)
        drawn = []
        for position, name in enumerate(names):
            number = [*names[: position + 1]].count(name)
            plan = draw_plan(self.settings, name, count, generator, self._rates)
            drawn.append((name, "" if number == 1 else f"_{number}", plan))
        return drawn


class BatchViews(_Views):
    """Views of a batch, computed together on the device of the images.

    Every image has random numbers of its own, and every view too: a strong view does not repeat the flip and crop of
    the weak one, which would let the network compare the two pixel by pixel.

    "plain" is the image as it is. "weak" is what `weak` says. "strong" is weak, then the operations, then a hole of
    uniformly random side and place. Operations are drawn with replacement, each with a strength drawn uniformly (K.
    Sohn et al., "FixMatch", arXiv:2001.07685, Table 12: the 14 operations and their ranges). Reference code differs in
    details: Google's skips an operation half the time, TorchSSL's takes three. "probe" is weak, then two of CTAugment's
    operations from uniformly random bins, without a hole; it is what the table is learnt from (arXiv:1911.09785).
    "random" and "focal" are what `crops` says, of sides of their own.

    Args:
        image_size: Side of the square images in pixels.
        weak: "flip_crop" mirrors half the images and shifts all, padded by reflection; "crop" only shifts, for what
            means something else in a mirror, digits for example; "none" does nothing.
        strong: "randaugment" takes `num_ops` operations; "trivial" takes one of the same (S. G. Mueller and F. Hutter,
            "TrivialAugment", arXiv:2103.10158); "ctaugment" takes two of 19, with strengths that the network copes
            with according to the table given to `share_rates`.
        num_ops: Operations of a strong view with "randaugment".
        cutout: Largest side of the hole as a share of the image's side; 0 for no hole.
        crop_padding: Largest shift, in pixels if it is an int, as a share of the side if it is a float.
        fill: Grey level, in [0, 1], of holes and of what is drawn in from outside.
        crops: Random and focal views; None has none.

    Raises:
        ValueError: An argument is unknown or out of range.
    """

    def __call__(self, images: Tensor, names: Sequence[str], generator: torch.Generator) -> dict[str, Tensor]:
        """Make views of a batch.

        Args:
            images: Images [B, C, S, S], float in [0, 1], C = 1 or 3, on any device; they are not changed.
            names: Names of the views, in order. The n-th repeat of a name is another view, called `name_n`.
            generator: Random numbers, on the CPU. The same state gives the same views.

        Returns:
            The views, [B, C, S, S] in [0, 1], crops of their own side. Beside a probe, `probe_ops` [B, 2] has its
            operations as numbers in `datamodules.ctaugment.OPS` and `probe_bins` [B, 2, 2] the bins of their
            parameters, -1 for a parameter that an operation lacks; both on the device of the images.

        Raises:
            ValueError: The images have another shape or are no floats, or a name is unknown.
        """
        side = self.settings.image_size
        if images.dim() != 4 or images.shape[1] not in (1, 3) or images.shape[2:] != (side, side):
            msg = (
                f"Expected argument `images` to have shape [B, 1 or 3, {side}, {side}], but got {list(images.shape)}; "
                "set `image_size` to the side of the images."
            )
            raise ValueError(msg)
        if not images.is_floating_point():
            msg = f"Expected argument `images` to be floats in [0, 1], but got {images.dtype}; divide by 255."
            raise ValueError(msg)
        views = {}
        for name, number, plan in self._draw(names, len(images), generator):
            views[f"{name}{number}"] = images if name == "plain" else self._apply(images, plan)
            if name == "probe" and plan.ops is not None and plan.bins is not None:
                views[f"probe_ops{number}"] = plan.ops.to(images.device)
                views[f"probe_bins{number}"] = plan.bins.to(images.device)
        return views

    def _apply(self, images: Tensor, plan: Plan) -> Tensor:
        """Make a view; on the CPU of a part of a large batch at a time."""
        size = len(images)
        if images.device.type == "cpu":
            size = max(1, _PART_NUMBERS // images[0].numel()) if size else 0
        if size >= len(images):
            return self._apply_at_once(images, plan)
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        return torch.cat([self._apply_at_once(images[part], plan.of(part)) for part in parts])

    def _apply_at_once(self, images: Tensor, plan: Plan) -> Tensor:
        fill = self.settings.fill
        if plan.crop is not None:
            images = crop_images(images, plan.crop)
        if plan.shift is not None:
            images = shift_images(images, plan.shift, self.settings.pad)
        if plan.kinds is not None and plan.values is not None:
            images = apply_operations(images, plan.kinds, plan.values, fill)
        if plan.hole is not None:
            images = cut_holes(images, plan.hole.to(images.device, images.dtype), fill)
        return images


class WorkerViews(_Views):
    """Views of single images, computed by Pillow on 8-bit pixels: what BatchViews does, for workers of a DataLoader.

    Operations, ranges and random numbers are the same; a view differs from that of BatchViews only by rounding to 8
    bits, and by interpolation at the rim of rotated and sheared images.

    Args:
        image_size: As for BatchViews.
        weak: As for BatchViews.
        strong: As for BatchViews.
        num_ops: As for BatchViews.
        cutout: As for BatchViews.
        crop_padding: As for BatchViews.
        fill: As for BatchViews.
        crops: As for BatchViews.

    Raises:
        ValueError: An argument is unknown or out of range.
    """

    def __call__(self, image: Tensor, names: Sequence[str], seed: int) -> dict[str, Tensor]:
        """Make views of one image.

        Args:
            image: Image uint8 [C, S, S], C = 1 or 3; it is not changed.
            names: Names of the views, in order. The n-th repeat of a name is another view, called `name_n`.
            seed: Of all random numbers of this call; no generator outside is read or changed.

        Returns:
            The views, float32 [C, S, S] in [0, 1], crops of their own side. Beside a probe, `probe_ops` [2] and
            `probe_bins` [2, 2] as for BatchViews.

        Raises:
            ValueError: The image has another shape or is not of 8 bits, or a name is unknown.
        """
        side = self.settings.image_size
        if image.dim() != 3 or image.shape[0] not in (1, 3) or image.shape[1:] != (side, side):
            msg = (
                f"Expected argument `image` to have shape [1 or 3, {side}, {side}], but got {list(image.shape)}; "
                "set `image_size` to the side of the images."
            )
            raise ValueError(msg)
        if image.dtype != torch.uint8:
            msg = f"Expected argument `image` to be uint8, but got {image.dtype}."
            raise ValueError(msg)
        pixels = image.permute(1, 2, 0).numpy()
        views = {}
        for name, number, plan in self._draw(names, 1, torch.Generator().manual_seed(seed)):
            changed = apply_plan(pixels, plan, self.settings)
            views[f"{name}{number}"] = torch.from_numpy(changed).permute(2, 0, 1).float().div_(255).contiguous()
            if name == "probe" and plan.ops is not None and plan.bins is not None:
                views[f"probe_ops{number}"] = plan.ops[0]
                views[f"probe_bins{number}"] = plan.bins[0]
        return views
