"""Masks of `predict` as image files beside the names of their images, and how sure they are."""

import csv
import io
import math
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

from callbacks.drawing import PREDICTION, draw_contours
from datamodules.atomic import write_atomically

_LISTED = 10
_CONFIDENCE_FILE = "confidence.csv"
_UNCERTAIN_SHARE = 0.1


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

    `predict_step` has to return `{"probabilities": [B, K, H, W], "index": [B]}`, and the data set needs `keys` and
    `original_size(index)`. An ensemble that votes returns `votes` [B, K, H, W] as well: the class with most of them is
    written, otherwise the likeliest. Where it returns `confidence` [B] as well, `<output_dir>/confidence.csv` lists
    the confidence of each image at the end, so that the masks to look at come first when it is sorted; with
    `uncertainty` [B, H, W], also the mean of its most uncertain tenth of the pixels.

    Args:
        output_dir: Folder of the masks; made if missing.
        write_probabilities: Write `probabilities/<name>.npy` as well, float16 [K, height, width].
        overlay: Write `overlays/<name>.png` as well: the image, resized back, with the outline of the mask.
        overwrite: Replace files that exist. If not, a mask or a `confidence.csv` that exists is an error before
            anything is predicted.
        write_uncertainty: Write `uncertainty/<name>.png` as well, 8-bit grey: 0 is certain, 255 is log K nats, the
            most there is with K classes.
    """

    def __init__(
        self,
        output_dir: str,
        write_probabilities: bool = False,
        overlay: bool = False,
        overwrite: bool = True,
        write_uncertainty: bool = False,
    ) -> None:
        """Nothing is made or written before a prediction."""
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir)
        self.write_probabilities = write_probabilities
        self.overlay = overlay
        self.write_uncertainty = write_uncertainty
        self.overwrite = overwrite
        self._data: list[NamedImages] = []
        self._names: list[list[str]] = []
        self._written = 0
        self._scores: Tensor = torch.zeros(0, 4)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide on all names, and refuse what cannot be written, before anything is computed.

        Args:
            trainer: The trainer, with its loaders.
            pl_module: Not looked at.

        Raises:
            TypeError: A data set does not name its images.
            ValueError: Two images would get the same mask file, or one a file outside the folder.
            FileExistsError: A file exists and `overwrite` is off.
        """
        self._written = 0
        self._data = [_named(loader) for loader in flat_loaders(trainer.predict_dataloaders)]
        folders = {"overlays": self.overlay, "uncertainty": self.write_uncertainty}
        self._names = _mask_names(
            [list(data.keys) for data in self._data], [name for name, wanted in folders.items() if wanted]
        )
        # Of each image: has a confidence, confidence, has an uncertainty, uncertainty.
        self._scores = torch.zeros(sum(len(names) for names in self._names), 4, dtype=torch.float32)
        if not self.overwrite:
            existing = [n for names in self._names for n in names if (self.output_dir / f"{n}.png").exists()]
            existing += [_CONFIDENCE_FILE] if (self.output_dir / _CONFIDENCE_FILE).exists() else []
            if existing:
                msg = (
                    f"Expected `output_dir` {self.output_dir} without these files, as `overwrite` is off, "
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
            TypeError: The prediction lacks something to write, or the batch the images to draw over.
            ValueError: There are more classes than an 8-bit image can hold, or a shape is wrong.
            OSError: A file could not be written.
        """
        self._check(prediction, batch, type(pl_module).__name__)
        data, names = self._data[dataloader_idx], self._names[dataloader_idx]
        first = sum(len(group) for group in self._names[:dataloader_idx])
        confidence, uncertainty = prediction.get("confidence"), prediction.get("uncertainty")
        for i, index in enumerate(prediction["index"].tolist()):
            if index >= 0:  # -1 is padding
                image = batch["image"][i] if self.overlay else None
                doubt = uncertainty[i] if self.write_uncertainty else None
                size = data.original_size(index)
                labels = resized_labels(prediction.get("votes", prediction["probabilities"])[i], size)
                self._write(names[index], labels, prediction["probabilities"][i], size, image, doubt)
                if confidence is not None:
                    self._scores[first + index, :2] = torch.tensor([1.0, float(confidence[i])])
                if uncertainty is not None:
                    self._scores[first + index, 2:] = torch.tensor([1.0, _of_most_uncertain(uncertainty[i])])

    def _check(self, prediction: object, batch: object, module: str) -> None:
        """Raise if a prediction lacks something that is to be written."""
        if not isinstance(prediction, Mapping) or not {"probabilities", "index"} <= prediction.keys():
            got = sorted(prediction) if isinstance(prediction, Mapping) else type(prediction).__name__
            msg = (
                f"Expected `predict_step` of {module} to return a dict of `probabilities` and `index`, got {got}; "
                "return both, or take MaskWriter out of `trainer.callbacks`."
            )
            raise TypeError(msg)
        if self.write_uncertainty and "uncertainty" not in prediction:
            msg = (
                f"Expected `predict_step` of {module} to return `uncertainty` for `write_uncertainty`, got "
                f"{sorted(prediction)}; return it, or set `write_uncertainty` to false."
            )
            raise TypeError(msg)
        probabilities = prediction["probabilities"]
        if probabilities.shape[1] > 256:
            msg = f"Expected `probabilities` of at most 256 classes, got {probabilities.shape[1]}; merge some."
            raise ValueError(msg)
        if self.overlay and not (isinstance(batch, Mapping) and "image" in batch):
            msg = "Expected predict batches to be dicts with `image` for `overlay`, got none; set it to false."
            raise TypeError(msg)
        batch_size, _, *size = probabilities.shape
        for name, shape in (("confidence", [batch_size]), ("uncertainty", [batch_size, *size])):
            if name in prediction and list(prediction[name].shape) != shape:
                msg = (
                    f"Expected `{name}` in what `predict_step` of {module} returns to have shape {shape}, got "
                    f"{list(prediction[name].shape)}; leave it out, or fix it."
                )
                raise ValueError(msg)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the confidences, and say how many masks were written where.

        Args:
            trainer: The trainer.
            pl_module: The module that predicted.
        """
        count = torch.tensor(self._written, device=pl_module.device)
        total = int(trainer.strategy.reduce(count, reduce_op="sum"))
        # Each process filled the rows of its own images; zeros are added to them.
        scores = trainer.strategy.reduce(self._scores.to(pl_module.device), reduce_op="sum").cpu()
        if trainer.is_global_zero:
            self._write_confidences(scores)
        rank_zero_info(f"MaskWriter: {total} masks written to {self.output_dir}")

    def _write_confidences(self, scores: Tensor) -> None:
        """Write the table of all processes' images, if there are any confidences."""
        keys = [key for data in self._data for key in data.keys]
        with_uncertainty = bool(scores[:, 2].any())
        rows = sorted(
            [key, f"{row[1] / row[0]:.6f}", *([f"{row[3] / row[2]:.6g}" if row[2] else ""] if with_uncertainty else [])]
            for key, row in zip(keys, scores.tolist(), strict=True)
            if row[0]
        )
        if not rows:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "confidence", *(["uncertainty"] if with_uncertainty else [])])
        writer.writerows(rows)
        write_atomically(self.output_dir / _CONFIDENCE_FILE, text.getvalue().encode())

    def _write(
        self,
        name: str,
        labels: Tensor,
        probabilities: Tensor,
        size: tuple[int, int],
        image: Tensor | None,
        uncertainty: Tensor | None,
    ) -> None:
        if self.write_probabilities:
            buffer = io.BytesIO()
            np.save(buffer, _resized(probabilities, size).half().cpu().numpy(), allow_pickle=False)
            write_atomically(self.output_dir / "probabilities" / f"{name}.npy", buffer.getvalue())
        if image is not None:
            pixels = (_resized(image, size).clamp(0, 1) * 255).round().byte().expand(3, -1, -1)
            thickness = max(1, min(size) // 200)
            drawn = draw_contours(pixels.permute(1, 2, 0).cpu().numpy(), labels, PREDICTION, thickness)
            write_atomically(self.output_dir / "overlays" / f"{name}.png", _png(drawn))
        if uncertainty is not None:
            share = _resized(uncertainty[None], size)[0] / math.log(len(probabilities))
            grey = (share.nan_to_num().clamp(0, 1) * 255).round().byte().cpu().numpy()
            write_atomically(self.output_dir / "uncertainty" / f"{name}.png", _png(grey))
        shown = labels * 255 if len(probabilities) == 2 else labels
        # The mask itself comes last: where it exists, all that belongs to it does.
        write_atomically(self.output_dir / f"{name}.png", _png(shown.byte().numpy()))
        self._written += 1


def resized_labels(probabilities: Tensor, size: tuple[int, int]) -> Tensor:
    """Class ids at another size: the probabilities (or votes) are resized, bilinearly, and the largest decides.

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


def _of_most_uncertain(pixels: Tensor) -> float:
    """Mean of the most uncertain tenth of the pixels [H, W], an image's uncertainty in LEDM (arXiv 2112.03126)."""
    values = pixels.detach().float().flatten()
    return float(values.topk(max(1, round(_UNCERTAIN_SHARE * len(values)))).values.mean())


def _png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def flat_loaders(loaders: object) -> Iterator[object]:
    """All loaders of `trainer.predict_dataloaders`, one after the other.

    Args:
        loaders: A loader, or loaders in sequences and mappings.
    """
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, Sequence):
        for loader in loaders:
            yield from flat_loaders(loader)
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


def _mask_names(keys: Sequence[Sequence[str]], folders: Sequence[str]) -> list[list[str]]:
    """Name of each mask, without `.png`: that of the image without its suffix, where that is unique.

    The folders hold further `.png` files of the same names, which must not be masks as well.
    """
    flat = [PurePosixPath(key) for group in keys for key in group]
    outside = [str(key) for key in flat if key.is_absolute() or ".." in key.parts]
    if outside:
        msg = f"Expected `keys` to be paths within a folder, got {_listed(outside)}; make them relative to it."
        raise ValueError(msg)
    # Compared as on file systems that ignore case: there, `A.png` would replace `a.png`.
    stems = Counter(_stem(key).casefold() for key in flat)
    names = [[_name(PurePosixPath(key), stems) for key in group] for group in keys]
    counts = Counter(name.casefold() for group in names for name in group)
    counts.update([f"{folder}/{name}" for folder in folders for name in counts])
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
