"""Temporal Ensembling: its averages against a naive loop, epochs that see a part of the images, and its memory."""

import copy

import pytest
import torch
from ssl_toys import ToyHost, toy_batch
from torch import Tensor

from lightning_modules.ssl.temporal_ensembling import TemporalEnsembling


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


class Fixed(torch.nn.Module):
    """A network whose predictions are the images: logits are the logarithms of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.scale * image.flatten(1).clamp_min(1e-30).log()
        return logits


def host_of(num_images: int = 4, num_classes: int = 2, alpha: float = 0.6) -> ToyHost:
    images = torch.full((num_images, num_classes, 1, 1), 1 / num_classes)
    return ToyHost(TemporalEnsembling(alpha), Fixed(), num_classes=num_classes, images=images, num_labeled=2)


def see(host: ToyHost, index: list[int], probabilities: list[list[float]]) -> tuple[float, Tensor]:
    """Train on unlabelled images with these predictions; return the loss and the weights of the images."""
    labeled = {"image": host.images[:2], "label": torch.tensor([0, 1]), "index": torch.arange(2)}
    image = torch.tensor(probabilities)[:, :, None, None]
    loss = host.method.loss(host, labeled, {"weak": image, "index": torch.tensor(index)})
    assert loss.guess is not None
    return float(loss.unsup), loss.guess.weight


def method_of(host: ToyHost) -> TemporalEnsembling:
    assert isinstance(host.method, TemporalEnsembling)
    return host.method


def test_the_correction_of_the_start_has_the_published_values() -> None:
    host = host_of()
    see(host, [0], [[1.0, 0.0]])
    host.method.epoch_end(host)
    torch.testing.assert_close(method_of(host).targets(torch.tensor([0]))[0], torch.tensor([[1.0, 0.0]]))
    see(host, [0], [[0.0, 1.0]])
    host.method.epoch_end(host)
    torch.testing.assert_close(method_of(host).targets(torch.tensor([0]))[0], torch.tensor([[0.375, 0.625]]))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.95])
def test_a_constant_prediction_is_its_own_target_in_every_epoch(alpha: float) -> None:
    host = host_of(alpha=alpha)
    for _ in range(5):
        see(host, [1], [[0.3, 0.7]])
        host.method.epoch_end(host)
        torch.testing.assert_close(method_of(host).targets(torch.tensor([1]))[0], torch.tensor([[0.3, 0.7]]))


def test_partial_epochs_and_repeats_follow_a_naive_loop() -> None:
    torch.manual_seed(0)
    alpha, host = 0.6, host_of(num_images=6, num_classes=3)
    history: dict[int, list[list[float]]] = {i: [] for i in range(6)}
    for _ in range(6):
        epoch: dict[int, list[list[float]]] = {}
        for _ in range(2):
            index = torch.randint(0, 5, (3,)).tolist()  # the last image is never seen, some are seen twice
            p = torch.rand(3, 3).softmax(1).tolist()
            see(host, index, p)
            for i, row in zip(index, p, strict=True):
                epoch.setdefault(i, []).append(row)
        host.method.epoch_end(host)
        for i, rows in epoch.items():
            history[i].append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
    targets, known = method_of(host).targets(torch.arange(6))
    assert known.tolist() == [bool(history[i]) for i in range(6)]
    assert not known[5]
    assert len({len(rows) for rows in history.values()}) > 2
    for i, rows in history.items():
        z = [0.0, 0.0, 0.0]
        for row in rows:
            z = [alpha * a + (1 - alpha) * b for a, b in zip(z, row, strict=True)]
        expected = [a / (1 - alpha ** len(rows)) for a in z] if rows else z
        torch.testing.assert_close(targets[i], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_images_weigh_nothing_before_their_first_epoch_ended() -> None:
    host = host_of()
    unsup, weight = see(host, [0, 1], [[0.9, 0.1], [0.2, 0.8]])
    assert (unsup, weight.tolist()) == (0.0, [0, 0])
    unsup, _ = see(host, [0, 1], [[0.5, 0.5], [0.5, 0.5]])
    assert unsup == 0.0
    host.method.epoch_end(host)
    unsup, weight = see(host, [0, 3], [[0.9, 0.1], [0.2, 0.8]])
    # The mean is over the whole batch: 0.9 against (0.9 + 0.5) / 2, and an image without a target.
    assert weight.tolist() == [1, 0]
    assert unsup == pytest.approx((0.9 - 0.7) ** 2 / 2, rel=1e-4)


def test_targets_do_not_follow_the_epoch_that_they_are_used_in() -> None:
    host = host_of()
    see(host, [0], [[0.9, 0.1]])
    host.method.epoch_end(host)
    before = method_of(host).targets(torch.tensor([0]))[0]
    see(host, [0], [[0.1, 0.9]])
    assert torch.equal(method_of(host).targets(torch.tensor([0]))[0], before)


def test_gradients_reach_the_network_and_statistics_are_of_all_images_together() -> None:
    host = ToyHost(TemporalEnsembling())
    labeled, unlabeled = toy_batch(host)
    host.method.loss(host, labeled, unlabeled)
    host.method.epoch_end(host)
    unlabeled = {**unlabeled, "weak": unlabeled["weak"] + 0.3}
    twin = copy.deepcopy(host.network)
    twin(torch.cat([labeled["image"], unlabeled["weak"]]))
    unsup = torch.as_tensor(host.method.loss(host, labeled, unlabeled).unsup)
    assert all(torch.equal(a, b) for a, b in zip(host.network.buffers(), twin.buffers(), strict=True))
    found = torch.autograd.grad(unsup, list(host.network.parameters()))
    assert sum(float(g.abs().sum()) for g in found) > 0
    assert not any(buffer.requires_grad for buffer in host.method.buffers())


def test_all_processes_remember_the_images_of_all() -> None:
    class Two(ToyHost):
        def gather(self, *tensors: Tensor) -> list[Tensor]:
            index, p = tensors
            return [torch.cat([index, index + 1]), torch.cat([p, p.flip(1)])]

    host = Two(TemporalEnsembling(), Fixed(), 2, torch.full((4, 2, 1, 1), 0.5), num_labeled=2)
    see(host, [0, 2], [[0.9, 0.1], [0.6, 0.4]])
    host.method.epoch_end(host)
    expected = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    torch.testing.assert_close(method_of(host).targets(torch.arange(4))[0], expected)


def test_a_state_dict_in_the_middle_of_an_epoch_holds_everything() -> None:
    host, other = host_of(), host_of()
    see(host, [0, 1], [[0.9, 0.1], [0.2, 0.8]])
    host.method.epoch_end(host)
    see(host, [1, 2], [[0.4, 0.6], [0.3, 0.7]])
    other.method.load_state_dict(host.method.state_dict())
    for each in (host, other):
        see(each, [2, 3], [[0.5, 0.5], [0.1, 0.9]])
        each.method.epoch_end(each)
    index = torch.arange(4)
    assert torch.equal(method_of(host).targets(index)[0], method_of(other).targets(index)[0])


@pytest.mark.parametrize("alpha", [-0.1, 1.0])
def test_a_decay_that_makes_no_sense_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="`alpha`"):
        TemporalEnsembling(alpha)
