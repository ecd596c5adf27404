"""How well a classifier does that has seen drawn images only."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.metrics.generation import GenerationMetric
from lightning_modules.networks.modes import evaluating, fresh_copy
from lightning_modules.ssl.companions import with_classes


class ClassificationAccuracyScore(GenerationMetric):
    """Accuracy on real test images of a classifier that is trained on drawn images and the classes asked for.

    CAS of Ravuri & Vinyals (2019, arXiv 1905.10887). `compute` trains a copy of the network with new weights: Adam, a
    cosine to zero, no augmentation, then BatchNorm statistics of the drawn images and the last weights. Same images,
    same seed: same value, whatever else draws random numbers; none of theirs are touched. Images are kept in 8 bits.
    Logged as `cas_` and the type of the network in lower case; it does not depend on a feature extractor.

    Args:
        network: Classifier of images in [0, 1]; it is given as many classes as the data have where it has a
            `reset_classifier(num_classes)`. Its weights are not used.
        steps: Training steps.
        batch_size: Drawn images of a step.
        learning_rate: Of Adam, at the start.
        seed: Seed of weights, order and dropout.

    Raises:
        ValueError: A number is out of range.
    """

    needs_images = True

    real_images: list[Tensor]
    real_labels: list[Tensor]
    drawn_images: list[Tensor]
    drawn_labels: list[Tensor]

    def __init__(
        self, network: nn.Module, steps: int = 1000, batch_size: int = 128, learning_rate: float = 1e-3, seed: int = 0
    ) -> None:
        super().__init__()
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if value < 1:
                msg = f"Expected `{name}` to be at least 1, got {value}; leave the metric out to train nothing."
                raise ValueError(msg)
        if not 0 < learning_rate < float("inf"):
            msg = f"Expected a positive `learning_rate`, got {learning_rate}; Adam's usual one is 1e-3."
            raise ValueError(msg)
        self.network = network
        self.name = f"cas_{type(network).__name__.lower()}"
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.seed = seed

    def add_states(self) -> None:
        """Lists of 8-bit images and of labels."""
        for name in ("real_images", "real_labels", "drawn_images", "drawn_labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def add(self, features: Tensor, labels: Tensor, probabilities: Tensor, real: bool, images: Tensor | None) -> None:
        """Append a batch."""
        pixels = (torch.as_tensor(images).detach().float().clamp(0, 1) * 255).round().byte()
        if real:
            self.real_images.append(pixels)
            self.real_labels.append(labels)
        else:
            self.drawn_images.append(pixels)
            self.drawn_labels.append(labels)

    def compute(self) -> Tensor:
        """Train on the drawn images, test on the real ones; takes as long as `steps` steps of the network.

        Returns:
            Share of the real images that were classified rightly, a float64 scalar.

        Raises:
            ValueError: There are no real or no drawn images.
        """
        self.require_images(self.real_count, self.drawn_count)
        drawn = dim_zero_cat(self.drawn_images), dim_zero_cat(self.drawn_labels)
        real = dim_zero_cat(self.real_images), dim_zero_cat(self.real_labels)
        device = drawn[0].device
        devices = [device] if device.type == "cuda" else []
        # An evaluation has switched gradients off, and may run at another precision.
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            torch.default_generator.manual_seed(self.seed)
            if devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(self.seed)
            # Made outside of inference mode, a copy can be trained on and with.
            network = with_classes(copy.deepcopy(self.network).cpu(), self.num_classes)
            network = fresh_copy(network).to(device).requires_grad_(True)
            self._train(network, drawn[0].clone(), drawn[1].clone())
        return self._accuracy(network, *real)

    def _train(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        generator = torch.Generator().manual_seed(self.seed)
        batch = min(self.batch_size, len(images))
        order = torch.empty(0, dtype=torch.long)
        network.train()
        for _ in range(self.steps):
            if len(order) < batch:
                # What is left of an epoch is short of a batch: batches of one size keep BatchNorm's noise the same.
                order = torch.randperm(len(images), generator=generator)
            rows, order = order[:batch].to(images.device), order[batch:]
            loss = F.cross_entropy(network(images[rows].float() / 255), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        # Running averages may remember random weights: their memory is made for other numbers of steps.
        update_bn((part.float() / 255 for part in torch.split(images, batch) if len(part) > 1), network)

    @torch.no_grad()
    def _accuracy(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        parts = zip(torch.split(images, self.batch_size), torch.split(labels, self.batch_size), strict=True)
        with evaluating(network):
            right = [(network(part.float() / 255).argmax(1) == label).double() for part, label in parts]
        return torch.cat(right).mean()
