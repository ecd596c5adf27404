"""What the configuration of a federated run says, as plain values: it is hashed, written down and sent to clients."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from datamodules.draw_request import SamplerName
from datamodules.partition import ClientSplit

Engine = Literal["in_process", "simulation", "deployment"]
Arm = Literal["labels", "all_pseudo_labels", "selected", "drawn", "selected_and_drawn"]


def _require(
    name: str,
    number: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Refuse a number that is out of its range, or none."""
    if number >= at_least and number > above and number <= at_most and number < below and math.isfinite(number):
        return
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    asked = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
    msg = f"Expected `{name}` to be {asked}, got {number}; change it in the configuration."
    raise ValueError(msg)


@dataclass(frozen=True)
class Role:
    """A module that clients train together, and the data each trains it on.

    In a string of `model` and `data`, `{client}` is the folder of the client. `source`, pseudo-labels, drawn images
    and the seed of the data are set by the run.

    Attributes:
        model: The module, as class_path and init_args. Its `network` is what is exchanged; what it keeps beside that
            starts anew in every round.
        data: The data, likewise, without a source.
        rounds: How often clients train and the server averages.
        epochs: Epochs of a client in a round.
        server_ema: Decay of the server's moving average over rounds, in [0, 1); the network that a step ends with is
            that average. 0 takes the last round's.
        trainer: Further arguments of the clients' Trainer (`gradient_clip_val`, `precision`, `accelerator`).
    """

    model: dict[str, Any]
    data: dict[str, Any]
    rounds: int = 10
    epochs: int = 1
    server_ema: float = 0.0
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        _require("rounds", self.rounds, at_least=1)
        _require("epochs", self.epochs, at_least=1)
        _require("server_ema", self.server_ema, at_least=0, below=1)


@dataclass(frozen=True)
class Confusion:
    """On which labels the errors of the classifier are counted: never on those that it was trained on.

    Attributes:
        kind: `cross_fit` trains one more classifier a fold, without its labels, and counts on these; `held_out` trains
            the only classifier without those of the first fold.
        folds: Into how many folds each client's labelled images are split.
    """

    kind: Literal["cross_fit", "held_out"] = "cross_fit"
    folds: int = 2

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        _require("folds", self.folds, at_least=2)


@dataclass(frozen=True)
class Selection:
    """Which pseudo-labels are kept.

    Attributes:
        rule: `ratio` keeps of each class the surest share that is expected to be right, over all clients;
            `client_ratio` does so at each client; `threshold` keeps those above the lowest confidence at which a class
            is precise enough; `fixed` those above one confidence.
        smoothing: Images that each class counts as seen before, as right as chance, at least 0.
        min_precision: What `threshold` wants of a class, in [0, 1].
        min_confidence: What `fixed` wants of an image, in [0, 1].
    """

    rule: Literal["ratio", "client_ratio", "threshold", "fixed"] = "ratio"
    smoothing: float = 1.0
    min_precision: float = 0.8
    min_confidence: float = 0.95

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        _require("smoothing", self.smoothing, at_least=0)
        _require("min_precision", self.min_precision, at_least=0, at_most=1)
        _require("min_confidence", self.min_confidence, at_least=0, at_most=1)


@dataclass(frozen=True)
class Drawing:
    """What clients draw.

    Attributes:
        fill: `missing` draws the classes that a client has no labels of, `all` fills up every class.
        ratio: Labelled images that a client is filled up to, relative to the mean client's.
        max_per_class: Most images of a class that a client draws.
        candidates: Images that are drawn for each that is wanted; the classifier chooses among them. At least 1.
        gate: Keep drawn images only that the first classifier takes for what they were drawn as.
        min_gate_rate: Share of the candidates that it has to agree with, over all clients; below it nothing is trained
            on drawn images. None is twice chance, with two classes three quarters.
        sampler: See DrawRequest.
        num_steps: Steps of the sampler.
        guidance: Weight of classifier-free guidance.
        batch_size: Images drawn at once.
    """

    fill: Literal["missing", "all"] = "missing"
    ratio: float = 1.0
    max_per_class: int = 1000
    candidates: float = 2.0
    gate: bool = True
    min_gate_rate: float | None = None
    sampler: SamplerName = "heun"
    num_steps: int = 18
    guidance: float = 3.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        for name in ("ratio", "guidance"):
            _require(name, getattr(self, name), at_least=0)
        for name in ("max_per_class", "candidates", "num_steps", "batch_size"):
            _require(name, getattr(self, name), at_least=1)
        if self.min_gate_rate is not None:
            _require("min_gate_rate", self.min_gate_rate, at_least=0, at_most=1)

    def least_gate_rate(self, num_classes: int) -> float:
        """Tell which share of the candidates the classifier has to agree with.

        Args:
            num_classes: Classes K.

        Returns:
            `min_gate_rate`; without one twice chance, 2 / K, or half-way from chance to all where that is less.
        """
        if self.min_gate_rate is not None:
            return self.min_gate_rate
        chance = 1 / num_classes
        return min(2 * chance, (1 + chance) / 2)


@dataclass(frozen=True)
class Communication:
    """Who takes part in a round.

    Attributes:
        fraction: Share of the clients that train in a round, in (0, 1].
        min_clients: Clients without which no round begins, and answers without which it fails; at least 1.
        timeout: Seconds to wait for answers.
        wait: Seconds to wait for `min_clients` clients to connect.
        evaluate_every: Rounds between two evaluations of a classifier; the last round always is evaluated.
    """

    fraction: float = 1.0
    min_clients: int = 2
    timeout: float = 3600.0
    wait: float = 600.0
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        _require("fraction", self.fraction, above=0, at_most=1)
        _require("min_clients", self.min_clients, at_least=1)
        _require("timeout", self.timeout, above=0)
        _require("wait", self.wait, at_least=0)
        _require("evaluate_every", self.evaluate_every, at_least=1)


@dataclass(frozen=True)
class Privacy:
    """Central differential privacy of the weights that clients send, by Flower's wrapper; every client counts alike.

    The server adds the noise, so it sees what clients send without. Statistics of batch normalisation, numbers of
    images and losses are not noised. The noise is another one in each run, whatever the seed.

    Attributes:
        noise_multiplier: Standard deviation of the noise relative to the clipping norm.
        clipping_norm: Largest norm of a client's update; where `adaptive`, that of the first round.
        adaptive: Let the clipping norm follow the median of the updates' norms; needs a `noise_multiplier` below a
            tenth of the clients of a round.
    """

    noise_multiplier: float
    clipping_norm: float
    adaptive: bool = False

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        _require("noise_multiplier", self.noise_multiplier, at_least=0)
        _require("clipping_norm", self.clipping_norm, above=0)


@dataclass(frozen=True)
class Central:
    """Training on all clients' images in one place, to compare with; only where there is one place.

    Attributes:
        same_labels: Train the classifier on the labelled images of all clients.
        all_labels: Train it on all images with their labels, which no client has.
        epochs: Epochs of either.
    """

    same_labels: bool = True
    all_labels: bool = True
    epochs: int = 20

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        _require("epochs", self.epochs, at_least=1)


@dataclass(frozen=True)
class Deployment:
    """Where the SuperLink is.

    Attributes:
        superlink: Its address, host:port.
        root_certificates: File with the certificate that it is trusted by; None speaks without TLS, which is refused
            for any host but this one unless `insecure`.
        insecure: Speak without TLS all the same.
        local: Start SuperLink and SuperNodes on this machine, with TLS and authenticated nodes, and stop them in the
            end: a rehearsal of a deployment.
    """

    superlink: str = "127.0.0.1:8000"
    root_certificates: str | None = None
    insecure: bool = False
    local: bool = False


@dataclass(frozen=True)
class Settings:
    """A federated run.

    Attributes:
        source: Images and labels, as class_path and init_args. In a deployment each client reads its own.
        classifier: What gives pseudo-labels, and is trained again in the end.
        generator: What draws; None ends with pseudo-labels.
        noisy_classifier: Classifier of noisy images for a generator with `weighting: posterior`; None for none.
        run_dir: Folder of everything that is written.
        engine: Where clients run: in this process, in Flower's simulation (Ray), or on SuperNodes.
        split: How images are dealt out; None for clients that have their own.
        confusion: On which labels errors are counted.
        selection: Which pseudo-labels are kept.
        drawing: What is drawn.
        arms: Which classifiers are trained in the end, for the table.
        central: Training in one place; None for none.
        communication: Who takes part in a round.
        privacy: Differential privacy; None for none.
        deployment: Where the SuperLink is.
        seed: Seed of the run.
    """

    source: dict[str, Any]
    classifier: Role
    generator: Role | None = None
    noisy_classifier: Role | None = None
    run_dir: str = "runs/federated"
    engine: Engine = "in_process"
    split: ClientSplit | None = field(default_factory=ClientSplit)
    confusion: Confusion = field(default_factory=Confusion)
    selection: Selection = field(default_factory=Selection)
    drawing: Drawing = field(default_factory=Drawing)
    arms: list[Arm] = field(default_factory=lambda: ["labels", "all_pseudo_labels", "selected"])
    central: Central | None = field(default_factory=Central)
    communication: Communication = field(default_factory=Communication)
    privacy: Privacy | None = None
    deployment: Deployment = field(default_factory=Deployment)
    seed: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Write them as JSON can hold them."""
        return asdict(self)

    def config_hash(self) -> str:
        """Identify the run by what its result depends on, as SHA-256."""
        plain = {name: part for name, part in self.to_plain().items() if name not in _NOT_HASHED}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Settings":
        """Read what `to_plain` wrote.

        Args:
            plain: Plain values.

        Raises:
            ValueError: A number is out of range.
        """
        values = dict(plain)
        for name, part in _PARTS.items():
            if values.get(name) is not None:
                try:
                    values[name] = part(**values[name])
                except ValueError as error:
                    msg = f"{name}: {error}"
                    raise ValueError(msg) from error
        return cls(**values)


# What does not change a run's result.
_NOT_HASHED = ("run_dir", "engine", "deployment")
_PARTS: dict[str, type[Any]] = {
    "classifier": Role,
    "generator": Role,
    "noisy_classifier": Role,
    "split": ClientSplit,
    "confusion": Confusion,
    "selection": Selection,
    "drawing": Drawing,
    "central": Central,
    "communication": Communication,
    "privacy": Privacy,
    "deployment": Deployment,
}
