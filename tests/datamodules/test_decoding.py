"""Image and mask files of every kind that people have, against arrays known beforehand."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from datamodules.segmentation.decoding import (
    DecodedImage,
    fit_mask,
    open_upright,
    read_head,
    read_image,
    read_raw_mask,
    to_class_ids,
)

GRADIENT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def colour() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def test_same_size_is_lossless(tmp_path: Path) -> None:
    Image.fromarray(colour()).save(tmp_path / "a.png")
    decoded = read_image(tmp_path / "a.png", 8)
    np.testing.assert_array_equal(decoded.pixels, colour())
    assert decoded.original_size == (8, 8)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    grey = Image.fromarray(GRADIENT)
    if mode == "RGBA":
        grey.convert("RGB").convert("RGBA").save(path)
    else:
        grey.convert(mode).save(path)
    np.testing.assert_array_equal(read_image(path, 8).pixels, np.repeat(GRADIENT[..., None], 3, axis=-1))


def test_transparent_palette_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(GRADIENT).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 8).pixels[..., 1], GRADIENT)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_stretched(tmp_path: Path, dtype: type) -> None:
    values: npt.NDArray[np.generic] = (1000 + 16 * np.arange(64).reshape(8, 8)).astype(dtype)
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = np.rint(np.arange(64).reshape(8, 8) / 63 * 255)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 8).pixels[..., 0], expected)


def test_constant_and_infinite_deep_images(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 5.0, dtype=np.float32)).save(tmp_path / "a.tif")
    assert not read_image(tmp_path / "a.tif", 4).pixels.any()
    Image.fromarray(np.full((4, 4), np.inf, dtype=np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match="not finite"):
        read_image(tmp_path / "b.tif", 4)


def test_shrinking_averages(tmp_path: Path) -> None:
    # Without antialiasing a checkerboard of single pixels would come out black or white.
    board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    assert np.abs(read_image(tmp_path / "a.png", 8).pixels.astype(float) - 127.5).max() < 16


def test_jpeg_is_drafted_but_remembers_its_size(tmp_path: Path) -> None:
    smooth = np.tile(np.linspace(0, 255, 640).astype(np.uint8), (480, 1))
    Image.fromarray(smooth).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    decoded = read_image(tmp_path / "a.jpg", 16)
    assert decoded.original_size == (480, 640)
    np.testing.assert_allclose(decoded.pixels[..., 0], np.tile(np.arange(16) * 16 + 7.5, (16, 1)), atol=3)


# EXIF 2.32, tag 0x0112: what row 0 and column 0 of the stored pixels are in the upright picture.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def tag(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(colour()).save(path, exif=tag(orientation), lossless=True)
    np.testing.assert_array_equal(read_image(path, 8).pixels, UPRIGHT[orientation](colour()))
    assert read_head(path).orientation == orientation


@pytest.mark.parametrize("kind", ["L.png", "P.png", "1.png", "I;16.png", "L.tif", "P.tif", "1.tif", "L.webp"])
@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
def test_mask_with_its_own_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    mode, suffix = kind.split(".")
    stored: npt.NDArray[np.uint8] = np.zeros((6, 8), np.uint8)
    stored[0, :3] = 1
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(stored.astype(np.uint16)) if mode == "I;16" else Image.fromarray(stored)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 255, 255])
    elif mode == "1":
        image = Image.fromarray(stored > 0)
    image.save(path, exif=tag(orientation), lossless=True)
    expected = UPRIGHT[orientation](stored[..., None])[..., 0]
    np.testing.assert_array_equal(read_raw_mask(path) > 0, expected > 0)
    assert read_head(path).size == expected.shape
    with open_upright(path) as upright:
        assert np.asarray(upright).shape[:2] == expected.shape


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_turned_image_and_mask_that_says_nothing(orientation: int) -> None:
    square = DecodedImage(np.zeros((8, 8, 3), np.uint8), (8, 8), orientation)
    message = rf"ambiguous: image has EXIF orientation {orientation} and the mask none; save the image upright"
    with pytest.raises(ValueError, match=message):
        fit_mask(np.zeros((8, 8), np.uint8), square, 8, size_may_differ=False)
    with pytest.raises(ValueError, match=message):
        fit_mask(np.zeros((4, 4), np.uint8), square, 8, size_may_differ=True)
    assert fit_mask(np.ones((8, 8), np.uint8), square, 8, size_may_differ=False, is_upright=True).all()
    oblong = DecodedImage(np.zeros((8, 8, 3), np.uint8), (4, 8), orientation)
    with pytest.raises(ValueError, match=r"size mismatch: image 8x4, mask 5x5"):
        fit_mask(np.zeros((5, 5), np.uint8), oblong, 8, size_may_differ=False)


def test_mask_of_the_stored_pixels_turns_with_its_image(tmp_path: Path) -> None:
    stored = np.zeros((6, 8), np.uint8)
    stored[0, :3] = 1
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.repeat(stored[..., None] * 255, 3, axis=-1)).save(tmp_path / "a.png", exif=exif)
    decoded = read_image(tmp_path / "a.png", 24)
    assert decoded.original_size == read_head(tmp_path / "a.png").size == (8, 6)
    turned = fit_mask(stored, decoded, 24, size_may_differ=False)
    upright = fit_mask(np.ascontiguousarray(np.rot90(stored, -1)), decoded, 24, size_may_differ=False)
    np.testing.assert_array_equal(turned, upright)
    assert ((decoded.pixels[..., 0] > 127) == turned).mean() > 0.95


def test_size_mismatch_is_named() -> None:
    image = DecodedImage(np.zeros((4, 4, 3), np.uint8), (10, 20), 1)
    with pytest.raises(ValueError, match="image 20x10, mask 21x10"):
        fit_mask(np.zeros((10, 21), np.uint8), image, 4, size_may_differ=False)
    assert fit_mask(np.ones((5, 7), np.uint8), image, 4, size_may_differ=True).all()


def test_masks_are_never_interpolated() -> None:
    image = DecodedImage(np.zeros((5, 5, 3), np.uint8), (16, 16), 1)
    mask = np.random.default_rng(0).choice(np.array([0, 7, 255], np.uint8), (16, 16))
    assert set(np.unique(fit_mask(mask, image, 5, size_may_differ=False))) <= {0, 7, 255}


def test_mask_modes(tmp_path: Path) -> None:
    ids = np.array([[0, 1], [2, 1]], dtype=np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(np.repeat(ids[..., None], 3, axis=-1)).save(tmp_path / "rgb.png")
    Image.fromarray(ids).convert("LA").save(tmp_path / "alpha.png")
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("palette", "rgb", "alpha", "deep"):
        np.testing.assert_array_equal(read_raw_mask(tmp_path / f"{name}.png"), ids)
    Image.fromarray(ids > 0).save(tmp_path / "bit.bmp")
    np.testing.assert_array_equal(read_raw_mask(tmp_path / "bit.bmp"), ids > 0)


def test_colour_mask_is_refused(tmp_path: Path) -> None:
    Image.fromarray(colour()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="colour picture"):
        read_raw_mask(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("values", "num_classes", "expected"),
    [
        ([0, 255], 2, [0, 1]),
        ([0, 1], 2, [0, 1]),
        ([255, 255], 2, [1, 1]),
        ([0, 0], 2, [0, 0]),
        ([0, 18, 255], 19, [0, 18, 255]),
        ([0, 2], 3, [0, 2]),
    ],
)
def test_class_ids(values: list[int], num_classes: int, expected: list[int]) -> None:
    ids = to_class_ids(np.array([values]), num_classes)
    assert ids.dtype == np.uint8
    assert ids.tolist() == [expected]


@pytest.mark.parametrize(
    ("values", "num_classes", "message"),
    [
        ([0, 1, 255], 2, r"out of range: 255 \(expected \{0, 1\} or \{0, 255\}\)"),
        ([0, 128, 255], 2, "out of range: 128, 255"),
        ([0, 3, 254], 3, r"out of range: 3, 254 \(expected 0 to 2, or 255 for ignore\)"),
        ([0, 300], 3, "out of range: 300"),
        ([-1, 0], 3, "out of range: -1"),
        (list(range(40)), 3, r"3, 4, 5, 6, 7, 8, 9, 10, \.\.\."),
    ],
)
def test_wrong_ids_are_named(values: list[int], num_classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_class_ids(np.array([values]), num_classes)


def test_empty_mask() -> None:
    with pytest.raises(ValueError, match="is empty"):
        to_class_ids(np.zeros((0, 4), np.int64), 2)
