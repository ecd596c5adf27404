"""Every semi-supervised method, with arguments that make it fit for two moons: a new method is one entry here."""

from importlib import import_module
from typing import Any

from lightning_modules.ssl.base import Method

# Class path below lightning_modules.ssl, and arguments that differ from the method's own.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("supervised.Supervised", {}),
    "pi_model": ("pi_model.PiModel", {}),
    "temporal_ensembling": ("temporal_ensembling.TemporalEnsembling", {}),
    "mean_teacher": ("mean_teacher.MeanTeacher", {}),
    "adversarial_training": ("adversarial_training.AdversarialTraining", {"epsilon": 0.1}),
    "vat": ("vat.VAT", {"epsilon": 0.3}),
    "ict": ("ict.ICT", {"alpha": 0.1}),
    "pseudo_label": ("pseudo_label.PseudoLabel", {}),
    "uda": ("uda.UDA", {}),
    "fixmatch": ("fixmatch.FixMatch", {}),
    "flexmatch": ("flexmatch.FlexMatch", {}),
    "freematch": ("freematch.FreeMatch", {"decay": 0.9}),
    "softmatch": ("softmatch.SoftMatch", {"decay": 0.9}),
    "adamatch": ("adamatch.AdaMatch", {}),
    "dash": ("dash.Dash", {"warmup": 0.2}),
    "comatch": ("comatch.CoMatch", {"size": 8, "queue": 80}),
    "simmatch": ("simmatch.SimMatch", {"size": 8}),
    "mixmatch": ("mixmatch.MixMatch", {}),
    "remixmatch": ("remixmatch.ReMixMatch", {}),
    "remixmatch_ctaugment": ("remixmatch.ReMixMatch", {"ctaugment": True}),
    "label_propagation": ("label_propagation.LabelPropagation", {"warmup_epochs": 1, "neighbors": 10}),
    "curriculum_labeling": ("curriculum_labeling.CurriculumLabeling", {"epochs_per_round": 1, "step": 0.5}),
    "noisy_student": ("noisy_student.NoisyStudent", {"teacher_from": ""}),
    "soft_pseudo_labels": ("soft_pseudo_labels.SoftPseudoLabels", {"warmup_epochs": 1, "alpha": 0.1}),
    "meta_pseudo_labels": ("meta_pseudo_labels.MetaPseudoLabels", {"student_labeled_weight": 1.0}),
    "distillation": ("distillation.Distillation", {"teacher_from": ""}),
    "dividemix": ("dividemix.DivideMix", {"warmup_epochs": 1, "ramp_epochs": 2, "alpha": 0.2}),
}
# mu(t) where the method's own is meant for ten classes (the mean over two is five times as large) and for long fits.
WEIGHTS = {
    "dividemix": 1.0,
    "ict": 4.0,
    "mean_teacher": 4.0,
    "meta_pseudo_labels": 1.0,
    "mixmatch": 5.0,
    "temporal_ensembling": 5.0,
    "vat": 1.0,
}
# By how much of the test accuracy a method is to be better than the labels alone (0.86) on two moons. Part of it is
# BatchNorm: where it sees the unlabelled points too, FixMatch with mu = 0 reaches 0.97. So this shows that a method
# learns and does no harm, not by itself that its unlabelled loss has the right gradient.
GAINS = (
    dict.fromkeys(("adamatch", "comatch", "dash", "fixmatch", "flexmatch", "freematch", "simmatch", "softmatch"), 0.08)
    | dict.fromkeys(("meta_pseudo_labels", "uda", "vat"), 0.08)
    | dict.fromkeys(("label_propagation", "mean_teacher", "noisy_student", "pseudo_label"), 0.04)
    | dict.fromkeys(("curriculum_labeling", "mixmatch", "pi_model", "temporal_ensembling"), 0.02)
    | dict.fromkeys(("remixmatch", "remixmatch_ctaugment"), 0.02)
)
# Methods for wrong labels are compared with the labels alone on these data.
NOISY = {"dividemix"}


def build(name: str) -> Method:
    """Return the method of an entry."""
    path, arguments = METHODS[name]
    module, class_name = path.rsplit(".", 1)
    method = getattr(import_module(f"lightning_modules.ssl.{module}"), class_name)(**arguments)
    if not isinstance(method, Method):
        msg = f"Expected {path} to be a Method, got {type(method).__name__}."
        raise TypeError(msg)
    return method
