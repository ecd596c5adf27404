"""The mask metrics against the test vector, a loop over images, smp and two processes."""

import copy
import math
import os
import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torchmetrics import ClasswiseWrapper, Metric, MetricCollection

from lightning_modules.metrics import MeanDice, MeanJaccard, PooledJaccard

Ids = npt.NDArray[np.int64]
IGNORE = 255


def vector() -> tuple[Tensor, Tensor]:
    """Two images of 4 x 4 whose scores are known fractions."""
    target, preds = torch.zeros(2, 4, 4, dtype=torch.long), torch.zeros(2, 4, 4, dtype=torch.long)
    target[0, 0] = 1
    preds[0, :2, :2] = 1
    target[1, :2] = preds[1, :2] = 1
    return preds, target


def random_masks(classes: int, images: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictions that are partly right, ignored pixels, one image without foreground and one of padding."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (images, 6, 5), generator=generator)
    preds = torch.where(
        torch.rand(target.shape, generator=generator) < 0.6,
        target,
        torch.randint(classes, target.shape, generator=generator),
    )
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORE
    target[1][target[1] != IGNORE] = 0
    preds[1] = 0
    target[3] = IGNORE
    return preds, target


def loop_over_images(
    preds: Ids, target: Ids, classes: int, kind: Literal["jaccard", "dice"], threshold: float = 0.0
) -> float:
    """The per-image scores, one pixel set at a time."""
    scores = []
    for p_image, g_image in zip(preds, target, strict=True):
        kept = [(p, g) for p, g in zip(p_image.ravel(), g_image.ravel(), strict=True) if g != IGNORE]
        if not kept:
            continue
        per_class = []
        for k in range(1, classes):
            both = sum(p == k and g == k for p, g in kept)
            either = sum(p == k or g == k for p, g in kept)
            total = sum(p == k for p, _ in kept) + sum(g == k for _, g in kept)
            if either:
                per_class.append(both / either if kind == "jaccard" else 2 * both / total)
        score = sum(per_class) / len(per_class) if per_class else 1.0
        scores.append(score if score >= threshold else 0.0)
    return float(np.mean(scores))


def pooled_by_loop(preds: Ids, target: Ids, classes: int) -> list[float]:
    kept = target != IGNORE
    result = []
    for k in range(classes):
        both = ((preds == k) & (target == k) & kept).sum()
        either = (((preds == k) | (target == k)) & kept).sum()
        result.append(float(both / (either + 1e-8)))
    return result


def test_vector_of_the_specification() -> None:
    preds, target = vector()
    assert MeanJaccard(2)(preds, target).item() == pytest.approx(2 / 3)
    assert MeanJaccard(2, threshold=0.65)(preds, target).item() == pytest.approx(0.5)
    classes = PooledJaccard(2, average="none")(preds, target)
    assert classes.tolist() == pytest.approx([18 / 22, 10 / 14])
    assert PooledJaccard(2)(preds, target).item() == pytest.approx(0.766234, abs=1e-6)
    # Dice = 2 J / (1 + J) of each image: 1/2 and 1.
    assert MeanDice(2)(preds, target).item() == pytest.approx(0.75)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_loop_over_images_agrees(classes: int, seed: int) -> None:
    preds, target = random_masks(classes, seed=seed)
    p, g = preds.numpy(), target.numpy()
    assert MeanJaccard(classes)(preds, target).item() == pytest.approx(
        loop_over_images(p, g, classes, "jaccard"), abs=1e-6
    )
    assert MeanJaccard(classes, 0.5)(preds, target).item() == pytest.approx(
        loop_over_images(p, g, classes, "jaccard", 0.5), abs=1e-6
    )
    assert MeanDice(classes)(preds, target).item() == pytest.approx(loop_over_images(p, g, classes, "dice"), abs=1e-6)
    pooled = pooled_by_loop(p, g, classes)
    assert PooledJaccard(classes, "none")(preds, target).tolist() == pytest.approx(pooled, abs=1e-6)
    assert PooledJaccard(classes)(preds, target).item() == pytest.approx(float(np.mean(pooled)), abs=1e-6)


def test_smp_agrees() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch.metrics")
    preds, target = random_masks(2)
    target[target == IGNORE] = 0
    counts = smp.get_stats(preds[:, None], target[:, None], mode="binary")
    expected = smp.iou_score(*counts, reduction="micro-imagewise", zero_division=1.0)
    assert MeanJaccard(2)(preds, target).item() == pytest.approx(expected.item(), abs=1e-6)
    preds, target = random_masks(4)
    target[target == IGNORE] = 0
    tp, fp, fn, tn = smp.get_stats(preds, target, mode="multiclass", num_classes=5)
    # Class 4 never occurs: it counts as 0.
    expected = smp.iou_score(tp, fp, fn, tn, reduction="macro", zero_division=0)
    assert PooledJaccard(5)(preds, target).item() == pytest.approx(expected.item(), abs=1e-6)


def test_scores_and_class_ids_are_the_same_thing() -> None:
    preds, target = random_masks(4)
    scores = torch.nn.functional.one_hot(preds, 4).movedim(-1, 1).float() + 0.1
    for metric in (MeanJaccard(4), MeanDice(4), PooledJaccard(4)):
        assert metric(scores.bfloat16(), target) == metric(preds.to(torch.uint8), target)


def test_empty_masks_padding_and_absent_classes() -> None:
    empty = torch.zeros(1, 3, 3, dtype=torch.long)
    padding = torch.full_like(empty, IGNORE)
    some = empty.clone()
    some[0, 0, 0] = 1
    for metric in (MeanJaccard(2), MeanDice(2)):
        assert metric(empty, empty) == 1
        assert metric(some, empty) == 0
        assert metric(empty, some) == 0
        assert math.isnan(metric(empty, padding))
        metric.reset()
        metric.update(torch.cat([empty, some, some]), torch.cat([empty, empty, padding]))
        assert metric.compute() == 0.5
    assert PooledJaccard(3, average="none")(some, some).tolist() == [1, 1, 0]


def test_batches_do_not_matter_and_reset_forgets() -> None:
    preds, target = random_masks(3, images=9)
    metrics: list[Metric] = [MeanJaccard(3), MeanDice(3), PooledJaccard(3)]
    for metric in metrics:
        whole = metric(preds, target)
        metric.reset()
        for part in (slice(0, 1), slice(1, 4), slice(4, 9)):
            metric(preds[part], target[part])  # forward, as `self.log(metric)` uses it
        assert torch.allclose(metric.compute(), whole)
        metric.reset()
        metric.update(preds[:2], target[:2])
        fresh = metric.clone()
        fresh.reset()
        assert torch.equal(metric.compute(), fresh(preds[:2], target[:2]))


def test_copies_and_pickles_keep_the_sums() -> None:
    preds, target = random_masks(2)
    for metric in (MeanJaccard(2, 0.65), MeanDice(2), PooledJaccard(2, "none")):
        metric.update(preds, target)
        for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
            assert torch.equal(twin.compute(), metric.compute())


def test_class_names_in_a_collection() -> None:
    """The way a module logs them: one dict of scalars, with prefixes."""
    collection = MetricCollection(
        {
            "jaccard": MeanJaccard(2),
            "miou": PooledJaccard(2),
            "iou": ClasswiseWrapper(PooledJaccard(2, "none"), labels=["skin", "lesion"], prefix="iou_"),
        }
    )
    val, test = collection.clone(prefix="val_"), collection.clone(prefix="test_")
    for metrics in (val, test):
        for _ in range(2):  # the second update is where compute groups start to share states
            metrics.update(*vector())
    values = {name: value.item() for name, value in val.compute().items()}
    expected = {
        "val_jaccard": 2 / 3,
        "val_miou": 0.766234,
        "val_iou_skin": 18 / 22,
        "val_iou_lesion": 10 / 14,
    }
    assert values == pytest.approx(expected, abs=1e-6)
    assert set(test.compute()) == {name.replace("val_", "test_") for name in expected}
    val.reset()
    val.update(*vector())
    assert val.compute()["val_iou_lesion"].item() == pytest.approx(10 / 14)


def _one_of_two(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    preds, target = random_masks(3, images=6)
    results = []
    for metric in (MeanJaccard(3), MeanDice(3), PooledJaccard(3, "none")):
        # The second process has the image of padding (3) among its own.
        metric.update(preds[rank::2], target[rank::2])
        results.append(metric.compute())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call] # torch has none
    preds, target = random_masks(3, images=6)
    whole = [metric(preds, target) for metric in (MeanJaccard(3), MeanDice(3), PooledJaccard(3, "none"))]
    for rank in range(2):
        parts = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for part, expected in zip(parts, whole, strict=True):
            assert torch.allclose(part, expected, atol=1e-6)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"`num_classes` to be at least 2 but got 1\. Count the background"):
        MeanJaccard(1)
    with pytest.raises(ValueError, match="`ignore_index` to be no class id"):
        MeanDice(3, ignore_index=2)
    with pytest.raises(ValueError, match=r"`threshold` to lie in \[0, 1\] but got 65"):
        MeanJaccard(2, threshold=65)
    with pytest.raises(ValueError, match="`average` to be 'macro' or 'none' but got 'micro'"):
        PooledJaccard(2, average="micro")  # type: ignore[arg-type] # on purpose


def test_wrong_inputs() -> None:
    ids = torch.zeros(2, 4, 4, dtype=torch.long)
    metric = MeanJaccard(2)
    wrong = [
        (ids[0], ids[0], "Add a batch dimension"),
        (ids, ids[:, :3], "agree in batch and image size"),
        (ids, ids.float(), "`target` to hold integer class ids but got torch.float32"),
        (ids.float(), ids, "`preds` to hold integer class ids"),
        (ids.bool(), ids, r"but got torch.bool. Convert it with `.long\(\)`"),
        (torch.rand(2, 3, 4, 4), ids, "scores of 2 classes in dimension 1"),
        (ids[:, None].expand(-1, 2, -1, -1), ids, "floating scores"),
        (ids + 2, ids, r"`preds` to hold class ids in 0..1 but got \[2\]"),
        (
            ids,
            ids - 1,
            r"`target` to hold class ids in 0..1 but got \[-1\]. Mark pixels without a label as 255",
        ),
        (ids, ids + 254, r"but got \[254\]"),
    ]
    for preds, target, message in wrong:
        with pytest.raises(ValueError, match=message):
            metric.update(preds, target)
    assert not metric.count
