"""Masks of `predict` as image files beside the names of their images."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import interpolate

from callbacks.atomic import write_atomically
from callbacks.drawing import PREDICTION, draw_contours

_LISTED = 10


@runtime_checkable
class NamedImages(Protocol):
    """A data set that knows where its images come from."""

    @property
    def keys(self) -> Sequence[str]:
        """Path of each image, relative to the folder of images, with forward slashes."""
        ...

    def original_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image before it was resized."""
        ...


class MaskWriter(BasePredictionWriter):
    """Writes the mask of every image of `predict`, at the size the image had before it was resized.

    `faces/a.jpg` becomes `<output_dir>/faces/a.png`, an 8-bit grey image of class ids; with two classes, 0
    and 255. Two images that differ in the suffix only keep it: `a.jpg` and `a.png` become `a.jpg.png` and
    `a.png.png`. Each process writes the images that it predicted.

    `predict_step` has to return `{"probabilities": [B, K, H, W], "index": [B]}`, and the data set needs
    `keys` and `original_size(index)`.

    Args:
        output_dir: Folder of the masks; made if missing.
        write_probabilities: Write `probabilities/<name>.npy` as well, float16 [K, height, width].
        overlay: Write `overlays/<name>.png` as well: the image, resized back, with the outline of the mask.
        overwrite: Replace masks that exist. If not, one that exists is an error before anything is predicted.
    """

    def __init__(
        self,
        output_dir: str,
        write_probabilities: bool = False,
        overlay: bool = False,
        overwrite: bool = True,
    ) -> None:
        """Nothing is made or written before a prediction."""
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir)
        self.write_probabilities = write_probabilities
        self.overlay = overlay
        self.overwrite = overwrite
        self._data: list[NamedImages] = []
        self._names: list[list[str]] = []
        self._written = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide on all names, and refuse what cannot be written, before anything is computed.

        Args:
            trainer: The trainer, with its loaders.
            pl_module: Not looked at.

        Raises:
            TypeError: A data set does not name its images.
            ValueError: Two images would get the same mask file, or one a file outside the folder.
            FileExistsError: A mask exists and `overwrite` is off.
        """
        self._written = 0
        self._data = [_named(loader) for loader in _loaders(trainer.predict_dataloaders)]
        self._names = _mask_names([list(data.keys) for data in self._data], self.overlay)
        if not self.overwrite:
            existing = [n for names in self._names for n in names if (self.output_dir / f"{n}.png").exists()]
            if existing:
                msg = (
                    f"Expected `output_dir` {self.output_dir} without these masks, as `overwrite` is off, "
                    f"got {_listed(existing)}; set `overwrite` or choose another folder."
                )
                raise FileExistsError(msg)
            # No process may write before the slowest has looked.
            trainer.strategy.barrier("MaskWriter")

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,  # noqa: ANN401 - whatever a predict_step returns; checked below
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401 - whatever a loader yields
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the masks of one batch.

        Args:
            trainer: The trainer.
            pl_module: The module that predicted.
            prediction: What `predict_step` returned.
            batch_indices: Not used: the prediction carries its own.
            batch: The images, for overlays.
            batch_idx: Not used.
            dataloader_idx: Which loader the batch came from.

        Raises:
            TypeError: The prediction lacks `probabilities` or `index`, or the batch the images to draw over.
            ValueError: There are more classes than an 8-bit image can hold.
            OSError: A file could not be written.
        """
        if not isinstance(prediction, Mapping) or not {"probabilities", "index"} <= prediction.keys():
            got = sorted(prediction) if isinstance(prediction, Mapping) else type(prediction).__name__
            msg = (
                f"Expected `predict_step` of {type(pl_module).__name__} to return a dict of `probabilities` "
                f"and `index`, got {got}; return both, or take MaskWriter out of `trainer.callbacks`."
            )
            raise TypeError(msg)
        probabilities = prediction["probabilities"]
        if probabilities.shape[1] > 256:
            msg = f"Expected `probabilities` of at most 256 classes, got {probabilities.shape[1]}; merge some."
            raise ValueError(msg)
        if self.overlay and not (isinstance(batch, Mapping) and "image" in batch):
            msg = "Expected predict batches to be dicts with `image` for `overlay`, got none; set it to false."
            raise TypeError(msg)
        data, names = self._data[dataloader_idx], self._names[dataloader_idx]
        for i, index in enumerate(prediction["index"].tolist()):
            if index >= 0:  # -1 is padding
                image = batch["image"][i] if self.overlay else None
                self._write(names[index], probabilities[i], data.original_size(index), image)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how many masks were written where.

        Args:
            trainer: The trainer.
            pl_module: The module that predicted.
        """
        count = torch.tensor(self._written, device=pl_module.device)
        total = int(trainer.strategy.reduce(count, reduce_op="sum"))
        rank_zero_info(f"MaskWriter: {total} masks written to {self.output_dir}")

    def _write(self, name: str, probabilities: Tensor, size: tuple[int, int], image: Tensor | None) -> None:
        labels = resized_labels(probabilities, size)
        if self.write_probabilities:
            buffer = io.BytesIO()
            np.save(buffer, _resized(probabilities, size).half().cpu().numpy(), allow_pickle=False)
            write_atomically(self.output_dir / "probabilities" / f"{name}.npy", buffer.getvalue())
        if image is not None:
            pixels = (_resized(image, size).clamp(0, 1) * 255).round().byte().expand(3, -1, -1)
            thickness = max(1, min(size) // 200)
            drawn = draw_contours(pixels.permute(1, 2, 0).cpu().numpy(), labels, PREDICTION, thickness)
            write_atomically(self.output_dir / "overlays" / f"{name}.png", _png(drawn))
        shown = labels * 255 if len(probabilities) == 2 else labels
        # The mask itself comes last: where it exists, all that belongs to it does.
        write_atomically(self.output_dir / f"{name}.png", _png(shown.byte().numpy()))
        self._written += 1


def resized_labels(probabilities: Tensor, size: tuple[int, int]) -> Tensor:
    """Class ids at another size: the probabilities are resized, bilinearly, and the largest decides.

    Args:
        probabilities: [K, H, W].
        size: Height and width of the result.

    Returns:
        [height, width] int64 on the CPU; the smaller id where two classes tie.
    """
    # Class by class: an original may have 25 million pixels, times 34 classes that would be gigabytes.
    best = _resized(probabilities[:1], size)
    labels = torch.zeros_like(best, dtype=torch.long)
    for k in range(1, len(probabilities)):
        candidate = _resized(probabilities[k : k + 1], size)
        labels = torch.where(candidate > best, k, labels)
        best = torch.maximum(best, candidate)
    return labels[0].cpu()


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, height, width] float32 of [C, H, W]."""
    return interpolate(x.detach()[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0]


def _png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _loaders(loaders: object) -> Iterator[object]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, Sequence):
        for loader in loaders:
            yield from _loaders(loader)
    else:
        yield loaders


def _named(loader: object) -> NamedImages:
    data = getattr(loader, "dataset", None)
    # A dict has `keys` as well, as a method.
    if not isinstance(data, NamedImages) or callable(data.keys):
        msg = (
            f"Expected the data set of `predict_dataloader` to have `keys` and `original_size(index)`, got "
            f"{type(data).__name__}; use a datamodule of `datamodules`, or give the data set these two."
        )
        raise TypeError(msg)
    return data


def _mask_names(keys: Sequence[Sequence[str]], overlay: bool) -> list[list[str]]:
    """Name of each mask, without `.png`: that of the image without its suffix, where that is unique."""
    flat = [PurePosixPath(key) for group in keys for key in group]
    outside = [str(key) for key in flat if key.is_absolute() or ".." in key.parts]
    if outside:
        msg = f"Expected `keys` to be paths within a folder, got {_listed(outside)}; make them relative to it."
        raise ValueError(msg)
    # Compared as on file systems that ignore case: there, `A.png` would replace `a.png`.
    stems = Counter(_stem(key).casefold() for key in flat)
    names = [[_name(PurePosixPath(key), stems) for key in group] for group in keys]
    counts = Counter(name.casefold() for group in names for name in group)
    if overlay:
        counts.update(f"overlays/{name}" for name in list(counts))
    twice = [name for group in names for name in group if counts[name.casefold()] > 1]
    if twice:
        msg = (
            f"Expected one mask file for each image, got several for {_listed(sorted(set(twice)))}; rename the images."
        )
        raise ValueError(msg)
    return names


def _stem(key: PurePosixPath) -> str:
    return str(key.with_suffix(""))


def _name(key: PurePosixPath, stems: Counter[str]) -> str:
    return _stem(key) if stems[_stem(key).casefold()] == 1 else str(key)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
