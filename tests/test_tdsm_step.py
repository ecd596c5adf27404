"""The parts of benchmarks/tdsm_step.py and benchmarks/threshold_bias.py that decide what they say."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from gaussian_classes import GaussianClasses, KnownPosterior
from tdsm_step import Batch, Seconds, loop_losses, table
from threshold_bias import PointNetwork

from lightning_modules.diffusion.noise import EDMProcess
from lightning_modules.diffusion.transition import SymmetricTransition
from lightning_modules.tdsm_diffusion import TDSMDiffusion

CLASSES = GaussianClasses(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), torch.full((16,), 0.5))


@pytest.mark.parametrize("threshold", [0.0, 0.01])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_loop_is_the_exact_loss_and_its_gradient(threshold: float, renormalize: bool) -> None:
    torch.manual_seed(0)
    process = EDMProcess()
    posterior = KnownPosterior(CLASSES, process, None)
    module = TDSMDiffusion(
        PointNetwork(), 5, process, classifier=posterior, others="exact", threshold=threshold, renormalize=renormalize
    )
    module.weighting.transition.copy_(SymmetricTransition(0.4).matrix(5))
    label = torch.randint(5, (32,))
    x = CLASSES.draw(label)[:, :, None, None]
    batch = Batch(x, process.sample_sigma(32), torch.randn_like(x), label.roll(1))
    found = []
    for losses in (
        loop_losses(module, module.network, batch, threshold, renormalize),
        module.loss_per_image(module.network, *batch),
    ):
        module.network.zero_grad()
        torch.autograd.backward(losses.sum())
        found.append((losses.detach(), [parameter.grad for parameter in module.network.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_the_known_posterior_and_denoiser_are_those_of_the_densities() -> None:
    torch.manual_seed(0)
    process, sigma, label = EDMProcess(), torch.tensor([0.1, 1.0, 7.0]), torch.tensor([4, 0, 2])
    z = (CLASSES.draw(label) + sigma[:, None] * torch.randn(3, 16)).requires_grad_()
    spread = (CLASSES.std**2 + sigma[:, None] ** 2).sqrt()
    density = (-0.5 * ((z[:, None] - CLASSES.mean) / spread[:, None]) ** 2 - spread[:, None].log()).sum(2)
    basis = torch.linalg.qr(torch.randn(27, 16)).Q
    x = (z.detach() @ basis.T).view(3, 3, 3, 3) * process.c_in(sigma).view(-1, 1, 1, 1)
    logits = KnownPosterior(CLASSES, process, basis)(x, process.c_noise(sigma))
    torch.testing.assert_close(logits, density.detach().log_softmax(1), rtol=1e-3, atol=1e-3)
    # Tweedie: x + sigma^2 times the score.
    (score,) = torch.autograd.grad(density.gather(1, label[:, None]).sum(), z)
    expected = z.detach() + sigma[:, None] ** 2 * score
    torch.testing.assert_close(CLASSES.denoised(z.detach(), sigma, label), expected, rtol=1e-4, atol=1e-4)


def test_ratios_are_of_the_same_round() -> None:
    found = {
        "DSM": [Seconds(0.1, 0.1), Seconds(0.2, 0.4), Seconds(0.1, 0.1)],
        "sampled": [Seconds(0.13, 0.2), Seconds(0.28, 0.4), Seconds(0.15, 0.3)],
    }
    rows = table(found, {"DSM": 0.0, "sampled": 1.0}, {"DSM": 100.0, "sampled": 110.0}).splitlines()
    assert rows[1] == "| sampled | 1.00 | 150 | 1.40 | 300 | 2.00 | 110 | 1.10 |"
