"""MixMatch: guess labels, sharpen them, mix everything with everything."""

import torch

from lightning_modules.ssl.base import Batch, Host, Loss, Method, Views, view_keys
from lightning_modules.ssl.mixing import guess_of, mixup, one_hot
from lightning_modules.ssl.parts import frozen_statistics, sharpen, soft_cross_entropy, squared_error
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import at_least_zero


class MixMatch(Method):
    """Ls = mean H(y', p(x')), Lu = mean_{b,c} (q' - p(u'))^2 on mixed images x', u' and their mixed labels y', q'.

    Berthelot et al., "MixMatch", arXiv 1905.02249, algorithm 1, equations 2 to 5. The guess is the mean prediction
    of K weak views of an image, sharpened; the same guess is the label of each of the K. Labelled and unlabelled
    images are shuffled together and each is mixed with the one it meets, with a lambda of its own. Reference
    settings: K 2, temperature 0.5, alpha 0.75 and weight 75 for CIFAR-10 (150 for CIFAR-100), which grows over the
    first 1/64 of the training. Guesses are made without gradient and move no running statistics; the mixed images
    go through the network in one forward, which does. (The authors interleave them in several forwards, to the same
    end: each BatchNorm sees both kinds.)

    Args:
        num_views: K >= 1 weak views of an unlabelled image.
        temperature: T >= 0 of the sharpening; 0 makes hard labels.
        alpha: lambda ~ Beta(alpha, alpha); 0 mixes nothing.

    Raises:
        ValueError: An argument is out of range.
    """

    batch_norm = "joint"
    ramp = Ramp(weight=75.0, until=1 / 64)

    def __init__(self, num_views: int = 2, temperature: float = 0.5, alpha: float = 0.75) -> None:
        super().__init__()
        if num_views < 1:
            msg = f"Expected `num_views` >= 1, got {num_views}; 2 is the reference."
            raise ValueError(msg)
        self.views = Views(labeled=("weak",), unlabeled=("weak",) * num_views)
        self.temperature = at_least_zero("temperature", temperature)
        self.alpha = at_least_zero("alpha", alpha)

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu Lu of a mixed batch."""
        views = [unlabeled[key] for key in view_keys(self.views.unlabeled)]
        with torch.no_grad(), frozen_statistics(m.network):
            mean = torch.stack([m.network(view).float().softmax(-1) for view in views]).mean(0)
        guess = sharpen(mean, self.temperature)
        given = one_hot(labeled["label"], m.num_classes)
        image, target = mixup(
            torch.cat([labeled["image"], *views]), torch.cat([given, *[guess] * len(views)]), self.alpha
        )
        logits = m.network(image).float()
        size = len(given)
        return Loss(
            sup=soft_cross_entropy(logits[:size], target[:size]).mean(),
            unsup=squared_error(logits[size:].softmax(-1), target[size:]).mean(),
            guess=guess_of(mean),
        )
