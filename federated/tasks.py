"""What clients are asked to train: which role, on which labels."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

RoleName = Literal["classifier", "noisy_classifier", "generator"]
Labels = Literal["all", "selected"]


@dataclass(frozen=True)
class FitTask:
    """One network that all clients train together.

    Attributes:
        name: Name of the step, unique in a run; the folder of its files.
        role: Which role of the settings is trained.
        fold: Labelled images of this fold are held out, see ClientPart; None holds none out.
        pseudo_labels: Which pseudo-labels of the client join its labels; None for none.
        drawn: Whether images that the client drew join.
    """

    name: str
    role: RoleName = "classifier"
    fold: int | None = None
    pseudo_labels: Labels | None = None
    drawn: bool = False

    def to_json(self) -> str:
        """Write it as a message carries it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "FitTask":
        """Read what `to_json` wrote.

        Args:
            text: JSON.
        """
        return cls(**json.loads(text))
