"""What is trained: Lightning modules for many images and few, or unreliable, labels.

Names are resolved on first use, so importing the package (and `lightning --help`) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_modules.diffusion.learned_transition import LearnedTransition as LearnedTransition
    from lightning_modules.diffusion.noise import EDMProcess as EDMProcess
    from lightning_modules.diffusion.transition import AsymmetricTransition as AsymmetricTransition
    from lightning_modules.diffusion.transition import ConfusionTransition as ConfusionTransition
    from lightning_modules.diffusion.transition import FileTransition as FileTransition
    from lightning_modules.diffusion.transition import IdentityTransition as IdentityTransition
    from lightning_modules.diffusion.transition import SymmetricTransition as SymmetricTransition
    from lightning_modules.diffusion.transition import TransitionMatrix as TransitionMatrix
    from lightning_modules.diffusion.vp_noise import VPProcess as VPProcess
    from lightning_modules.diffusion.vp_noise import VPSDEProcess as VPSDEProcess
    from lightning_modules.export import export_checkpoint as export_checkpoint
    from lightning_modules.feature_extractors import ClassifierFeatures as ClassifierFeatures
    from lightning_modules.feature_extractors import InceptionFeatures as InceptionFeatures
    from lightning_modules.hybrid_segmentation import HybridSegmentation as HybridSegmentation
    from lightning_modules.latent_space import LatentSpace as LatentSpace
    from lightning_modules.ledm_segmentation import LEDMSegmentation as LEDMSegmentation
    from lightning_modules.linear_probe import LinearProbe as LinearProbe
    from lightning_modules.masked_siamese import MaskedSiamese as MaskedSiamese
    from lightning_modules.metrics.classification_accuracy import (
        ClassificationAccuracyScore as ClassificationAccuracyScore,
    )
    from lightning_modules.metrics.classifier_verdicts import ClassifierScore as ClassifierScore
    from lightning_modules.metrics.classifier_verdicts import LabelConsistency as LabelConsistency
    from lightning_modules.metrics.frechet import FrechetDistance as FrechetDistance
    from lightning_modules.metrics.manifold import ManifoldMetrics as ManifoldMetrics
    from lightning_modules.networks.adm_unet import ADMUNet as ADMUNet
    from lightning_modules.networks.autoencoder import KLAutoencoder as KLAutoencoder
    from lightning_modules.networks.class_unet import ClassUNet as ClassUNet
    from lightning_modules.networks.conv_net import ConvNet as ConvNet
    from lightning_modules.networks.mlp_denoiser import MLPDenoiser as MLPDenoiser
    from lightning_modules.networks.noisy_resnet import NoisyResNet as NoisyResNet
    from lightning_modules.networks.timm_classifier import TimmClassifier as TimmClassifier
    from lightning_modules.networks.uvit import UViT as UViT
    from lightning_modules.networks.vit_encoder import ViTEncoder as ViTEncoder
    from lightning_modules.networks.wide_resnet import WideResNet as WideResNet
    from lightning_modules.noisy_label_classifier import NoisyLabelClassifier as NoisyLabelClassifier
    from lightning_modules.ssl.adamatch import AdaMatch as AdaMatch
    from lightning_modules.ssl.adversarial_training import AdversarialTraining as AdversarialTraining
    from lightning_modules.ssl.base import Method as Method
    from lightning_modules.ssl.comatch import CoMatch as CoMatch
    from lightning_modules.ssl.curriculum_labeling import CurriculumLabeling as CurriculumLabeling
    from lightning_modules.ssl.dash import Dash as Dash
    from lightning_modules.ssl.distillation import Distillation as Distillation
    from lightning_modules.ssl.dividemix import DivideMix as DivideMix
    from lightning_modules.ssl.fixmatch import FixMatch as FixMatch
    from lightning_modules.ssl.flexmatch import FlexMatch as FlexMatch
    from lightning_modules.ssl.freematch import FreeMatch as FreeMatch
    from lightning_modules.ssl.ict import ICT as ICT
    from lightning_modules.ssl.label_propagation import LabelPropagation as LabelPropagation
    from lightning_modules.ssl.mean_teacher import MeanTeacher as MeanTeacher
    from lightning_modules.ssl.meta_pseudo_labels import MetaPseudoLabels as MetaPseudoLabels
    from lightning_modules.ssl.mixmatch import MixMatch as MixMatch
    from lightning_modules.ssl.noisy_student import NoisyStudent as NoisyStudent
    from lightning_modules.ssl.pi_model import PiModel as PiModel
    from lightning_modules.ssl.pseudo_label import PseudoLabel as PseudoLabel
    from lightning_modules.ssl.ramps import Ramp as Ramp
    from lightning_modules.ssl.remixmatch import ReMixMatch as ReMixMatch
    from lightning_modules.ssl.schedules import CosineDecay as CosineDecay
    from lightning_modules.ssl.schedules import WarmUpCosine as WarmUpCosine
    from lightning_modules.ssl.simmatch import SimMatch as SimMatch
    from lightning_modules.ssl.soft_pseudo_labels import SoftPseudoLabels as SoftPseudoLabels
    from lightning_modules.ssl.softmatch import SoftMatch as SoftMatch
    from lightning_modules.ssl.supervised import Supervised as Supervised
    from lightning_modules.ssl.temporal_ensembling import TemporalEnsembling as TemporalEnsembling
    from lightning_modules.ssl.uda import UDA as UDA
    from lightning_modules.ssl.vat import VAT as VAT
    from lightning_modules.ssl_classifier import SSLClassifier as SSLClassifier
    from lightning_modules.tdsm_diffusion import TDSMDiffusion as TDSMDiffusion
    from lightning_modules.vae_training import VAETraining as VAETraining

_HOMES = {
    "ADMUNet": "lightning_modules.networks.adm_unet",
    "AdaMatch": "lightning_modules.ssl.adamatch",
    "AdversarialTraining": "lightning_modules.ssl.adversarial_training",
    "AsymmetricTransition": "lightning_modules.diffusion.transition",
    "ClassificationAccuracyScore": "lightning_modules.metrics.classification_accuracy",
    "ClassifierFeatures": "lightning_modules.feature_extractors",
    "ClassifierScore": "lightning_modules.metrics.classifier_verdicts",
    "ClassUNet": "lightning_modules.networks.class_unet",
    "ConvNet": "lightning_modules.networks.conv_net",
    "CoMatch": "lightning_modules.ssl.comatch",
    "ConfusionTransition": "lightning_modules.diffusion.transition",
    "CosineDecay": "lightning_modules.ssl.schedules",
    "CurriculumLabeling": "lightning_modules.ssl.curriculum_labeling",
    "Dash": "lightning_modules.ssl.dash",
    "Distillation": "lightning_modules.ssl.distillation",
    "DivideMix": "lightning_modules.ssl.dividemix",
    "EDMProcess": "lightning_modules.diffusion.noise",
    "FileTransition": "lightning_modules.diffusion.transition",
    "FixMatch": "lightning_modules.ssl.fixmatch",
    "FlexMatch": "lightning_modules.ssl.flexmatch",
    "FrechetDistance": "lightning_modules.metrics.frechet",
    "FreeMatch": "lightning_modules.ssl.freematch",
    "HybridSegmentation": "lightning_modules.hybrid_segmentation",
    "ICT": "lightning_modules.ssl.ict",
    "IdentityTransition": "lightning_modules.diffusion.transition",
    "InceptionFeatures": "lightning_modules.feature_extractors",
    "KLAutoencoder": "lightning_modules.networks.autoencoder",
    "LEDMSegmentation": "lightning_modules.ledm_segmentation",
    "LabelConsistency": "lightning_modules.metrics.classifier_verdicts",
    "LabelPropagation": "lightning_modules.ssl.label_propagation",
    "LatentSpace": "lightning_modules.latent_space",
    "LearnedTransition": "lightning_modules.diffusion.learned_transition",
    "LinearProbe": "lightning_modules.linear_probe",
    "ManifoldMetrics": "lightning_modules.metrics.manifold",
    "MaskedSiamese": "lightning_modules.masked_siamese",
    "MeanTeacher": "lightning_modules.ssl.mean_teacher",
    "MetaPseudoLabels": "lightning_modules.ssl.meta_pseudo_labels",
    "Method": "lightning_modules.ssl.base",
    "MixMatch": "lightning_modules.ssl.mixmatch",
    "NoisyLabelClassifier": "lightning_modules.noisy_label_classifier",
    "MLPDenoiser": "lightning_modules.networks.mlp_denoiser",
    "NoisyResNet": "lightning_modules.networks.noisy_resnet",
    "NoisyStudent": "lightning_modules.ssl.noisy_student",
    "PiModel": "lightning_modules.ssl.pi_model",
    "PseudoLabel": "lightning_modules.ssl.pseudo_label",
    "Ramp": "lightning_modules.ssl.ramps",
    "ReMixMatch": "lightning_modules.ssl.remixmatch",
    "SSLClassifier": "lightning_modules.ssl_classifier",
    "SimMatch": "lightning_modules.ssl.simmatch",
    "SoftMatch": "lightning_modules.ssl.softmatch",
    "SoftPseudoLabels": "lightning_modules.ssl.soft_pseudo_labels",
    "Supervised": "lightning_modules.ssl.supervised",
    "SymmetricTransition": "lightning_modules.diffusion.transition",
    "TDSMDiffusion": "lightning_modules.tdsm_diffusion",
    "TemporalEnsembling": "lightning_modules.ssl.temporal_ensembling",
    "TimmClassifier": "lightning_modules.networks.timm_classifier",
    "TransitionMatrix": "lightning_modules.diffusion.transition",
    "UDA": "lightning_modules.ssl.uda",
    "UViT": "lightning_modules.networks.uvit",
    "VAETraining": "lightning_modules.vae_training",
    "VAT": "lightning_modules.ssl.vat",
    "VPProcess": "lightning_modules.diffusion.vp_noise",
    "VPSDEProcess": "lightning_modules.diffusion.vp_noise",
    "ViTEncoder": "lightning_modules.networks.vit_encoder",
    "WarmUpCosine": "lightning_modules.ssl.schedules",
    "WideResNet": "lightning_modules.networks.wide_resnet",
    "export_checkpoint": "lightning_modules.export",
}

__all__ = [
    "ICT",
    "UDA",
    "VAT",
    "ADMUNet",
    "AdaMatch",
    "AdversarialTraining",
    "AsymmetricTransition",
    "ClassUNet",
    "ClassificationAccuracyScore",
    "ClassifierFeatures",
    "ClassifierScore",
    "CoMatch",
    "ConfusionTransition",
    "ConvNet",
    "CosineDecay",
    "CurriculumLabeling",
    "Dash",
    "Distillation",
    "DivideMix",
    "EDMProcess",
    "FileTransition",
    "FixMatch",
    "FlexMatch",
    "FrechetDistance",
    "FreeMatch",
    "HybridSegmentation",
    "IdentityTransition",
    "InceptionFeatures",
    "KLAutoencoder",
    "LEDMSegmentation",
    "LabelConsistency",
    "LabelPropagation",
    "LatentSpace",
    "LearnedTransition",
    "LinearProbe",
    "MLPDenoiser",
    "ManifoldMetrics",
    "MaskedSiamese",
    "MeanTeacher",
    "MetaPseudoLabels",
    "Method",
    "MixMatch",
    "NoisyLabelClassifier",
    "NoisyResNet",
    "NoisyStudent",
    "PiModel",
    "PseudoLabel",
    "Ramp",
    "ReMixMatch",
    "SSLClassifier",
    "SimMatch",
    "SoftMatch",
    "SoftPseudoLabels",
    "Supervised",
    "SymmetricTransition",
    "TDSMDiffusion",
    "TemporalEnsembling",
    "TimmClassifier",
    "TransitionMatrix",
    "UViT",
    "VAETraining",
    "VPProcess",
    "VPSDEProcess",
    "ViTEncoder",
    "WarmUpCosine",
    "WideResNet",
    "export_checkpoint",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)
