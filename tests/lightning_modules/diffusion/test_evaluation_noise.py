"""Noise of an evaluation is a function of the image's index; noise levels fall into equal bins."""

import torch

from lightning_modules.diffusion.evaluation_noise import bin_names, evaluation_noise, level_bin
from lightning_modules.diffusion.noise import EDMProcess
from lightning_modules.diffusion.vp_noise import VPProcess


def test_noise_depends_on_the_index_alone() -> None:
    process = EDMProcess()
    index, like = torch.tensor([5, 0, 3]), torch.zeros(3, 1, 4, 4)
    sigma, eps = evaluation_noise(process, index, like)
    for place, number in enumerate([5, 0, 3]):
        one_sigma, one_eps = evaluation_noise(process, torch.tensor([number]), like[:1])
        assert torch.equal(one_sigma[0], sigma[place])
        assert torch.equal(one_eps[0], eps[place])
    many, _ = evaluation_noise(process, torch.arange(1000), torch.zeros(1000, 1))
    counts = torch.histc(process.level(many), 10, 0, 1)
    assert int(counts.min()) >= 98  # evenly spread over the levels
    assert int(counts.max()) <= 102


def test_levels_fall_into_equal_bins() -> None:
    process = VPProcess()
    level = torch.tensor([0.0, 0.001, 0.25, 0.26, 0.99, 1.0])
    assert level_bin(process, process.sigma_at(level), 4).tolist() == [0, 1, 1, 2, 4, 4]
    assert bin_names(2) == ["clean", "level_0.00_to_0.50", "level_0.50_to_1.00"]
