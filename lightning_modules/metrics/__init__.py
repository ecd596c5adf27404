"""Metrics that segmentation of few labelled images needs and TorchMetrics lacks."""

from lightning_modules.metrics.binned_mean import BinnedMean
from lightning_modules.metrics.calibration import CalibrationError
from lightning_modules.metrics.segmentation import MeanDice, MeanJaccard, PooledJaccard

__all__ = ["BinnedMean", "CalibrationError", "MeanDice", "MeanJaccard", "PooledJaccard"]
