"""Hard digits against the digits that they are made from."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from datamodules import DigitsSource, HardDigitsSource, SemiSupervisedDataModule
from datamodules.classification.contents import Contents

Pixels = npt.NDArray[np.uint8]


def made(**options: Any) -> tuple[Contents, Pixels]:
    contents = HardDigitsSource(**{"num_train": 1500, "num_test": 300} | options).read()
    assert contents.images is not None
    return contents, contents.images


def digits(role: str) -> dict[bytes, int]:
    """The digits of a role, with their class."""
    contents = DigitsSource().read()
    assert contents.images is not None
    rows = [row for row, own in enumerate(contents.roles) if own == role]
    return {contents.images[row].tobytes(): int(contents.labels[row]) for row in rows}


def moved(image: Pixels, down: int, right: int) -> Pixels:
    out = np.zeros_like(image)
    for row in range(8):
        for column in range(8):
            if 0 <= row - down < 8 and 0 <= column - right < 8:
                out[row, column] = image[row - down, column - right]
    return out


def test_undisturbed_they_are_the_digits_of_their_role_equally_often() -> None:
    contents, images = made(noise=0.0, shift=0, flip_contrast=False)
    for role, part in (("train", slice(1500)), ("test", slice(1500, None))):
        assert set(contents.roles[part]) == {role}
        known = digits(role)
        shown = [image.tobytes() for image in images[part]]
        assert [known[image] for image in shown] == contents.labels[part].tolist()
        often = Counter(Counter(shown).values())
        assert set(often) <= ({1, 2} if role == "train" else {1})
    assert len(set(contents.keys)) == 1800


def test_shifts_and_contrast_are_those_of_a_loop() -> None:
    contents, images = made(noise=0.0, num_test=1)
    known = {
        moved(np.frombuffer(image, np.uint8).reshape(8, 8), down, right).tobytes(): (label, down, right)
        for image, label in digits("train").items()
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    }
    flips, shifts = 0, Counter[tuple[int, int]]()
    for image, label in zip(images[:1500, :, :, 0], contents.labels.tolist(), strict=False):
        inverted = image.tobytes() not in known
        flips += inverted
        found = known[(255 - image if inverted else image).tobytes()]
        assert found[0] == label
        shifts[found[1:]] += 1
    assert flips == pytest.approx(750, abs=80)
    assert len(shifts) == 9
    assert min(shifts.values()) > 100


def test_noise_is_as_strong_as_told() -> None:
    clean, noisy = (made(noise=noise)[1].astype(np.float64) / 255 for noise in (0.0, 0.1))
    # Where nothing is cut off.
    middle = (clean > 0.4) & (clean < 0.6)
    assert (noisy - clean)[middle].std() == pytest.approx(0.1, rel=0.05)
    assert abs((noisy - clean)[middle].mean()) < 0.005


def test_a_source_is_a_function_of_its_seed_and_tests_of_nothing_else() -> None:
    first, again, other = made()[1], made()[1], made(seed=1)[1]
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    np.testing.assert_array_equal(first[1500:], made(num_train=20)[1][20:])


def test_a_datamodule_takes_it() -> None:
    data = SemiSupervisedDataModule(HardDigitsSource(40, 10), labels_per_class=1)
    data.setup()
    assert data.counts == {"labeled": 10, "unlabeled": 40, "val": 0, "test": 10}
    assert (data.num_classes, data.image_size, data.image_channels) == (10, 8, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train": 0}, "`num_train` to be at least 1"),
        ({"num_test": 0}, "`num_test` to be at least 1"),
        ({"seed": -1}, "`seed` to be at least 0"),
        ({"shift": 8}, "`shift` to be from 0 to 7"),
        ({"noise": float("nan")}, "`noise` to be finite"),
    ],
)
def test_arguments_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardDigitsSource(**change)
