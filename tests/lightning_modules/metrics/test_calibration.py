"""The calibration error against torchmetrics, a loop over pixels and two processes."""

import copy
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torchmetrics import ClasswiseWrapper, Metric, MetricCollection
from torchmetrics.classification import MulticlassCalibrationError

from lightning_modules.metrics import CalibrationError, MeanJaccard, PooledJaccard

IGNORE = 255


def random_images(classes: int, images: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Over-confident probabilities, ignored pixels and, as the last but one, an image of padding."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = (2 * torch.randn(images, classes, 6, 5, generator=generator)).softmax(1)
    mask = torch.where(
        torch.rand(images, 6, 5, generator=generator) < 0.5,
        probabilities.argmax(1),
        torch.randint(classes, (images, 6, 5), generator=generator),
    )
    mask[torch.rand(mask.shape, generator=generator) < 0.2] = IGNORE
    mask[-2] = IGNORE
    return probabilities, mask


def bins_by_loop(probabilities: Tensor, mask: Tensor, num_bins: int) -> list[tuple[float, float, int]]:
    """Sum of confidences, of hits and number of pixels of each bin."""
    bins = [(0.0, 0.0, 0)] * num_bins
    for image, labels in zip(probabilities, mask, strict=True):
        for pixel, label in zip(image.flatten(1).T.tolist(), labels.flatten().tolist(), strict=True):
            if label != IGNORE:
                confidence = max(pixel)
                number = next(m for m in range(num_bins) if confidence <= (m + 1) / num_bins + 1e-9)
                total, hits, count = bins[number]
                bins[number] = (total + confidence, hits + (pixel.index(confidence) == label), count + 1)
    return bins


def ece_of(bins: list[tuple[float, float, int]]) -> float:
    n = sum(count for _, _, count in bins)
    return sum(count / n * abs(hits / count - total / count) for total, hits, count in bins if count)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_torchmetrics_agrees(classes: int, num_bins: int) -> None:
    probabilities, mask = random_images(classes, seed=num_bins)
    theirs = MulticlassCalibrationError(classes, n_bins=num_bins, norm="l1", ignore_index=IGNORE)
    found = CalibrationError(classes, num_bins)(probabilities, mask)
    assert found.item() == pytest.approx(theirs(probabilities, mask).item(), abs=1e-6)
    assert 0.01 < found.item() < 1


@pytest.mark.parametrize("classes", [2, 4])
def test_a_loop_over_pixels_agrees(classes: int) -> None:
    probabilities, mask = random_images(classes, seed=5)
    metric = CalibrationError(classes, num_bins=12)
    metric.update(probabilities, mask)
    expected = bins_by_loop(probabilities, mask, 12)
    confidence, accuracy, count = metric.bins()
    assert count.tolist() == [n for _, _, n in expected]
    assert count.dtype == torch.int64
    assert count.sum() == (mask != IGNORE).sum()
    for m, (total, hits, n) in enumerate(expected):
        if n:
            assert confidence[m].item() == pytest.approx(total / n, abs=1e-6)
            assert accuracy[m].item() == pytest.approx(hits / n, abs=1e-6)
        else:
            assert confidence[m].isnan()
            assert accuracy[m].isnan()
    assert metric.compute().item() == pytest.approx(ece_of(expected), abs=1e-6)
    # No class is most probable with less than 1 / K.
    assert not count[: 12 // classes - 1].any()


def two_classes(foreground: list[float]) -> Tensor:
    p = torch.tensor(foreground).view(1, 1, 1, -1)
    return torch.cat([1 - p, p], 1)


def test_known_errors() -> None:
    mask = torch.tensor([1, 1, 1, 0]).view(1, 1, 4)
    # Says 0.75, is right three times of four.
    assert CalibrationError(2)(two_classes([0.75] * 4), mask) == 0
    assert CalibrationError(2)(two_classes([1.0] * 4), mask) == 0.25
    assert CalibrationError(2)(two_classes([0.0] * 4), mask) == 0.75
    # Two pixels at 0.75 that are right, two at 1 of which one is: (0.25 + 0.5) / 2.
    assert CalibrationError(2)(two_classes([0.75, 0.75, 1.0, 1.0]), mask) == 0.375


def test_edges_belong_to_the_bin_below() -> None:
    foreground = [0.6, 0.8, 1.0, 0.6000001]
    metric = CalibrationError(2, num_bins=5)
    metric.update(two_classes(foreground), torch.ones(1, 1, 4, dtype=torch.long))
    assert metric.bins()[2].tolist() == [0, 0, 1, 2, 1]
    for num_bins in (3, 7, 15):
        k = torch.arange(-(-num_bins // 2), num_bins + 1)  # a class that is predicted has at least 1 / 2
        metric = CalibrationError(2, num_bins)
        metric.update(two_classes((k / num_bins).tolist()), torch.ones(1, 1, len(k), dtype=torch.long))
        assert metric.bins()[2].tolist() == [int(m + 1 in k) for m in range(num_bins)]


def test_batches_and_order_do_not_change_a_bit() -> None:
    probabilities, mask = random_images(3, images=9)
    metric = CalibrationError(3)
    whole = metric(probabilities, mask)
    metric.reset()
    for part in (slice(4, 9), slice(0, 1), slice(1, 4)):
        metric(probabilities[part].flip(0), mask[part].flip(0))
    assert torch.equal(metric.compute(), whole)
    metric.reset()
    assert not metric.count.any()
    assert metric.bins()[0].isnan().all()


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="a method of later versions")
def test_two_instances_merge_by_their_sums() -> None:
    probabilities, mask = random_images(3)
    whole, first, second = CalibrationError(3), CalibrationError(3), CalibrationError(3)
    whole.update(probabilities, mask)
    first.update(probabilities[:2], mask[:2])
    second.update(probabilities[2:], mask[2:])
    first.merge_state(second)
    assert torch.equal(first.compute(), whole.compute())
    for mine, theirs in zip(first.bins(), whole.bins(), strict=True):
        assert torch.equal(mine.nan_to_num(-1), theirs.nan_to_num(-1))


def test_padding_alone_is_nan_and_adds_nothing() -> None:
    probabilities, mask = random_images(2)
    metric = CalibrationError(2)
    assert math.isnan(metric(probabilities[-2:-1], mask[-2:-1]))
    metric.update(probabilities[:1], mask[:1])
    assert torch.equal(metric.compute(), CalibrationError(2)(probabilities[:1], mask[:1]))


def test_half_precision_copies_and_pickles() -> None:
    probabilities, mask = random_images(7)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        metric = CalibrationError(7)
        metric.update(probabilities.to(dtype), mask.to(torch.uint8))
        expected = ece_of(bins_by_loop(probabilities.to(dtype).double(), mask, 15))
        assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
        assert metric.compute().dtype == torch.float32
        for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.half()):
            assert torch.equal(twin.compute(), metric.compute())


def test_as_a_member_of_a_collection() -> None:
    probabilities, mask = random_images(3)
    collection = MetricCollection(
        {
            "jaccard": MeanJaccard(3),
            "ece": CalibrationError(3),
            "iou": ClasswiseWrapper(PooledJaccard(3, "none"), prefix="iou_"),
            "other": CalibrationError(3),
        },
        prefix="val_",
    )
    for part in (slice(0, 3), slice(3, 6)):  # the second update is where compute groups start to share states
        collection.update(probabilities[part], mask[part])
    values = collection.compute()
    assert values["val_ece"].item() == pytest.approx(ece_of(bins_by_loop(probabilities, mask, 15)), abs=1e-6)
    assert values["val_jaccard"] == MeanJaccard(3)(probabilities, mask)
    member = collection["other"]
    assert isinstance(member, CalibrationError)
    assert member.bins()[2].sum() == (mask != IGNORE).sum()


def _one_of_two(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    probabilities, mask = random_images(3)
    metric = CalibrationError(3)
    # Four images and two; the second process has the image of padding.
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    metric.update(probabilities[mine], mask[mine])
    before = metric.bins()
    own = metric.count.clone()
    after = [metric.compute(), *metric.bins()]
    torch.save([own, *before, *after], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    # Forked, as nothing here touches a GPU: two processes that import torch anew take seconds.
    start_processes(_one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call] # torch has none
    probabilities, mask = random_images(3)
    whole = CalibrationError(3)
    whole.update(probabilities, mask)
    labelled = 0
    for rank in range(2):
        own, *found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for mine, expected in zip(found, [*whole.bins(), whole.compute(), *whole.bins()], strict=True):
            assert torch.equal(mine.nan_to_num(-1), expected.nan_to_num(-1))
        labelled += int(own.sum())
    # Asking for the bins of all leaves each process with its own.
    assert labelled == (mask != IGNORE).sum()


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"`num_classes` to be at least 2 but got 1\. Count the background"):
        CalibrationError(1)
    with pytest.raises(ValueError, match=r"`num_bins` to be at least 1 but got 0\. The paper has 15"):
        CalibrationError(2, num_bins=0)
    with pytest.raises(ValueError, match="`ignore_index` to be no class id"):
        CalibrationError(3, ignore_index=2)


def test_wrong_inputs() -> None:
    probabilities, mask = random_images(2, images=2)
    mask[:] = 0
    metric = CalibrationError(2)
    nan = probabilities.clone()
    nan[0, 0, 0, 0] = math.nan
    wrong = [
        (mask, mask, r"`probabilities` to be floating \[B, 2, H, W\] .* \(2, 6, 5\)\. Class ids do not tell"),
        (probabilities[:, :1], mask, "fix `num_classes`"),
        (probabilities.long(), mask, "but got torch.int64"),
        (probabilities, mask[:1], r"agree in batch and image size but got shapes \(2, 2, 6, 5\) and \(1, 6, 5\)"),
        (probabilities, mask[:, None], "Resize the masks with nearest"),
        (probabilities, mask.float(), r"`mask` to hold integer class ids but got torch.float32"),
        (probabilities, mask.bool(), r"but got torch.bool\. Convert it with `.long\(\)`"),
        (probabilities * 3, mask, r"`probabilities` to be non-negative and to sum to 1 .* to 3\. Pass logits"),
        (probabilities - 0.002, mask, r"with sums from 0\.996 to 0\.996"),
        (torch.stack([probabilities[:, 0] + 2, probabilities[:, 1] - 2], 1), mask, "non-negative"),
        (nan, mask, "NaN means that training diverged"),
        (probabilities, mask + 2, r"class ids in 0..1 but got \[2\]\. Mark pixels without a label as 255"),
        (probabilities, mask - 1, r"but got \[-1\]"),
    ]
    for p, m, message in wrong:
        with pytest.raises(ValueError, match=message):
            metric.update(p, m)
    assert not metric.count.any()
    metric.update(probabilities * 1.0005, mask)  # rounding
    assert metric.bins()[0].nan_to_num().max() <= 1
