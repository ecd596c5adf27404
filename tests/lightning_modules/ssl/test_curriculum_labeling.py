"""Curriculum Labeling: rounds that grow, labels that stay, networks that start again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ssl_toys import ToyHost, ToyNet, toy_batch
from torch import Tensor

from lightning_modules.ssl.curriculum_labeling import CurriculumLabeling


class _Restarting(ToyHost):
    """A host that counts how often its average started again."""

    restarts = 0

    def reset_ema(self) -> None:
        self.restarts += 1
        self.ema_network.load_state_dict(self.network.state_dict())


def _host(method: CurriculumLabeling | None = None) -> tuple[_Restarting, CurriculumLabeling]:
    torch.manual_seed(0)
    method = method or CurriculumLabeling(epochs_per_round=2)
    host = _Restarting(method, network=ToyNet())
    method.fit_start(host)
    return host, method


def _disturb(host: ToyHost) -> None:
    with torch.no_grad():
        for network in (host.network, host.ema_network):
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


def _chosen(method: CurriculumLabeling) -> Tensor:
    found = method.select()
    assert found is not None
    return found["unlabeled"]


def test_rounds_take_the_surest_images_until_all_are_taken() -> None:
    host, method = _host()
    sizes = []
    for epoch in range(14):
        host.current_epoch = epoch
        _disturb(host)
        average = copy.deepcopy(host.ema_network)
        begins = epoch in (2, 4, 6, 8, 10)
        method.epoch_start(host)
        if begins:
            confidence, label = average(host.images).softmax(-1).max(-1)
            assert torch.equal(method.label[6:], label[6:])
            inside = method.chosen[6:]
            if not bool(inside.all()):
                assert confidence[6:][inside].min() >= confidence[6:][~inside].max()
            assert torch.equal(_chosen(method), method.chosen.nonzero()[:, 0])
        sizes.append(int(method.chosen.sum()))
    assert sizes == [0, 0, 4, 4, 7, 7, 11, 11, 14, 14, 18, 18, 18, 18]
    assert host.restarts == 5


def test_given_labels_are_never_overwritten_nor_chosen() -> None:
    host, method = _host(CurriculumLabeling(epochs_per_round=1, step=1.0))
    host.current_epoch = 1
    method.epoch_start(host)
    assert torch.equal(method.label[:6], host.labels[:6])
    assert _chosen(method).tolist() == list(range(6, 24))


def test_each_round_starts_from_the_first_weights() -> None:
    host, method = _host()
    first = copy.deepcopy(host.network.state_dict())
    for epoch in (2, 4):
        _disturb(host)
        host.network(host.images)  # moves the running statistics
        host.current_epoch = epoch
        method.epoch_start(host)
        for network in (host.network, host.ema_network):
            assert all(torch.equal(v, first[k]) for k, v in network.state_dict().items())
    _disturb(host)
    host.current_epoch = 5
    kept = copy.deepcopy(host.network.state_dict())
    method.epoch_start(host)
    assert all(torch.equal(v, kept[k]) for k, v in host.network.state_dict().items())


def test_first_weights_are_those_at_the_start_of_the_fit_and_not_trained() -> None:
    torch.manual_seed(0)
    method = CurriculumLabeling(epochs_per_round=1)
    host = ToyHost(method, network=ToyNet())
    _disturb(host)  # as loading a checkpoint would
    method.fit_start(host)
    first = copy.deepcopy(host.network.state_dict())
    assert not [p for p in method.parameters() if p.requires_grad]
    _disturb(host)
    host.current_epoch = 1
    method.epoch_start(host)
    for network in (host.network, host.ema_network):
        assert all(torch.equal(v, first[k]) for k, v in network.state_dict().items())


def test_without_restart_the_network_goes_on() -> None:
    host, method = _host(CurriculumLabeling(epochs_per_round=1, restart=False))
    _disturb(host)
    kept = copy.deepcopy(host.network.state_dict())
    host.current_epoch = 1
    method.epoch_start(host)
    assert int(method.chosen.sum()) == 4
    assert all(torch.equal(v, kept[k]) for k, v in host.network.state_dict().items())
    assert list(method.parameters()) == []


def test_a_resumed_fit_chooses_what_it_chose() -> None:
    host, method = _host()
    host.current_epoch = 2
    method.epoch_start(host)
    other = CurriculumLabeling(epochs_per_round=2)
    ToyHost(other, network=ToyNet())
    other.load_state_dict(method.state_dict())
    assert torch.equal(_chosen(other), _chosen(method))


def test_loss_counts_chosen_images_over_the_whole_batch() -> None:
    host, method = _host()
    host.current_epoch = 4
    method.epoch_start(host)
    labeled, unlabeled = toy_batch(host)
    loss = method.loss(host, labeled, unlabeled)
    log_p = host.network(torch.cat([labeled["image"], unlabeled["strong"]])).log_softmax(-1)
    unsup = torch.zeros(())
    for i, j in enumerate(unlabeled["index"].tolist()):
        if bool(method.chosen[j]):
            unsup = unsup - log_p[6 + i, method.label[j]] / 12
    torch.testing.assert_close(loss.sup, F.nll_loss(log_p[:6], labeled["label"]))
    torch.testing.assert_close(loss.unsup, unsup)
    gradient = torch.autograd.grad(unsup, list(host.network.parameters()))
    assert sum(float(g.abs().sum()) for g in gradient) > 0


def test_round_zero_is_supervised() -> None:
    host, method = _host()
    host.current_epoch = 1
    labeled, unlabeled = toy_batch(host)
    loss = method.loss(host, labeled, unlabeled)
    assert loss.unsup == 0.0
    assert loss.guess is None
    torch.testing.assert_close(loss.sup, F.cross_entropy(host.network(labeled["image"]), labeled["label"]))
    assert _chosen(method).tolist() == list(range(24))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`step` in"):
        CurriculumLabeling(step=0.0)
    with pytest.raises(ValueError, match="`epochs_per_round` >= 1"):
        CurriculumLabeling(epochs_per_round=0)
