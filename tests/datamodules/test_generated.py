"""Generated lesions: what an image depends on, how hard a threshold finds it, and the datamodule."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from jsonargparse import ArgumentParser

from datamodules import lesions
from datamodules.generated import Domain, GeneratedLesionsDataModule, draw_lesions
from datamodules.segmentation.base import SegmentationDataModule
from datamodules.segmentation.dataset import SegmentationDataset

DOMAINS: tuple[Domain, ...] = ("source", "target")


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_image_depends_on_its_index_only(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    images, masks = draw_lesions(9, 16, domain, seed=3)
    few, few_masks = draw_lesions(4, 16, domain, seed=3)
    assert np.array_equal(images[:4], few)
    assert np.array_equal(masks[:4], few_masks)
    monkeypatch.setattr(lesions, "CHUNK_PIXELS", 1)  # one image a chunk
    alone, alone_masks = draw_lesions(9, 16, domain, seed=3)
    assert np.array_equal(images, alone)
    assert np.array_equal(masks, alone_masks)


def test_seed_domain_and_index_each_change_the_image() -> None:
    images = [draw_lesions(2, 16, domain, seed)[0] for domain in DOMAINS for seed in (0, 1)]
    flat = [image.tobytes() for pair in images for image in pair]
    assert len(set(flat)) == 8


def test_types_and_ranges() -> None:
    images, masks = draw_lesions(20, 24, "target", seed=0)
    assert images.shape == (20, 24, 24, 3)
    assert masks.shape == (20, 24, 24)
    assert images.dtype == masks.dtype == np.dtype(np.uint8)
    assert set(np.unique(masks)) == {0, 1}
    areas = masks.mean(axis=(1, 2))
    assert areas.min() > 0.01
    assert areas.max() < 0.7


def test_sizes_show_the_same_lesion() -> None:
    _, small = draw_lesions(20, 32, "source", seed=1)
    _, large = draw_lesions(20, 128, "source", seed=1)
    shares = large.reshape(20, 32, 4, 32, 4).mean(axis=(2, 4))
    # A pixel at 32 covers 16 at 128: where those agree, it must agree with them.
    certain = (shares == 0) | (shares == 1)
    assert (small == shares)[certain].mean() > 0.995
    assert certain.mean() > 0.85


def _otsu(grey: npt.NDArray[np.float64]) -> float:
    """Otsu's threshold by its definition: the split of the values with the largest variance between the two sides."""
    levels = np.linspace(grey.min(), grey.max(), 257)
    best, threshold = -1.0, 0.0
    for low, high in pairwise(levels[:-1]):
        level = (low + high) / 2
        dark = grey <= level
        if dark.all() or not dark.any():
            continue
        between = dark.mean() * (1 - dark.mean()) * (grey[dark].mean() - grey[~dark].mean()) ** 2
        if between > best:
            best, threshold = between, level
    return threshold


@pytest.mark.parametrize(("size", "count"), [(32, 60), (128, 12)])
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_threshold_does_not_find_the_lesion(domain: Domain, size: int, count: int) -> None:
    images, masks = draw_lesions(count, size, domain, seed=0)
    scores: list[list[float]] = [[], []]
    for image, mask in zip(images, masks > 0, strict=True):
        grey = image @ np.array([0.2125, 0.7154, 0.0721])
        dark = grey <= _otsu(grey)
        for score, side in zip(scores, (dark, ~dark), strict=True):
            score.append((side & mask).sum() / (side | mask).sum())
    assert max(np.mean(scores, axis=1)) < 0.6


def test_lesions_can_be_seen() -> None:
    """Colours differ between both sides of the border."""
    for domain in DOMAINS:
        images, masks = draw_lesions(60, 64, domain, seed=2)
        steps = []
        for image, mask in zip(images.astype(float), masks > 0, strict=True):
            near = np.zeros_like(mask)
            near[4:-4, 4:-4] = True
            inside = mask & near & ~np.roll(mask, 6, axis=0)
            outside = ~mask & near & np.roll(mask, -6, axis=0)
            steps.append(np.abs(image[inside].mean(axis=0) - image[outside].mean(axis=0)).max())
        assert np.median(steps) > 15  # of 255


def test_domains_differ_in_colour_and_size() -> None:
    source, source_masks = draw_lesions(80, 32, "source", seed=0)
    target, target_masks = draw_lesions(80, 32, "target", seed=0)

    def redness(images: npt.NDArray[np.uint8], masks: npt.NDArray[np.uint8]) -> float:
        skin = images[masks == 0].astype(float)
        return float(skin[:, 0].mean() / skin[:, 1].mean())

    assert redness(target, target_masks) > redness(source, source_masks) + 0.05
    assert target_masks.mean() > 1.2 * source_masks.mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 32, "source", 0), "`num_images` to be at least 1, but got 0"),
        ((1, 4, "source", 0), "`image_size` to be at least 8, but got 4"),
        ((1, 32, "source", -1), "`seed` to be at least 0, but got -1"),
        ((1, 32, "elsewhere", 0), '`domain` to be "source" or "target", but got \'elsewhere\''),
    ],
)
def test_arguments(arguments: tuple[int, int, Domain, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_lesions(*arguments)


def test_a_change_that_needs_more_numbers_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesions, "TABLE", 100)
    with pytest.raises(RuntimeError, match="TABLE holds 100 numbers"):
        draw_lesions(1, 16, "source", 0)


def test_datamodule_splits_and_batches() -> None:
    module = GeneratedLesionsDataModule(
        domain="target", num_images=50, image_size=16, batch_size=8, num_labels=20, val_share=0.2
    )
    module.setup("fit")
    assert module.counts == {"train": 16, "val": 4, "test": 30}
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].dtype == torch.float32
    assert batch["image"].shape == (8, 3, 16, 16)
    assert 0 <= float(batch["image"].min()) <= float(batch["image"].max()) <= 1
    assert batch["mask"].dtype == torch.int64
    dataset = module.test_dataloader().dataset
    assert isinstance(dataset, SegmentationDataset)
    images, masks = draw_lesions(50, 16, "target", seed=0)
    for position in (0, 7, 29):
        number = int(dataset.keys[position].removeprefix("target_0/").removesuffix(".png"))
        sample = dataset[position]
        expected = torch.from_numpy(images[number]).permute(2, 0, 1) / 255
        assert torch.allclose(sample["image"], expected)
        assert torch.equal(sample["mask"], torch.from_numpy(masks[number]).long())


def test_datamodule_touches_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEWLIGHT_DATA", raising=False)
    module = GeneratedLesionsDataModule(num_images=12, image_size=16)
    module.setup("fit")
    next(iter(module.train_dataloader()))
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_tells_domains_and_seeds_apart() -> None:
    prints = set()
    for domain in DOMAINS:
        for seed in (0, 1):
            module = GeneratedLesionsDataModule(domain=domain, num_images=12, images_seed=seed, image_size=16)
            module.setup("fit")
            prints.add(module.fingerprint)
    assert len(prints) == 4


def test_datamodule_names_its_own_argument() -> None:
    with pytest.raises(ValueError, match="`images_seed` to be at least 0, but got -2"):
        GeneratedLesionsDataModule(images_seed=-2)


def test_command_line_needs_no_root() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(SegmentationDataModule, "data")
    name = "datamodules.generated.GeneratedLesionsDataModule"
    config = parser.parse_args([f"--data={name}", "--data.domain=target", "--data.num_labels=20"])
    assert "root" not in config.data.init_args
    module = GeneratedLesionsDataModule(**config.data.init_args.as_dict())
    assert (module.domain, module.num_labels, module.num_classes) == ("target", 20, 2)
