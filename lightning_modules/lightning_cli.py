"""LightningCLI with stages, overlays, one run directory a fit, and results written down."""

import json
import logging
import math
import signal
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jsonargparse import set_parsing_settings
from jsonargparse.typing import Path_fr
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar, TQDMProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_modules import stages
from lightning_modules.checkpoints import file_sha256, load_checkpoint, require_weights
from lightning_modules.command_line import PACKAGES, as_it_was, know_short_names, overlays_last, refuse
from lightning_modules.pipeline import Pipeline, add_arguments, resolved_settings, round_flags
from lightning_modules.run_config import config_hash, differences, input_files
from lightning_modules.run_files import LastCheckpoint, RunRecord, artifact_files, ran_out_of_time, with_own_plugins

# Arguments of modules, and of their parts, that are checkpoints.
_STARTS_FROM = {"init_from", "teacher_from", "classifier_from", "encoder_from"}


@runtime_checkable
class Reports(Protocol):
    """A report that shows what a run was made of, and the metrics of other runs beside its own."""

    run_name: str
    other_runs: dict[str, dict[str, float]]
    hyperparameters: dict[str, bool | int | float | str]


@runtime_checkable
class ChecksEarly(Protocol):
    """Data that can say what is wrong with its arguments before the stages have run."""

    def check(self) -> None:
        """Raise if the data cannot be used, as far as that can be told without reading them."""
        ...


def run(args: list[str]) -> "FewlightCLI":
    """Parse a command line whose first word is a sub-command, and run it."""
    stages.end_with_parent()
    for name in PACKAGES:  # what datamodules say about caching and callbacks about files is for the user to read
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())
    # pytorch-lightning 2.6 asks torch >= 2.9 in a way that is deprecated there; nothing a user could change.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    if args[0] not in FewlightCLI.subcommands():
        refuse(
            f"expected a sub-command first ({', '.join(FewlightCLI.subcommands())}, export, federate), got {args[0]}"
        )
    try:
        return FewlightCLI(args)
    except SIGTERMException:  # a SystemExit without a code: a scheduler would take it for success
        raise SystemExit(128 + signal.SIGTERM) from None


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
        self._words = args
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
            args=overlays_last(args),
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
        parser.add_argument("--base", type=str | None, default=None, help="In a file: the YAML it is merged after.")
        parser.add_argument("--vars", type=dict[str, Any], default={}, help="Values for ${vars.name}; merged by name.")
        add_arguments(parser)
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Test the network a fit ends with.")
        parser.add_argument(
            "--report",
            type=Callback | None,
            default={"class_path": "callbacks.MetricsReport"},
            help="Prints the metrics of a test as one table and writes metrics.json.",
        )
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.link_arguments(
            "data.num_classes",
            "model.init_args.num_classes",
            compute_fn=self._agreed_num_classes,
            apply_on="instantiate",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse after making the short class names known."""
        know_short_names()
        words = args if isinstance(args, list) else []
        self.config = parser.parse_args(words)
        rounds = self.config[self.config.subcommand].rounds
        if rounds > 1:  # the run that is asked for is the last one
            self.config = parser.parse_args([*words, *round_flags(rounds)])

    def _parse_ckpt_path(self) -> None:
        """Leave the model as configured: LightningCLI would let a checkpoint's hyper-parameters override the YAML."""

    # ---------------------------------------------------------------- before the run

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return Path(self._get(self.config, "trainer").default_root_dir).expanduser()

    @property
    def _is_dry(self) -> bool:
        return bool(self._get(self.config, "trainer").fast_dev_run)

    def before_instantiate_classes(self) -> None:
        """Resolve the earlier stages and find out where to go on from."""
        config = self.config[self.subcommand]
        pipeline = Pipeline(self.parser, self.run_dir if self.subcommand == "fit" else None)
        self.stages = pipeline.stages(config, self._words)
        self._run_dirs = pipeline.run_dirs
        # Absolute, so that the saved config.yaml can be run from anywhere.
        config.stages = config.stages and [Path_fr(path.absolute) for path in config.stages]
        config.rounds = 1  # what is saved is one round, written out
        self.settings = resolved_settings(self.parser, self.config)
        self.config_hash = config_hash(self.settings, pipeline.hashes)
        # Goes into every checkpoint.
        self.record: dict[str, Any] = {
            "config_hash": self.config_hash,
            "config": json.dumps(self.settings, default=str),
            "stages": pipeline.hashes,
        }
        self._loaded: dict[str, Any] = {}
        self._ckpt_path = self._checkpoint_to_load(config.ckpt_path)
        config.ckpt_path = None  # the saved config.yaml starts anew; where this run went on from is in its manifest
        self._given_num_classes = config.model.init_args.get("num_classes")
        self.save_config_kwargs = {
            "record": self.record,
            "loaded_fingerprint": self._loaded.get("fingerprint"),
            "config_filename": "config.yaml" if self.subcommand == "fit" else f"config_{self.subcommand}.yaml",
            "overwrite": True,
        }

    def _checkpoint_to_load(self, asked: str | None) -> str | None:
        """Turn `last` into a path, and refuse what is not a checkpoint before anything is built."""
        fitting = self.subcommand == "fit"
        if asked is None and (fitting or self._is_dry):
            return None
        path = self.run_dir / stages.LAST if asked in (None, "last") else Path(asked)
        if fitting and asked == "last" and not path.is_file():
            print(f"ckpt_path last: none in {path.parent}, starting from the beginning", flush=True)
            return None
        self._loaded = load_checkpoint(path, "ckpt_path")
        if fitting and asked == "last":
            self._require_own(path)
            print(f"ckpt_path last: going on from {path}", flush=True)
        return str(path)

    def _require_own(self, path: Path) -> None:
        """Going on must give what the configuration says, as if it had not been interrupted."""
        if self._loaded.get("config_hash") == self.config_hash:
            return
        changed = differences(json.loads(self._loaded.get("config", "{}")), self.settings)
        if self._loaded.get("stages") != self.record["stages"]:
            changed.append("the stages before it")
        if changed:
            shown = "; ".join(changed[:5]) + ("; ..." if len(changed) > 5 else "")
            msg = (
                f"Expected `ckpt_path` last to have been written by this configuration, but {path} differs in {shown}. "
                "Leave --ckpt_path out to start anew (the old run is kept in previous/), or name the file to go on all "
                "the same."
            )
            raise ValueError(msg)

    # ---------------------------------------------------------------- the objects

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; an error of theirs is raised as it was, not as jsonargparse retells it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            root = as_it_was(error)
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
        config["plugins"] = with_own_plugins(config["plugins"])
        extra: list[Callback] = []
        if config["enable_checkpointing"] is not False:
            checkpoint = self._get(self.config_init, "checkpoint")
            checkpoint.dirpath = str(self.run_dir / stages.LAST.parent)
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
        return self._instantiate_trainer(config, extra)

    def _scalars_of_data(self) -> dict[str, bool | int | float | str]:
        """The data's settings that the HParams tab can show; the module logs its own."""
        settings = self._get(self.config, "data").init_args.as_dict()
        return {f"data/{k}": v for k, v in settings.items() if isinstance(v, bool | int | float | str)}

    def _show_stages_in_report(self) -> None:
        report = self._get(self.config_init, "report")
        if isinstance(report, Reports) and (others := stages.test_metrics(self.stages, Path(self.config.fit.runs))):
            report.other_runs, report.run_name = others, self.run_dir.name

    # ---------------------------------------------------------------- the run

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """Run the earlier stages, fit, test if asked, and write the manifest last.

        Model, data and trainer exist by now, so that a mistake in the last config does not show after hours of stages.
        """
        del kwargs  # the checkpoint's path was resolved before
        if isinstance(datamodule, ChecksEarly):
            datamodule.check()
        self._require_checkpoints()
        if not self._is_dry:
            stages.run_stages(self.stages, self.config_hash)
        self._show_stages_in_report()
        self.record["inputs"] = input_files(self.settings)
        if self._ckpt_path is not None and self._loaded.get("inputs", {}) != self.record["inputs"]:
            print("note: what the run started from has changed since the checkpoint was written", flush=True)
        if self._is_dry or _rank() != 0:
            self._fit_and_test(model, datamodule)
            return
        with stages.only_one_fit(self.run_dir):
            aside = stages.set_previous_run_aside(self.run_dir) if self._ckpt_path is None else None
            if aside is not None:
                print(f"{self.run_dir}: the run that was here is now in {aside}", flush=True)
            try:
                self._fit_and_test(model, datamodule)
            except BaseException:
                if aside is not None and self.trainer.global_step == 0:
                    stages.bring_back(self.run_dir, aside)
                    print(f"{self.run_dir}: the run that was here is back, the new one made no step", flush=True)
                raise
            if ran_out_of_time(self.trainer):
                print(f"{self.run_dir}: max_time is over, the run is not finished: no manifest", flush=True)
                return
            stages.write_manifest(self.run_dir, self._manifest())

    def _require_checkpoints(self) -> None:
        """A checkpoint that the model starts from must be there, or be what a stage is going to write."""
        to_come = {run_dir / stages.LAST for run_dir in self._run_dirs}
        for key, value in self.settings.items():
            name = key.rpartition(".")[2]
            if key.startswith("model.") and name in _STARTS_FROM and isinstance(value, str):
                path = Path(value).expanduser()
                if path not in to_come or self._is_dry:
                    require_weights(path, name)

    def _fit_and_test(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        self.trainer.fit(model, datamodule=datamodule, ckpt_path=self._ckpt_path, weights_only=True)
        self._fit_metrics = _plain(self.trainer.callback_metrics)
        if self.config.fit.test_after_fit and not ran_out_of_time(self.trainer):
            self.trainer.test(model, datamodule=datamodule, verbose=False)

    def validate(self, **kwargs: Any) -> None:
        """Validate; the report prints the table."""
        self.trainer.validate(**kwargs | {"ckpt_path": self._ckpt_path}, verbose=False, weights_only=True)
        if not self.trainer.callback_metrics and not self._is_dry:
            msg = "Expected validation images, got none; raise data.init_args.val_share, or use `lightning test`."
            raise ValueError(msg)

    def test(self, **kwargs: Any) -> None:
        """Test; the report prints the table."""
        self.trainer.test(**kwargs | {"ckpt_path": self._ckpt_path}, verbose=False, weights_only=True)

    def predict(self, **kwargs: Any) -> None:
        """Predict; a BasePredictionWriter among the callbacks keeps the result."""
        chosen = {"ckpt_path": self._ckpt_path, "return_predictions": False}
        self.trainer.predict(**kwargs | chosen, weights_only=True)

    def _manifest(self) -> dict[str, Any]:
        """What the next stage needs to know about this run."""
        last = self.run_dir / stages.LAST
        foreign = self._ckpt_path not in (None, str(last)) and self._loaded.get("config_hash") != self.config_hash
        before = stages.read_manifest(self.run_dir) or {}
        # Going on with a finished run logs nothing of the fit: what it logged then still holds.
        same = (before.get("config_hash"), before.get("global_step")) == (self.config_hash, self.trainer.global_step)
        logged = before.get("metrics", {}) if same else {}
        data = self.datamodule
        return {
            "kind": "fit",
            "fewlight": version("fewlight"),
            "config_hash": self.config_hash,
            "inputs": self.record["inputs"],
            "resumed_from": self._ckpt_path if foreign else None,
            "checkpoint": {"path": str(stages.LAST), "sha256": file_sha256(last)} if last.is_file() else None,
            "global_step": self.trainer.global_step,
            "class_names": list(getattr(data, "class_names", ())),
            "counts": dict(getattr(data, "counts", {})),
            "fingerprint": getattr(data, "fingerprint", None),
            "artifacts": artifact_files(self.trainer),
            "metrics": {**logged, **self._fit_metrics, **_plain(self.trainer.callback_metrics)},
        }


def _rank() -> int:
    """This process's rank, as its launcher's variables told when torch was imported."""
    return int(getattr(rank_zero_only, "rank", 0))


def _plain(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics as JSON can hold them: what is not finite becomes null."""
    return {name: number if math.isfinite(number := float(value)) else None for name, value in metrics.items()}
