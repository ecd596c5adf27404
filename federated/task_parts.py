"""Module and data of a task, as a client keeps them in memory from one round to the next."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor

from datamodules.classification.base import ClassificationDataModule
from federated.weights import load_network_state


@dataclass
class TaskParts:
    """Module and data of a task.

    Attributes:
        data: The data, after `setup`.
        make: Builds the module, when it is first needed.
    """

    data: LightningDataModule
    make: Callable[[], LightningModule]
    _module: LightningModule | None = None
    _evaluator: LightningModule | None = None

    @property
    def count(self) -> int:
        """Labelled images to train on, pseudo-labelled and drawn ones included."""
        return int(getattr(self.data, "num_labeled", getattr(self.data, "num_images", 0)))

    @property
    def classes(self) -> ClassificationDataModule:
        """The data, if they are of images with a class.

        Raises:
            TypeError: They are not.
        """
        if isinstance(self.data, ClassificationDataModule):
            return self.data
        msg = f"Expected data of images with classes (SemiSupervisedDataModule), got {type(self.data).__name__}."
        raise TypeError(msg)

    def for_fit(self, weights: Mapping[str, Tensor]) -> LightningModule:
        """Copy the module as it was built, but for the weights of its network.

        Args:
            weights: These weights.

        Raises:
            ValueError: They are of another network.
        """
        module = self._new()
        load_network_state(module, weights)
        return module

    def for_evaluation(self, weights: Mapping[str, Tensor]) -> LightningModule:
        """Give a module these weights, which is shared by all evaluations and never trained.

        Args:
            weights: Weights of its network.

        Raises:
            ValueError: They are of another network.
        """
        if self._evaluator is None:
            self._evaluator = self._new()
        load_network_state(self._evaluator, weights)
        return self._evaluator

    def _new(self) -> LightningModule:
        if self._module is None:
            self._module = self.make()
        return copy.deepcopy(self._module)
