"""LightningCLI with stages, overlays, one run directory a fit, and results written down."""

import json
import logging
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml
from jsonargparse import Namespace, get_loader, set_parsing_settings
from jsonargparse.typing import Path_fr
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from lightning_modules import stages
from lightning_modules.checkpoints import file_sha256, load_checkpoint

# Importing these makes their classes known by short name: `class_path: HybridSegmentation`.
_PACKAGES = ("lightning_modules", "datamodules", "callbacks")
# What does not change a run's result is left out of its hash. The stages go in by their own hashes.
_NOT_HASHED = ("config", "ckpt_path", "overlay", "stages", "report")


@runtime_checkable
class Reports(Protocol):
    """A report that shows what a run was made of, and the metrics of other runs beside its own."""

    run_name: str
    other_runs: dict[str, dict[str, float]]
    hyperparameters: dict[str, bool | int | float | str]


class RunRecord(SaveConfigCallback):
    """Saves the resolved configuration beside the logs, and its hash in every checkpoint."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, config_hash: str, **kwargs: Any) -> None:
        super().__init__(parser, config, **kwargs)
        self.config_hash = config_hash

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark the checkpoint as this configuration's."""
        del trainer, pl_module
        checkpoint["config_hash"] = self.config_hash


def run(args: list[str]) -> "FewlightCLI":
    """Parse a command line whose first word is a sub-command, and run it."""
    stages.end_with_parent()
    for name in _PACKAGES:  # what datamodules say about caching and callbacks about files is for the user to read
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())
    # pytorch-lightning 2.6 asks torch >= 2.9 in a way that is deprecated there; nothing a user could change.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    return FewlightCLI(overlays_last(args))


def overlays_last(args: list[str]) -> list[str]:
    """Put every `--overlay FILE` behind the last `--config`, and the other flags behind both.

    Each overlay becomes a `--config` that is merged last, and is also remembered under `overlay`, whence the
    stages get it. Flags win over all files, wherever they stand.

    Raises:
        SystemExit: An overlay does not exist.
    """
    configs: list[str] = []
    overlays: list[str] = []
    flags: list[str] = []
    words = iter(args[1:])
    for word in words:
        name, equals, value = word.partition("=")
        if name in {"--config", "-c", "--overlay"}:
            if not equals and (value := next(words, "")) == "":
                flags.append(word)  # argparse then says that its argument is missing
            else:
                (overlays if name == "--overlay" else configs).append(value)
        else:
            flags.append(word)
    for overlay in overlays:
        if not Path(overlay).is_file():
            print(
                f"error: expected `--overlay` to be a YAML file, but there is none at {overlay}",
                file=sys.stderr,
            )
            raise SystemExit(2)
    files = [word for file in (*configs, *overlays) for word in ("--config", file)]
    remembered = [f"--overlay+={Path(overlay).resolve()}" for overlay in overlays]
    values = _merged_vars([*configs, *overlays])
    return [args[0], *files, *([f"--vars={json.dumps(values)}"] if values else []), *remembered, *flags]


def _merged_vars(files: list[str]) -> dict[str, Any]:
    """Merge `vars` key by key over the files; jsonargparse would replace the dict as a whole."""
    merged: dict[str, Any] = {}
    for file in files:
        if Path(file).is_file():
            content = get_loader("yaml")(Path(file).read_text())
            if isinstance(content, dict) and isinstance(content.get("vars"), dict):
                merged |= content["vars"]
    return merged


class FewlightCLI(LightningCLI):
    """The `lightning` command.

    Model and data are chosen by class_path, dotted or short. On top of LightningCLI it has `stages`, `overlay`,
    `test_after_fit`, `report` and `checkpoint`; interpolation (`${runs}`) in YAML; one run directory
    (`trainer.default_root_dir`) that holds everything a fit writes; `--ckpt_path last` for all sub-commands, the
    default for all but fit.

    Args:
        args: Command line after the program's name.
    """

    def __init__(self, args: list[str]) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunRecord,
            trainer_defaults={"default_root_dir": "runs/default", "log_every_n_steps": 10},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"parser_mode": "omegaconf+", "version": f"fewlight {version('fewlight')}"},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Sub-commands, and the arguments of the Trainer's methods that are decided here."""
        decided = {"model", "datamodule", "weights_only", "verbose"}
        return {
            "fit": decided | {"train_dataloaders", "val_dataloaders"},
            "validate": decided | {"dataloaders"},
            "test": decided | {"dataloaders"},
            "predict": decided | {"dataloaders"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what LightningCLI does not have."""
        parser.add_argument("--runs", type=str, default="runs", help="Folder for ${runs} in the configs.")
        parser.add_argument(
            "--vars",
            type=dict[str, Any],
            default={},
            help="Values for ${vars.name} in the configs; merged by name.",
        )
        parser.add_argument(
            "--stages", type=list[Path_fr] | None, default=None, help="Fit configs to run first, in order."
        )
        parser.add_argument(
            "--overlay",
            type=list[Path_fr] | None,
            default=None,
            help="YAML merged last, here and in the stages; repeatable. In a file it only reaches the stages.",
        )
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Test the network a fit ends with.")
        parser.add_argument(
            "--report",
            type=Callback | None,
            default={"class_path": "callbacks.MetricsReport"},
            help="Prints the metrics of a test as one table and writes metrics.json.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "last",
                "checkpoint.save_on_train_epoch_end": True,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments(
            "data.num_classes",
            "model.init_args.num_classes",
            compute_fn=self._agreed_num_classes,
            apply_on="instantiate",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse after making the short class names known."""
        for name in _PACKAGES:
            package = import_module(name)
            for attribute in package.__all__:
                getattr(package, attribute)
        self.config = parser.parse_args(args if isinstance(args, list) else None)

    def _parse_ckpt_path(self) -> None:
        """Leave the model as configured: LightningCLI would let a checkpoint's hyper-parameters override the YAML."""

    # ---------------------------------------------------------------- before the run

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return Path(self._get(self.config, "trainer").default_root_dir)

    @property
    def _is_dry(self) -> bool:
        return bool(self._get(self.config, "trainer").fast_dev_run)

    def before_instantiate_classes(self) -> None:
        """See to the earlier stages and find out where to go on from."""
        config = self.config[self.subcommand]
        self.stages = [self._stage(path, config.runs, config.overlay) for path in config.stages or ()]
        # Absolute, so that the saved config.yaml can be run from anywhere.
        config.stages = config.stages and [Path_fr(path.absolute) for path in config.stages]
        self.config_hash = self._hash(self.config, self.stages)
        if self.subcommand == "fit":
            stages.run_stages(self.stages, self.config_hash)
        config.ckpt_path = self._checkpoint_to_load(config.ckpt_path)
        self._given_num_classes = config.model.init_args.get("num_classes")
        self.save_config_kwargs = {
            "config_hash": self.config_hash,
            "config_filename": "config.yaml" if self.subcommand == "fit" else f"config_{self.subcommand}.yaml",
            "overwrite": True,
        }

    def _stage(self, path: Path_fr, runs: str, overlays: list[Path_fr] | None) -> stages.Stage:
        """Resolve a stage's configuration as its own process will; a pipeline writes below one `runs`."""
        arguments = ["--config", str(path.absolute), "--runs", runs]
        for overlay in overlays or ():
            arguments += ["--overlay", str(overlay.absolute)]
        config = self.parser.parse_args(overlays_last(["fit", *arguments]))
        earlier = [self._stage(inner, runs, config.fit.overlay) for inner in config.fit.stages or ()]
        run_dir = Path(config.fit.trainer.default_root_dir)
        return stages.Stage(Path(str(path)), run_dir, self._hash(config, earlier), tuple(arguments))

    def _hash(self, config: Namespace, earlier: list[stages.Stage]) -> str:
        plain = yaml.safe_load(self.parser.dump(config, skip_link_targets=True, skip_none=False))
        plain = (
            {key: value for key, value in plain["fit"].items() if key not in _NOT_HASHED} if "fit" in plain else plain
        )
        return stages.hash_config(plain, [stage.config_hash for stage in earlier])

    def _checkpoint_to_load(self, asked: str | None) -> str | None:
        """Turn `last` into a path, and refuse what is not a checkpoint before anything is built."""
        fitting = self.subcommand == "fit"
        if asked is None and (fitting or self._is_dry):
            return None
        if asked not in (None, "last"):
            load_checkpoint(asked, "ckpt_path")
            return asked
        last = self.run_dir / stages.LAST
        if fitting and not last.is_file():
            print(f"ckpt_path last: none in {last.parent}, starting from the beginning", flush=True)
            return None
        written_by = load_checkpoint(last, "ckpt_path").get("config_hash")
        if fitting:
            other = "" if written_by == self.config_hash else " (written by another configuration)"
            print(f"ckpt_path last: going on from {last}{other}", flush=True)
        return str(last)

    # ---------------------------------------------------------------- the objects

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; an error of theirs is raised as it was, not as jsonargparse retells it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            root: BaseException = error
            while root.__cause__ is not None:
                root = root.__cause__
            if root is error:
                raise
            raise root from None

    def _agreed_num_classes(self, of_data: int | None) -> int | None:
        """The data's number of classes; one of the user's own must be the same."""
        given = self._given_num_classes
        if given is not None and given != of_data:
            msg = (
                f"Expected `model.init_args.num_classes` to be the data's, got {given} for the model, {of_data} from "
                "the data; leave it out (it is linked to data.num_classes)."
            )
            raise ValueError(msg)
        return of_data

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer: it logs and saves in the run directory unless told otherwise."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        if config["logger"] in (None, True):
            config["logger"] = TensorBoardLogger(self.run_dir, name="", version="", default_hp_metric=False)
        extra: list[Callback] = []
        if config["enable_checkpointing"] is not False:
            checkpoint = self._get(self.config_init, "checkpoint")
            checkpoint.dirpath = checkpoint.dirpath or str(self.run_dir / stages.LAST.parent)
            extra.append(checkpoint)
        shown = config["enable_progress_bar"] is not False
        if shown and not sys.stdout.isatty() and not any(isinstance(c, ProgressBar) for c in config["callbacks"] or ()):
            # Rich, Lightning's default, writes nothing into a log file before an epoch has ended.
            extra.append(TQDMProgressBar(refresh_rate=10))
        report = self._get(self.config_init, "report")
        if report is not None:
            extra.append(report)
        if isinstance(report, Reports):
            report.hyperparameters = self._scalars_of_data() | report.hyperparameters
            if others := self._metrics_of_stages():
                report.other_runs, report.run_name = others, self.run_dir.name
        return self._instantiate_trainer(config, extra)

    def _scalars_of_data(self) -> dict[str, bool | int | float | str]:
        """The data's settings that the HParams tab can show; the module logs its own."""
        settings = self._get(self.config, "data").init_args.as_dict()
        return {f"data/{k}": v for k, v in settings.items() if isinstance(v, bool | int | float | str)}

    def _metrics_of_stages(self) -> dict[str, dict[str, float]]:
        """Test metrics of the earlier stages, by the name of their run directory."""
        manifests = {stage.run_dir.name: stages.read_manifest(stage.run_dir) for stage in self.stages}
        metrics = {name: (manifest or {}).get("metrics", {}) for name, manifest in manifests.items()}
        return {n: tested for n, m in metrics.items() if (tested := {k: v for k, v in m.items() if "test_" in k})}

    # ---------------------------------------------------------------- the run

    def fit(self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None) -> None:
        """Fit, test if asked, and write the manifest last."""
        if self._is_dry or _rank() != 0:
            self._fit_and_test(model, datamodule, ckpt_path)
            return
        with stages.only_one_fit(self.run_dir):
            if ckpt_path is None and (aside := stages.set_previous_run_aside(self.run_dir)):
                print(f"{self.run_dir}: the run that was here is now in {aside}", flush=True)
            self._fit_and_test(model, datamodule, ckpt_path)
            stages.write_manifest(self.run_dir, self._manifest())

    def _fit_and_test(self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None) -> None:
        self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        self._fit_metrics = _plain(self.trainer.callback_metrics)
        if self.config.fit.test_after_fit:
            self.trainer.test(model, datamodule=datamodule, verbose=False)

    def validate(self, **kwargs: Any) -> None:
        """Validate; the report prints the table."""
        self.trainer.validate(**kwargs, verbose=False, weights_only=True)

    def test(self, **kwargs: Any) -> None:
        """Test; the report prints the table."""
        self.trainer.test(**kwargs, verbose=False, weights_only=True)

    def predict(self, **kwargs: Any) -> None:
        """Predict; a BasePredictionWriter among the callbacks keeps the result."""
        self.trainer.predict(**kwargs | {"return_predictions": False}, weights_only=True)

    def _manifest(self) -> dict[str, Any]:
        """What the next stage needs to know about this run."""
        last = self.run_dir / stages.LAST
        checkpoint = {"path": str(stages.LAST), "sha256": file_sha256(last)} if last.is_file() else None
        data = self.datamodule
        return {
            "kind": "fit",
            "fewlight": version("fewlight"),
            "config_hash": self.config_hash,
            "checkpoint": checkpoint,
            "global_step": self.trainer.global_step,
            "class_names": list(getattr(data, "class_names", ())),
            "counts": dict(getattr(data, "counts", {})),
            "fingerprint": getattr(data, "fingerprint", None),
            "metrics": {**self._fit_metrics, **_plain(self.trainer.callback_metrics)},
        }


def _rank() -> int:
    """This process's rank, as its launcher's variables told when torch was imported."""
    return int(getattr(rank_zero_only, "rank", 0))


def _plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
