"""What happens around training: pictures, written masks, phases of one fit, reports.

Names are resolved on first use, so `import callbacks` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from callbacks.confusion_matrix import ConfusionMatrix
    from callbacks.dual_pseudo_report import DualPseudoReport
    from callbacks.generation_metrics import GenerationMetrics
    from callbacks.image_grid import DenoisingGrid, SegmentationGrid
    from callbacks.mask_writer import MaskWriter
    from callbacks.metrics_report import MetricsReport, print_metrics_table
    from callbacks.prediction_table import PredictionTable
    from callbacks.pseudo_label_grid import PseudoLabelGrid
    from callbacks.pseudo_label_writer import PseudoLabelWriter
    from callbacks.reconstruction_grid import ReconstructionGrid
    from callbacks.reliability_diagram import ReliabilityDiagram
    from callbacks.stage_transition import StageTransition
    from callbacks.synthetic_image_writer import SyntheticImageWriter
    from callbacks.transition_grid import TransitionGrid
    from callbacks.uncertainty_grid import UncertaintyGrid
    from callbacks.view_grid import ViewGrid

__all__ = [
    "ConfusionMatrix",
    "DenoisingGrid",
    "DualPseudoReport",
    "GenerationMetrics",
    "MaskWriter",
    "MetricsReport",
    "PredictionTable",
    "PseudoLabelGrid",
    "PseudoLabelWriter",
    "ReconstructionGrid",
    "ReliabilityDiagram",
    "SegmentationGrid",
    "StageTransition",
    "SyntheticImageWriter",
    "TransitionGrid",
    "UncertaintyGrid",
    "ViewGrid",
    "print_metrics_table",
]

_HOMES = {
    "ConfusionMatrix": "callbacks.confusion_matrix",
    "DenoisingGrid": "callbacks.image_grid",
    "DualPseudoReport": "callbacks.dual_pseudo_report",
    "GenerationMetrics": "callbacks.generation_metrics",
    "MaskWriter": "callbacks.mask_writer",
    "MetricsReport": "callbacks.metrics_report",
    "PredictionTable": "callbacks.prediction_table",
    "PseudoLabelGrid": "callbacks.pseudo_label_grid",
    "PseudoLabelWriter": "callbacks.pseudo_label_writer",
    "ReconstructionGrid": "callbacks.reconstruction_grid",
    "ReliabilityDiagram": "callbacks.reliability_diagram",
    "SegmentationGrid": "callbacks.image_grid",
    "StageTransition": "callbacks.stage_transition",
    "SyntheticImageWriter": "callbacks.synthetic_image_writer",
    "TransitionGrid": "callbacks.transition_grid",
    "UncertaintyGrid": "callbacks.uncertainty_grid",
    "ViewGrid": "callbacks.view_grid",
    "print_metrics_table": "callbacks.metrics_report",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
