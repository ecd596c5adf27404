"""Outlines and contact sheets."""

from typing import Any

import numpy as np
import torch

from callbacks.drawing import (
    captioned,
    class_colors,
    color_bar,
    contours,
    draw_contours,
    enlarge,
    heat,
    shade,
    sheet,
    tint,
    to_pixels,
    with_lines_below,
)


def test_contours_are_what_erosion_removes() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(12, 10, generator=generator) < 0.8).long()
    drawn = contours(mask)
    for y in range(12):
        for x in range(10):
            window = [
                mask[v, u].item() if 0 <= v < 12 and 0 <= u < 10 else 0
                for v in range(y - 1, y + 2)
                for u in range(x - 1, x + 2)
            ]
            assert drawn[y, x].item() == (mask[y, x].item() == 1 and not all(window))


def test_contours_separate_classes_and_have_a_width() -> None:
    labels = torch.zeros(9, 12, dtype=torch.long)
    labels[1:8, 1:6], labels[1:8, 6:11] = 1, 2
    assert contours(labels)[4].nonzero().flatten().tolist() == [1, 5, 6, 10]
    assert contours(labels, 2)[4].nonzero().flatten().tolist() == [1, 2, 4, 5, 6, 7, 9, 10]
    assert not contours(torch.zeros(5, 5, dtype=torch.long)).any()


def test_drawing_leaves_the_rest_and_darkens_what_has_no_label() -> None:
    image = np.full((6, 6, 3), 90, np.uint8)
    labels = torch.zeros(6, 6, dtype=torch.long)
    labels[1:4, 1:4], labels[5] = 1, 255
    drawn = draw_contours(image, labels, (1, 2, 3), thickness=1)
    assert (image == 90).all()
    assert drawn[1, 1].tolist() == drawn[3, 2].tolist() == [1, 2, 3]
    assert drawn[2, 2].tolist() == drawn[0, 0].tolist() == [90] * 3
    assert drawn[5, 3].tolist() == [30] * 3


def test_pixels_are_repeated_until_the_picture_is_large_enough() -> None:
    x = torch.tensor([[[0.0, 1.0, 2.0], [-1.0, 0.5, float("nan")]]])
    pixels, scale = to_pixels(x, least=7)
    assert scale == 3
    assert pixels.shape == (6, 9, 3)
    assert pixels[::3, ::3, 2].tolist() == [[0, 255, 255], [0, 128, 0]]
    assert (pixels[:3, 3:6] == 255).all()
    assert to_pixels(torch.zeros(3, 8, 4), least=8)[1] == 1
    assert enlarge(torch.tensor([[1, 2]]), 2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_colors() -> None:
    for classes in (2, 3, 34):
        colors = class_colors(classes)
        assert colors[0].tolist() == [0, 0, 0]
        assert len({tuple(color) for color in colors.tolist()}) == classes
    probabilities = torch.tensor([0.25, 0.75]).view(2, 1, 1).expand(2, 4, 5)
    assert torch.equal(shade(probabilities), torch.full((3, 4, 5), 0.75))
    image = np.full((2, 2, 3), 100, np.uint8)
    labels = torch.tensor([[0, 1], [2, 255]])
    assert tint(image, labels.clamp(max=1), 2) is image
    tinted = tint(image, labels, 3)
    assert (tinted[0, 0] == 100).all()
    assert (tinted[1, 1] == 100).all()
    assert len({tuple(tinted[0, 1]), tuple(tinted[1, 0]), (100, 100, 100)}) == 3


def test_sheet_and_caption() -> None:
    cells = [[np.full((40, 60, 3), 10 * i + j, np.uint8) for j in range(3)] for i in range(2)]
    paper = sheet(["a", "b", "c"], cells)
    for i in range(2):
        for j in range(3):
            found = (paper == 10 * i + j).all(-1)
            assert found.sum() >= 40 * 60
    assert (paper[:20] == 255).any()
    written = captioned(cells[1][1], "J")
    assert (written == 255).any()
    assert (written[:20] == 11).all()
    assert (cells[1][1] == 11).all()


def test_lines_below_leave_the_image_whole() -> None:
    image = np.full((20, 60, 3), 70, np.uint8)
    written = with_lines_below(image, ["one", "a line that is much too long for it"])
    assert written.shape == (20 + 2 * 16, 60, 3)
    assert (written[:20] == 70).all()
    assert (written[20:36] == 255).any()
    assert (written[36:] == 255).any()
    assert not np.array_equal(written, with_lines_below(image, ["two", "a line that is much too long for it"]))


def lightness(color: np.ndarray[Any, Any]) -> float:
    """CIE L* of sRGB bytes, from 0 to 100."""
    linear = np.where(color / 255 <= 0.04045, color / 255 / 12.92, ((color / 255 + 0.055) / 1.055) ** 2.4)
    y = float(linear @ [0.2126, 0.7152, 0.0722])
    return float(116 * np.cbrt(y) - 16) if y > 0.008856 else 903.3 * y


def test_heat_grows_lighter_with_the_value() -> None:
    ramp = heat(torch.linspace(0, 2, 65)[None], 2.0)[0]
    steps = np.diff([lightness(color) for color in ramp])
    assert steps.min() > 0
    assert steps.max() < 4
    assert lightness(ramp[0]) < 3
    assert lightness(ramp[-1]) > 95
    # What is outside has the colour of the nearer end.
    odd = heat(torch.tensor([[-1.0, float("nan"), 2.0, 5.0, float("inf")]]), 2.0)[0]
    assert odd.tolist() == [ramp[i].tolist() for i in (0, 0, -1, -1, -1)]
    assert (heat(torch.zeros(2, 3), 0.0) == ramp[0]).all()


def test_color_bar_fits_below_a_sheet() -> None:
    paper = sheet(["a", "b"], [[np.zeros((10, 90, 3), np.uint8)] * 2])
    bar = color_bar(paper.shape[1], 0.693, "nats")
    assert bar.shape[1] == paper.shape[1]
    middle = bar[bar.shape[0] // 2, 4:-4]
    assert np.array_equal(middle, heat(torch.linspace(0, 0.693, len(middle))[None], 0.693)[0])
    words, values = bar[:24], bar[48:]
    assert (words == 255).any()
    for part in (values[:, :30], values[:, -40:]):
        assert (part == 255).any()
