"""Which class a noisy image of a wrong label really shows: the weights of TDSMDiffusion and what they are made of."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # the name everybody reads

from lightning_modules.diffusion.denoisers import ClassDenoiser, scaled_input
from lightning_modules.diffusion.noise import NoiseProcess
from lightning_modules.diffusion.transition import TransitionMatrix, require_transition, reverse_transition
from lightning_modules.diffusion.transition_weights import (
    Others,
    log_transition,
    mixed_estimate,
    reverse_weights,
    transition_weights,
)
from lightning_modules.networks.modes import Frozen
from lightning_modules.noisy_posterior import give_classes, load_noisy_classifier

Weighting = Literal["posterior", "reverse", "none"]


class TransitionWeighting(nn.Module):
    """Weights of the classes, and estimates that are mixed with them; the arguments are those of TDSMDiffusion.

    Attributes:
        transition: T, float32 [K, K]; the identity until it is known.

    Raises:
        ValueError: An argument is out of range, or there is a classifier where none is asked or the reverse.
    """

    transition: Tensor

    def __init__(
        self,
        num_classes: int,
        weighting: Weighting,
        classifier: nn.Module | None,
        classifier_from: str | None,
        transition: TransitionMatrix | None,
        others: Others,
        threshold: float,
        renormalize: bool,
        pairs_at_once: int | None,
        temperature: float,
    ) -> None:
        super().__init__()
        for name, choice, choices in (("weighting", weighting, Weighting), ("others", others, Others)):
            if choice not in get_args(choices):
                msg = f"Expected `{name}` to be one of {', '.join(get_args(choices))}, got {choice!r}."
                raise ValueError(msg)
        if not 0 <= threshold < 1:
            msg = f"Expected `threshold` in [0, 1), got {threshold}; it is a weight, and 0 drops no class."
            raise ValueError(msg)
        if pairs_at_once is not None and pairs_at_once < 1:
            msg = f"Expected `pairs_at_once` to be at least 1, got {pairs_at_once}; None is the size of the batch."
            raise ValueError(msg)
        if temperature <= 0:
            msg = f"Expected a positive `temperature`, got {temperature}; 1 takes the classifier as it is."
            raise ValueError(msg)
        if (classifier is None) == (weighting == "posterior"):
            msg = (
                f"Expected a `classifier` of noisy images with `weighting` posterior, and only there, got "
                f"{type(classifier).__name__} with {weighting!r}; `none` is plain diffusion on the labels as they are."
            )
            raise ValueError(msg)
        self.num_classes = num_classes
        self.weighting: Weighting = weighting
        if classifier is not None:
            give_classes(classifier, num_classes)
        self.classifier = None if classifier is None else Frozen(classifier)
        self.classifier_from = classifier_from
        self.given = transition
        self.temperature = temperature
        self.register_buffer("transition", torch.eye(num_classes))
        self._how: dict[str, Any] = {"others": others, "threshold": threshold, "renormalize": renormalize}
        self._how["pairs_at_once"] = pairs_at_once

    def prepare(self, data: object, image_shape: tuple[int, int], process: NoiseProcess, space: str) -> None:
        """Get the classifier's weights and T before a fit that starts anew.

        Args:
            data: The datamodule; one that knows the noise of its labels has `transition_matrix`.
            image_shape: Side and channels of the images.
            process: The noise process.
            space: What is diffused, see `LatentImages.space`.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ValueError: The checkpoint is of something else; nobody knows T, or it is none that can be undone.
        """
        if self.weighting == "none":
            return
        found: Tensor | None = None
        if self.classifier is not None and self.classifier_from is not None:
            found = load_noisy_classifier(
                self.classifier.network,
                self.classifier_from,
                "classifier_from",
                num_classes=self.num_classes,
                image_size=image_shape[0],
                image_channels=image_shape[1],
                process_settings=process.settings(),
                space=space,
            )
        if self.given is not None:
            found = self.given.matrix(self.num_classes)
        elif found is None:
            found = getattr(data, "transition_matrix", None)
        if found is None:
            msg = (
                "Expected `transition`, got None, and neither `classifier_from` nor the datamodule knows the label "
                "noise; give one (SymmetricTransition, ConfusionTransition, ...), or learn it with "
                "NoisyLabelClassifier and LearnedTransition."
            )
            raise ValueError(msg)
        self.transition.copy_(require_transition(found, self.num_classes, "transition"))

    def weights(self, process: NoiseProcess, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor | None:
        """Weights of the classes for noisy images and their given labels.

        Args:
            process: The noise process.
            x: Noisy images x_0 + sigma eps, [B, C, H, W].
            sigma: Their noise levels, [B].
            label: Given labels, [B].

        Returns:
            [B, K], rows summing to 1; None where all weight is on the given label.
        """
        if self.weighting == "none":
            return None
        if self.classifier is None:
            return reverse_weights(label, reverse_transition(self.transition).to(label.device))
        logits = self.classifier(scaled_input(self.classifier, process, x, sigma), process.c_noise(sigma))
        return transition_weights(
            (logits.float() / self.temperature).log_softmax(1), label, log_transition(self.transition)
        )

    def estimate(
        self, denoiser: ClassDenoiser, x: Tensor, sigma: Tensor, label: Tensor, trusted: Tensor | None = None
    ) -> Tensor:
        """Estimate clean images from noisy ones of given labels, as a mixture over the clean classes.

        Args:
            denoiser: Denoiser of the clean classes.
            x: Noisy images, [B, C, H, W].
            sigma: Their noise levels, [B].
            label: Given labels [B]; K for none: such images are estimated without a class.
            trusted: Labels that are right for certain and get all weight, bool [B]; None for none.

        Returns:
            [B, C, H, W], with a gradient through the given label's estimate only.
        """
        is_null = label == self.num_classes
        weights = self.weights(denoiser.process, x, sigma, torch.where(is_null, 0, label))
        if weights is None:
            return denoiser(x, sigma, label)  # type: ignore[no-any-return]  # modules return Any
        if trusted is not None:
            right = F.one_hot(torch.where(is_null, 0, label), self.num_classes).to(weights)
            weights = torch.where(trusted[:, None], right, weights)
        # "No class" is a column of its own, and the only one that counts for an image without a label.
        of_null = F.one_hot(torch.tensor(self.num_classes), self.num_classes + 1).to(weights)
        weights = torch.where(is_null[:, None], of_null, F.pad(weights, (0, 1)))
        return mixed_estimate(denoiser, x, sigma, label, weights, **self._how)
