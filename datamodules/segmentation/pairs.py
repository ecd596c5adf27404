"""Which image belongs to which mask, and one report of everything that is wrong with them."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger(__name__)

# What people store photographs and masks in and Pillow decodes.
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_SHOWN = 10


@dataclass(frozen=True)
class Pair:
    """One image and what is known of it before any pixel is read.

    Attributes:
        key: Image path relative to the root, with forward slashes; unique within a datamodule.
        image: Image file.
        masks: Mask file or files; how several become one array is up to `read_mask` of the datamodule.
        stratum: Group that labelled subsets keep in proportion (a diagnosis); empty where there is none.
        split: Official split, where the data set has one; None and "train" may both be trained on.
        problem: Why this entry cannot be used ("image without mask"); empty if nothing is known against it.
    """

    key: str
    image: Path
    masks: tuple[Path, ...] = ()
    stratum: str = ""
    split: Literal["train", "val", "test"] | None = None
    problem: str = ""


@dataclass(frozen=True)
class LabelledArrays:
    """Images that come from memory instead of files.

    Attributes:
        images: uint8 array [N, H, W, 3], H = W = the datamodule's `image_size`.
        masks: uint8 array [N, H, W] of class ids.
        keys: One unique name an image, written like a relative path.
        strata: One group an image; None for a single group.
        splits: One official split an image; None where there are none.
    """

    images: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.uint8]
    keys: Sequence[str]
    strata: Sequence[str] | None = None
    splits: Sequence[Literal["train", "val", "test"] | None] | None = None


class Problem(NamedTuple):
    """One file and what is wrong with it.

    Attributes:
        path: The offending file.
        reason: What is wrong, in a few words.
    """

    path: Path
    reason: str


def list_files(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> list[Path]:
    """List the files below a folder, nested folders included.

    Args:
        folder: Folder to search; a missing one holds no files.
        suffixes: Accepted endings in lower case, with the dot.

    Returns:
        Sorted paths without hidden files.
    """
    wanted = frozenset(suffixes)
    if not folder.is_dir():
        return []
    found = (path for path in folder.rglob("*") if path.suffix.lower() in wanted)
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()
    )


def pair_by_name(
    root: Path,
    images: Sequence[Path],
    masks: Sequence[Path],
    image_name: Callable[[Path], str],
    mask_name: Callable[[Path], str],
    split: Literal["train", "val", "test"] | None = None,
) -> list[Pair]:
    """Match images and masks that have the same name.

    Args:
        root: Folder that keys are relative to.
        images: Image files.
        masks: Mask files.
        image_name: Gives the name of an image.
        mask_name: Gives the name of the image that a mask belongs to.
        split: Official split of all of them.

    Returns:
        One entry an image and one for each mask that has no image; entries that cannot be used carry a
        `problem`.
    """
    by_name: dict[str, list[Path]] = {}
    for mask in masks:
        by_name.setdefault(mask_name(mask), []).append(mask)
    pairs = []
    seen: dict[str, Path] = {}
    for image in images:
        name = image_name(image)
        found = by_name.get(name, [])
        problem = ""
        if name in seen:
            problem = f"same name as {seen[name].name}"
        elif not found:
            problem = "image without mask"
        elif len(found) > 1:
            problem = f"{len(found)} masks ({found[0].name}, {found[1].name})"
        seen.setdefault(name, image)
        pairs.append(Pair(relative_key(root, image), image, tuple(found), split=split, problem=problem))
    for name in by_name.keys() - seen.keys():
        pairs.extend(
            Pair(relative_key(root, mask), mask, (), split=split, problem="mask without image")
            for mask in by_name[name]
        )
    return sorted(pairs, key=lambda pair: pair.key)


def relative_key(root: Path, path: Path) -> str:
    """Name a file by its path below `root`, with forward slashes on every system.

    Args:
        root: Folder that the key is relative to.
        path: File below it.

    Returns:
        The key.
    """
    return path.relative_to(root).as_posix()


def describe_problems(problems: Sequence[Problem], total: int, root: Path, layout: str) -> str:
    """Put every problem found into one message.

    Args:
        problems: What was found, at least one.
        total: Number of entries that were looked at.
        root: Folder that was read.
        layout: The expected layout, one line a folder or file.

    Returns:
        A text with the first ten files, how many there are, and the expected layout.
    """
    shown = "\n".join(f"  {path}: {reason}" for path, reason in problems[:_SHOWN])
    more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return (
        f"{len(problems)} of {total} entries under {root} cannot be used:\n{shown}{more}\n"
        f"Expected layout:\n{indent(layout)}"
    )


def settle_problems(
    problems: Sequence[Problem],
    total: int,
    root: Path,
    layout: str,
    on_bad_file: Literal["error", "skip"],
    max_bad_share: float,
) -> None:
    """Stop because of unusable files, or log each of them.

    Args:
        problems: What was found, at least one.
        total: Number of entries that were looked at.
        root: Folder that was read.
        layout: The expected layout.
        on_bad_file: Stop, or skip and log.
        max_bad_share: Share of unusable entries above which skipping gives up.

    Raises:
        ValueError: If the files may not be skipped, listing them.
    """
    message = describe_problems(problems, total, root, layout)
    share = len(problems) / total
    if on_bad_file == "error":
        msg = f"{message}\nRepair or remove them, or set `on_bad_file: skip`."
        raise ValueError(msg)
    if share > max_bad_share:
        msg = (
            f"{message}\nThat is {share:.1%}, more than `max_bad_share` ({max_bad_share:.1%}) lets skip. "
            "Repair them, or check that `root` and the class settings are the right ones."
        )
        raise ValueError(msg)
    _log_skipped(problems, total)


@rank_zero_only
def _log_skipped(problems: Sequence[Problem], total: int) -> None:
    for path, reason in problems:
        log.warning("skipped %s: %s", path, reason)
    log.warning("skipped %d of %d entries (on_bad_file: skip)", len(problems), total)


def indent(text: str) -> str:
    """Shift a layout text to the right, so that it stands out in a message."""
    return "\n".join(f"  {line}" for line in text.strip("\n").splitlines())
