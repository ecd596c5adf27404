"""Images of the classes that a client lacks: how many, and which of those drawn the first classifier agrees with."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks import fit_end, sampling
from datamodules.artifact_files import MANIFEST, read_json
from datamodules.atomic import write_json_atomically
from datamodules.drawing import KIND, layout_of
from datamodules.synthetic_images import Drawing, DrawRequest, Origin, weights_sha256
from federated import settings
from lightning_modules.diffusion.fixed_batches import in_batches_of

Int64Array = npt.NDArray[np.int64]
Fill = Literal["missing", "all"]

_COUNTS = "federated_drawn_counts"
# Images that the gate looks at together: in another number it would round differently.
_AT_ONCE = 64


class DrawnFor(Protocol):
    """The data of a client that images are drawn for, after `setup`."""

    images_fingerprint: str
    image_size: int

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes."""
        ...


def wanted(
    histogram: Int64Array,
    own: Int64Array,
    num_clients: int,
    ratio: float = 1.0,
    fill: Fill = "missing",
    max_per_class: int | None = None,
) -> Int64Array:
    """Tell how many images of each class a client is to draw.

    A client is filled up to N labelled images, a multiple of what clients have on average, whose classes are as
    frequent as over all clients, pi: n_c = max(0, round(N pi_c) - own_c).

    Args:
        histogram: Labelled images of each class over all clients [K].
        own: Those of the client [K].
        num_clients: Clients that the histogram is of, those without labels included.
        ratio: N relative to the mean number of labelled images of a client, at least 0.
        fill: `missing` leaves classes alone that the client has a label of, `all` does not.
        max_per_class: Most images of a class; None for any number.

    Returns:
        [K].

    Raises:
        ValueError: Numbers are negative, or not one for each class.
    """
    if histogram.ndim != 1 or histogram.shape != own.shape or (histogram < 0).any() or (own < 0).any():
        msg = (
            f"Expected `histogram` and `own` to be counts of the same classes, got {histogram.tolist()} and "
            f"{own.tolist()}; count the labels anew."
        )
        raise ValueError(msg)
    if num_clients < 1 or ratio < 0:
        msg = f"Expected `num_clients` of at least 1 and `ratio` of at least 0, got {num_clients} and {ratio}."
        raise ValueError(msg)
    # N pi_c = (ratio * n / clients) * (n_c / n).
    lacking: Int64Array = np.maximum(np.rint(ratio * histogram / num_clients).astype(np.int64) - own, 0)
    if fill == "missing":
        lacking = np.where(own == 0, lacking, 0)
    return lacking if max_per_class is None else np.minimum(lacking, max_per_class)


def candidates(counts: Int64Array, number: int, image_size: int, how: settings.Drawing) -> DrawRequest:
    """Say which images a client may draw to choose from.

    Args:
        counts: How many of each class to keep [K]; not all 0.
        number: The client's number. No two clients share a seed.
        image_size: Side of the images in pixels.
        how: How many candidates there are for each, and how they are drawn.

    Raises:
        ValueError: There are more of a class than `max_per_class`, or seeds of so many clients do not fit 32 bits.
    """
    if counts.max() > how.max_per_class:
        msg = f"Expected at most {how.max_per_class} images of a class (`max_per_class`), got {counts.tolist()}."
        raise ValueError(msg)
    seeds_of_client = len(counts) * math.ceil(how.candidates * how.max_per_class)
    return DrawRequest(
        None,
        image_size,
        first_seed=number * seeds_of_client,
        batch_size=how.batch_size,
        sampler=how.sampler,
        num_steps=how.num_steps,
        images_per_class=[math.ceil(how.candidates * count) for count in counts.tolist()],
        num_classes=len(counts),
        guidance=how.guidance,
    )


def draw_classes(
    generator: pl.LightningModule,
    gate: pl.LightningModule | None,
    data: DrawnFor,
    folder: Path,
    number: int,
    counts: Int64Array,
    how: settings.Drawing,
    trainer: pl.Trainer,
) -> Int64Array:
    """Draw images of classes for a client, and write those that the gate agrees with as SyntheticImages.

    An image is a function of its class and its seed, and clients have different seeds. Candidates are looked at in the
    order of their seeds, until a class has as many images as it should or its candidates are used up. So neither the
    size of batches nor what other classes need changes anything. Kept images are in memory until all are drawn.

    The folder is either finished or not there. One that holds these images is left as it is, another is replaced.

    Args:
        generator: The module that draws (`draw`).
        gate: The classifier that has to take an image for its class; None keeps all.
        data: What the images are to join.
        folder: Where to. Without any image to keep there is nothing afterwards.
        number: The client's number.
        counts: How many images of each class to keep [K], see `wanted`.
        how: Sampler, batches, and how many candidates there are.
        trainer: Where and how precisely it computes; nothing is run with it.

    Returns:
        For each class how many candidates were looked at, and how many of them are kept [K, 2]. `drawn_counts` tells
        them again.

    Raises:
        TypeError: The module does not draw, or the gate's `predict_step` lacks something.
        ValueError: What is drawn cannot be written, classes cannot be folders, or the folder holds something else.
        OSError: A file could not be written.
    """
    folder = Path(folder)
    _require_own(folder)
    if not counts.any():
        return _settle(folder, "", np.zeros((len(counts), 2), dtype=np.int64))
    names = tuple(data.class_names)
    request = candidates(counts, number, data.image_size, how)
    meaning: dict[str, Any] = getattr(generator, "meaning", dict)()
    gated_by = {"gate": None if gate is None else weights_sha256(gate), "wanted": counts.tolist()}
    drawn_with = {"precision": str(trainer.precision), **meaning, **gated_by}
    weights = weights_sha256(generator)
    origin = Origin(request, weights, len(names), names, data.images_fingerprint, drawn_with=drawn_with)
    identity = hashlib.sha256(json.dumps(origin.identity(), sort_keys=True).encode()).hexdigest()
    before = _counted(folder)
    if before.get("identity") == identity:
        known = drawn_counts(folder, len(counts))
        if known[:, 1].any() == folder.exists():
            return known
    with _choosing(generator, gate, request, names, trainer) as choose:
        kept, seen = _kept(request, counts, choose)
    if not kept:
        return _settle(folder, identity, seen)
    own = replace(origin, request=replace(request, only=sorted(kept)))
    return _settle(folder, identity, seen, _written(folder, own, kept))


def drawn_counts(folder: Path, num_classes: int) -> Int64Array:
    """Tell what `draw_classes` returned when it was last called for a folder.

    Args:
        folder: The folder, which is not there if nothing was kept.
        num_classes: Classes K.

    Returns:
        Candidates looked at, and kept [K, 2].

    Raises:
        FileNotFoundError: Nothing was drawn yet.
        ValueError: The counts are damaged, or of other classes.
    """
    known = _counted(folder)
    if not known:
        msg = f"Expected counts of drawn images at {_counts_of(folder)}, but there are none; draw the images first."
        raise FileNotFoundError(msg)
    found = np.asarray(known.get("counts"), dtype=object)
    if known.get("kind") != _COUNTS or found.shape != (num_classes, 2):
        msg = f"Expected counts of {num_classes} classes in {_counts_of(folder)}, got others; draw the images anew."
        raise ValueError(msg)
    return found.astype(np.int64)


def _kept(
    request: DrawRequest, counts: Int64Array, choose: Callable[[Sequence[int]], tuple[Tensor, list[bool]]]
) -> tuple[dict[int, Tensor], Int64Array]:
    """Images to keep, by seed, and how many were looked at and kept of each class."""
    kept: dict[int, Tensor] = {}
    seen = np.zeros((len(counts), 2), dtype=np.int64)
    left = chain.from_iterable(map(request.seeds, range(request.num_blocks)))

    def is_wanted(seed: int) -> bool:
        c = request.label(seed)
        return bool(seen[c, 1] < counts[c])

    while seeds := list(islice(filter(is_wanted, left), request.batch_size)):
        for seed, image, agrees in zip(seeds, *choose(seeds), strict=True):
            if is_wanted(seed):
                seen[request.label(seed)] += (1, int(agrees))
                if agrees:
                    kept[seed] = image
    return kept, seen


@contextmanager
def _choosing(
    generator: pl.LightningModule,
    gate: pl.LightningModule | None,
    request: DrawRequest,
    names: Sequence[str],
    trainer: pl.Trainer,
) -> Iterator[Callable[[Sequence[int]], tuple[Tensor, list[bool]]]]:
    """Give what draws images for seeds: uint8 [B, C, H, W], and whether each is taken for its class."""
    if not isinstance(generator, sampling.Draws):
        msg = f"Expected a `generator` with a method draw(request), got {type(generator).__name__}; use TDSMDiffusion."
        raise TypeError(msg)
    layout = layout_of(request, names)
    gated = nullcontext() if gate is None else fit_end.working(trainer, gate)
    with fit_end.working(trainer, generator) as device, gated:

        def choose(seeds: Sequence[int]) -> tuple[Tensor, list[bool]]:
            asked = trainer.strategy.batch_to_device(request.batch_of(seeds), device)
            pixels = torch.from_numpy(layout.check(generator.draw(asked), seeds, len(names)).images)
            images = (pixels if pixels.ndim == 4 else pixels[..., None]).permute(0, 3, 1, 2)
            if gate is None:
                return images, [True] * len(seeds)
            # What is trained on is judged: rounded to bytes.
            verdict = in_batches_of(_AT_ONCE, partial(_verdict, gate), (images.float() / 255).to(device))
            return images, [request.label(seed) == c for seed, c in zip(seeds, verdict.tolist(), strict=True)]

        yield choose


def _verdict(gate: pl.LightningModule, images: Tensor) -> Tensor:
    prediction = gate.predict_step({"image": images}, 0)
    if not isinstance(prediction, Mapping) or "label" not in prediction:
        msg = f"Expected `predict_step` of {type(gate).__name__} to return a dict with `label`; use a classifier."
        raise TypeError(msg)
    label: Tensor = prediction["label"]
    return label


def _written(folder: Path, origin: Origin, kept: Mapping[int, Tensor]) -> Path:
    """Write images into a folder of another name."""
    beside = _beside(folder, "new")
    shutil.rmtree(beside, ignore_errors=True)
    request = origin.request
    drawing = Drawing(beside, request)
    drawing.begin(origin)
    for block in range(request.num_blocks):
        asked = request.batch_of(request.seeds(block))
        images = torch.stack([kept[seed] for seed in request.seeds(block)])
        drawing.write(block, {"image": images / 255, "label": asked["label"], "seed": asked["seed"]})
    drawing.finish()
    return beside


def _settle(folder: Path, identity: str, seen: Int64Array, new: Path | None = None) -> Int64Array:
    """Let a new folder, or none, take the place of the one that is there; the counts come last."""
    _counts_of(folder).unlink(missing_ok=True)
    old = _beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        folder.rename(old)
    if new is not None:
        new.rename(folder)
    for rest in (old, _beside(folder, "new")):  # the latter of a run that was killed
        shutil.rmtree(rest, ignore_errors=True)
    content = {"kind": _COUNTS, "identity": identity, "counts": seen.tolist()}
    write_json_atomically(_counts_of(folder), content)
    return seen


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _counts_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _counted(folder: Path) -> dict[str, Any]:
    path = _counts_of(folder)
    return read_json(path, "counts") if path.is_file() else {}


def _require_own(folder: Path) -> None:
    """Refuse to replace what is no drawn images."""
    if not folder.exists():
        return
    manifest = folder / MANIFEST
    kind = read_json(manifest, "folder").get("kind") if manifest.is_file() else None
    if kind != KIND and not (folder.is_dir() and not any(folder.iterdir())):
        msg = f"Expected a folder of its own for drawn images, but {folder} holds something else; move it away."
        raise ValueError(msg)
