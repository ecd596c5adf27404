"""Metrics that few-label segmentation and class-conditional generation need and TorchMetrics lacks."""

from lightning_modules.metrics.binned_mean import BinnedMean
from lightning_modules.metrics.calibration import CalibrationError
from lightning_modules.metrics.classification_accuracy import ClassificationAccuracyScore
from lightning_modules.metrics.classifier_verdicts import ClassifierScore, LabelConsistency
from lightning_modules.metrics.frechet import FrechetDistance
from lightning_modules.metrics.generation import GenerationMetric
from lightning_modules.metrics.manifold import ManifoldMetrics
from lightning_modules.metrics.segmentation import MeanDice, MeanJaccard, PooledJaccard

__all__ = [
    "BinnedMean",
    "CalibrationError",
    "ClassificationAccuracyScore",
    "ClassifierScore",
    "FrechetDistance",
    "GenerationMetric",
    "LabelConsistency",
    "ManifoldMetrics",
    "MeanDice",
    "MeanJaccard",
    "PooledJaccard",
]
