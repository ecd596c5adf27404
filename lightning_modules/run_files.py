"""The files of a run directory, each of them written whole or not at all."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.cli import LightningArgumentParser, SaveConfigCallback
from pytorch_lightning.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]  # no __all__ there
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DistributedSampler

from lightning_modules.checkpoints import file_sha256


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a name in the same folder to write to; what was written there is flushed and takes the file's place.

    Args:
        path: The file to write or replace; its folder is made if missing.

    Yields:
        The temporary name.

    Raises:
        OSError: The disk is full or not writable; an earlier file stays as it was and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        msg = f"could not write {path} ({error.strerror}); make room or permit writing, then run again"
        raise OSError(error.errno, msg) from error
    finally:
        temporary.unlink(missing_ok=True)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside the ones they replace.

    Lightning's own goes through the system's folder for temporary files. Where that is another disk the last step is
    a copy over the previous checkpoint, and whoever is killed or runs out of space in it has neither of the two.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Tensors and plain values.
            path: The file.
            storage_options: Must be left out.

        Raises:
            OSError: It could not be written; the previous one of that name is still there.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with written_whole(Path(path)) as temporary:
            temporary.write_bytes(buffer.getbuffer())


class LastCheckpoint(ModelCheckpoint):
    """Keeps checkpoints/last.ckpt, which resuming and later stages rely on; its name and place are fixed.

    For other checkpoints, such as the best by a metric, put a ModelCheckpoint into trainer.callbacks.

    Args:
        every_n_epochs: Epochs between two; 1 unless another interval is given.
        every_n_train_steps: Optimiser steps between two. Going on from inside an epoch shows its first images again.
        train_time_interval: Time between two, likewise.
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
    ) -> None:
        super().__init__(
            filename="last",
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the sampler which epoch it is, before the first batch is asked for.

        Lightning has told it, but where only `max_steps` ends a fit that goes on from a checkpoint, it counts an epoch
        without batches first, and the images of one epoch would be left out.

        Args:
            trainer: The trainer.
            pl_module: Not looked at.
        """
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(trainer.current_epoch)


class RunRecord(SaveConfigCallback):
    """Saves the resolved configuration beside the logs, and in every checkpoint what it was made from.

    Args:
        parser: Dumps the configuration.
        config: The resolved configuration.
        record: `config_hash`, `config` (settings as JSON) and, once the stages have run, `inputs`.
        loaded_fingerprint: Fingerprint of the data that the checkpoint to test was trained on.
        kwargs: Passed on.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        record: dict[str, Any],
        loaded_fingerprint: str | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)
        self.record = record
        self.loaded_fingerprint = loaded_fingerprint

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration into the run directory; called on rank zero."""
        config = self.config.clone()
        # All of it is resolved: variables that no entry refers to any more would only mislead.
        config.vars, config.base = {}, None
        with written_whole(Path(trainer.default_root_dir) / self.config_filename) as temporary:
            self.parser.save(config, temporary, skip_unset=False, overwrite=True, multifile=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark the checkpoint as this configuration's, on these data."""
        checkpoint |= self.record
        data = getattr(trainer, "datamodule", None)
        checkpoint["fingerprint"] = _fingerprint(trainer)
        checkpoint["images_fingerprint"] = getattr(data, "images_fingerprint", None)
        checkpoint["class_names"] = list(getattr(data, "class_names", None) or ())

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say when the data are not split as they were in training: what is tested may have been trained on."""
        self._compare(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say when the data are not split as they were in training, likewise."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._compare(trainer)

    def _compare(self, trainer: Trainer) -> None:
        here = _fingerprint(trainer)
        if self.loaded_fingerprint is not None and here != self.loaded_fingerprint:
            rank_zero_warn(
                "The checkpoint was trained on other data, or on another split of these (fingerprint "
                f"{self.loaded_fingerprint[:12]}, here {str(here)[:12]}): what it is tested on may have been among its "
                "training images. Give the data arguments of the fit, unless other data are what you mean to test."
            )


def ran_out_of_time(trainer: Trainer) -> bool:
    """Whether max_time ended a fit."""
    timers = [callback for callback in _callbacks(trainer) if isinstance(callback, Timer)]
    return any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)


def artifact_files(trainer: Trainer) -> dict[str, str]:
    """The manifests of what the callbacks of a run made for the next one, with their SHA-256."""
    folders = [folder for callback in _callbacks(trainer) for folder in getattr(callback, "artifacts", ())]
    return {str(manifest): file_sha256(manifest) for manifest in (Path(folder) / "manifest.json" for folder in folders)}


def _callbacks(trainer: Trainer) -> list[object]:
    return list(getattr(trainer, "callbacks", ()))


def _fingerprint(trainer: Trainer) -> str | None:
    """What identifies the data and their split, where the datamodule knows it."""
    return getattr(getattr(trainer, "datamodule", None), "fingerprint", None)


def with_own_plugins(plugins: Any) -> list[Any]:  # noqa: ANN401 - whatever Trainer takes
    """Add WholeCheckpointIO to the plugins of a Trainer, and keep SLURM from requeueing behind the run's back.

    Lightning's own requeue checkpoint is found by the next fit in that directory, whatever that fit is; a requeued job
    here goes on with `--ckpt_path last` in its command.
    """
    listed = list(plugins) if isinstance(plugins, list) else [] if plugins is None else [plugins]
    if not any(hasattr(plugin, "save_checkpoint") for plugin in listed):
        listed.append(WholeCheckpointIO())
    if SLURMEnvironment.detect() and not any(hasattr(plugin, "global_rank") for plugin in listed):
        listed.append(SLURMEnvironment(auto_requeue=False))
    return listed
