"""Virtual adversarial training: agree with oneself where that is hardest, nearby."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_modules.ssl.adversarial_training import of_length
from lightning_modules.ssl.base import Batch, Host, Loss, Method, Views
from lightning_modules.ssl.parts import cross_entropy, entropy, frozen_statistics
from lightning_modules.ssl.ramps import Ramp
from lightning_modules.ssl.thresholds import at_least_zero


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) of logits [B, K] each: [B]."""
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _with_same_noise(network: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The network, drawing the same random numbers (dropout) in each call."""
    cuda = device.type == "cuda"
    state = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()

    def forward(image: Tensor) -> Tensor:
        if cuda:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        logits: Tensor = network(image)
        return logits.float()

    return forward


class VAT(Method):
    """Lu = mean_b KL(p(u) || p(u + r)), r = epsilon g / |g|, g = grad_d KL(p(u) || p(u + xi d)), d random of length 1.

    Miyato et al., "Virtual Adversarial Training", arXiv 1704.03976, section 3. p(u) and r are
    constants to the gradient. Reference settings for CIFAR-10: one iteration, weight 1 and epsilon 8 with images of
    range 1 (theirs); weight 0.3 with a ramp over 40 % of the training and epsilon 6 with images in [-1, 1], which
    is 3 here, plus 0.06 times the entropy of p(u) (Oliver et al., arXiv 1804.09170), the defaults. The authors
    count labelled images too; here the unlabelled ones, which contain them.

    The direction is a small difference of predictions, so it is worked out without autocast, and xi is not the authors'
    1e-6, at which float32 leaves mostly rounding errors. All three forwards draw the same dropout; none moves
    BatchNorm's running statistics, which labelled images alone do.

    Args:
        epsilon: Euclidean length of r over all pixels and channels, in units of images in [0, 1], whatever the
            network's mean and std. For pixels of another scale convert it (6 for images of standard deviation 1 is
            6 std here); for other sizes it grows as the root of the number of pixels: 3 at 3 x 32 x 32 is 0.43 at
            1 x 8 x 8.
        xi: Length of the step that g is taken at, same units.
        num_iterations: Power iterations, each a forward and a backward.
        entropy_weight: Weight of the entropy of p(u), not ramped; 0 leaves it out.

    Raises:
        ValueError: An argument is out of range.
    """

    views = Views(labeled=("weak",), unlabeled=("weak",))
    batch_norm = "first"
    ramp = Ramp(weight=0.3, until=0.4)

    def __init__(
        self, epsilon: float = 3.0, xi: float = 0.1, num_iterations: int = 1, entropy_weight: float = 0.06
    ) -> None:
        super().__init__()
        if not xi > 0:
            msg = f"Expected a positive `xi`, got {xi}; 0.1 is far from rounding errors."
            raise ValueError(msg)
        if num_iterations < 1:
            msg = f"Expected `num_iterations` >= 1, got {num_iterations}; 1 is the reference."
            raise ValueError(msg)
        self.epsilon = at_least_zero("epsilon", epsilon)
        self.xi = xi
        self.num_iterations = num_iterations
        self.entropy_weight = at_least_zero("entropy_weight", entropy_weight)

    def perturbation(self, forward: Callable[[Tensor], Tensor], image: Tensor, target: Tensor, start: Tensor) -> Tensor:
        """r: the change of length epsilon that moves the prediction most, by power iteration.

        Args:
            forward: Image -> logits.
            image: [B, C, H, W].
            target: Logits of the images, without gradient [B, K].
            start: The first direction, of any length [B, C, H, W].

        Returns:
            [B, C, H, W] without gradient.
        """
        d = of_length(start, 1.0)
        for _ in range(self.num_iterations):
            d.requires_grad_()
            moved = divergence(target, forward(image + self.xi * d)).sum()
            # Not backward(): the gradients of the weights are none of this step's business.
            (gradient,) = torch.autograd.grad(moved, d)
            d = of_length(gradient, 1.0)
        return self.epsilon * d

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls + mu Lu + entropy."""
        sup = cross_entropy(m.network(labeled["image"]), labeled["label"])
        image = unlabeled["weak"]
        start = torch.randn_like(image)
        forward = _with_same_noise(m.network, image.device)
        with frozen_statistics(m.network):
            with torch.autocast(image.device.type, enabled=False):
                with torch.set_grad_enabled(self.entropy_weight > 0):
                    clean = forward(image)
                target = clean.detach()
                r = self.perturbation(forward, image, target, start)
            moved = divergence(target, forward(image + r)).mean()
        uncertainty = entropy(clean).mean()
        return Loss(sup=sup, unsup=moved, aux=self.entropy_weight * uncertainty, logs={"entropy": uncertainty})
