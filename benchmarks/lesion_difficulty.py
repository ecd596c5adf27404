"""How hard the generated lesions are: for a threshold, and (with --train) for a small network.

Run from the repository root:

    python benchmarks/lesion_difficulty.py           # the table, seconds
    python benchmarks/lesion_difficulty.py --train   # and four small networks, some minutes each

Measured with --train --steps 400 (32 pixels, 500 test images of each domain, average Jaccard per image), in two runs
that differed in the images' pixel noise: 500 source labels 0.89 and 0.90 on source, 0.77 and 0.77 on target; on target,
500 labels 0.83 and 0.83, 20 labels 0.64 and 0.68, and 20 labels after the 500 source labels 0.79 (first run only).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.generated import Domain, draw_lesions

Bytes = npt.NDArray[np.uint8]


def jaccard(prediction: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """Jaccard index of two masks; two empty ones agree."""
    union = np.logical_or(prediction, truth).sum()
    return float(np.logical_and(prediction, truth).sum() / union) if union else 1.0


def otsu_jaccard(images: Bytes, masks: Bytes) -> tuple[float, float]:
    """Average per-image Jaccard of Otsu's threshold on grey, taking the darker and the brighter side."""
    scores = []
    for image, mask in zip(images, masks, strict=True):
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        threshold, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        dark = grey <= threshold
        scores.append((jaccard(dark, mask > 0), jaccard(~dark, mask > 0)))
    return float(np.mean([dark for dark, _ in scores])), float(np.mean([bright for _, bright in scores]))


def contrast(images: Bytes, masks: Bytes) -> float:
    """Mean over images of |mean grey outside - mean grey inside|, on the 0..1 scale."""
    grey = images @ np.array([0.299, 0.587, 0.114]) / 255
    inside = masks > 0
    means = [abs(g[~m].mean() - g[m].mean()) for g, m in zip(grey, inside, strict=True)]
    return float(np.mean(means))


def print_table(num_images: int) -> None:
    """Print one row for each domain and size."""
    print("domain  size  Otsu (dark)  Otsu (bright)  lesion area  contrast  ms per image")
    domains: tuple[Domain, ...] = ("source", "target")
    for domain in domains:
        for size in (32, 64, 128):
            start = time.perf_counter()
            images, masks = draw_lesions(num_images, size, domain, seed=0)
            spent = (time.perf_counter() - start) / num_images * 1000
            dark, bright = otsu_jaccard(images, masks)
            print(
                f"{domain}  {size:4d}  {dark:11.3f}  {bright:13.3f}  {masks.mean():11.3f}  "
                f"{contrast(images, masks):8.3f}  {spent:12.2f}"
            )


class SmallUNet(nn.Module):
    """Three scales of two convolutions with skips: enough for 32 pixels, small enough for one core."""

    def __init__(self, width: int = 16) -> None:
        """Build.

        Args:
            width: channels at the first scale.
        """
        super().__init__()
        self.enter = self._block(3, width)
        self.middle = self._block(width, 2 * width)
        self.bottom = self._block(2 * width, 4 * width)
        self.up_middle = self._block(6 * width, 2 * width)
        self.up_enter = self._block(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    @staticmethod
    def _block(before: int, after: int) -> nn.Module:
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1), nn.GroupNorm(4, after), nn.SiLU()]
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the lesion's logit, [B, 1, H, W], for images [B, 3, H, W] in [-1, 1]."""
        first = self.enter(x)
        second = self.middle(nn.functional.max_pool2d(first, 2))
        third = self.bottom(nn.functional.max_pool2d(second, 2))
        second = self.up_middle(torch.cat([nn.functional.interpolate(third, scale_factor=2.0), second], dim=1))
        first = self.up_enter(torch.cat([nn.functional.interpolate(second, scale_factor=2.0), first], dim=1))
        logits: torch.Tensor = self.head(first)
        return logits


def _tensors(images: Bytes, masks: Bytes) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, torch.from_numpy(masks)[:, None].float()


def fit(network: nn.Module, images: Bytes, masks: Bytes, steps: int, lr: float = 2e-3) -> None:
    """Train on batches of 32 with flips and turns; the rate falls to 0 over the second half."""
    x, y = _tensors(images, masks)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        chosen = torch.randint(len(x), (32,), generator=generator)
        turns, flip = (int(torch.randint(k, (1,), generator=generator)) for k in (4, 2))
        batch, truth = (torch.rot90(t[chosen], turns, (2, 3)) for t in (x, y))
        if flip:
            batch, truth = batch.flip(3), truth.flip(3)
        loss = nn.functional.binary_cross_entropy_with_logits(network(batch), truth)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()


@torch.no_grad()
def score(network: nn.Module, images: Bytes, masks: Bytes) -> float:
    """Average per-image Jaccard at probability 0.5."""
    x, y = _tensors(images, masks)
    prediction = torch.cat([network(x[start : start + 100]) for start in range(0, len(x), 100)]) > 0
    pairs = zip(prediction.numpy(), (y > 0).numpy(), strict=True)
    return float(np.mean([jaccard(guess, truth) for guess, truth in pairs]))


def print_training(steps: int, size: int, seed: int) -> None:
    """Print the test Jaccard of scratch and fine-tuned networks."""
    source = draw_lesions(1000, size, "source", seed=seed)
    target = draw_lesions(1000, size, "target", seed=seed)
    held = {"source": (source[0][500:], source[1][500:]), "target": (target[0][500:], target[1][500:])}
    networks: dict[str, nn.Module] = {}
    plan: Sequence[tuple[str, Domain, int, str | None]] = (
        ("500 source", "source", 500, None),
        ("500 target", "target", 500, None),
        ("20 target", "target", 20, None),
        ("500 source, then 20 target", "target", 20, "500 source"),
    )
    print(f"\ntrained on ({size} px)            steps  Jaccard source  Jaccard target  seconds")
    for name, domain, count, init in plan:
        torch.manual_seed(seed)
        network = SmallUNet()
        if init is not None:
            network.load_state_dict(networks[init].state_dict())
        images, masks = source if domain == "source" else target
        start = time.perf_counter()
        done, lr = (steps, 2e-3) if init is None else (steps // 4, 5e-4)
        fit(network, images[:count], masks[:count], done, lr)
        spent = time.perf_counter() - start
        networks[name] = network
        scores = [score(network, *held[where]) for where in ("source", "target")]
        print(f"{name:28s}  {done:5d}  {scores[0]:14.3f}  {scores[1]:14.3f}  {spent:7.0f}", flush=True)


def main() -> None:
    """Parse the flags and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=100, help="images a row of the table")
    parser.add_argument("--train", action="store_true", help="also train small networks")
    parser.add_argument(
        "--steps", type=int, default=1000, help="training steps of each network (fine-tuning: a quarter)"
    )
    parser.add_argument("--size", type=int, default=32, help="side in pixels of the images trained on")
    parser.add_argument("--seed", type=int, default=0, help="seed of images and weights")
    arguments = parser.parse_args()
    print_table(arguments.num_images)
    if arguments.train:
        print_training(arguments.steps, arguments.size, arguments.seed)


if __name__ == "__main__":
    main()
