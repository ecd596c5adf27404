"""What is exchanged of a module, and what is refused."""

import pytest
import pytorch_lightning as pl
import torch
from ssl_toys import ToyNet

from federated.weights import load_network_state, network_state, trained_names
from lightning_modules import SSLClassifier
from lightning_modules.ssl.supervised import Supervised


def module(width: int = 4, seed: int = 0) -> SSLClassifier:
    torch.manual_seed(seed)
    return SSLClassifier(ToyNet(2, 3, width), Supervised(), num_classes=3, ema_decay=0.9)


def test_weights_arrive_and_the_moving_average_starts_from_them() -> None:
    sender, taker = module(), module(seed=1)
    state = network_state(sender)
    assert {"body.2.running_mean", "body.2.num_batches_tracked", "head.weight"} < state.keys()
    assert not any(name.startswith("ema") for name in state)
    assert taker.ema is not None
    taker.ema.n_averaged.fill_(7)
    load_network_state(taker, state)
    assert all(torch.equal(value, state[name]) for name, value in taker.network.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in taker.ema.module.state_dict().items())
    assert int(taker.ema.n_averaged) == 0


def test_weights_are_copies() -> None:
    sender = module()
    state = network_state(sender)
    before = state["head.bias"].clone()
    with torch.no_grad():
        sender.network.get_parameter("head.bias").add_(1)
    assert torch.equal(state["head.bias"], before)


def test_buffers_are_not_trained() -> None:
    state, trained = network_state(module()), trained_names(module())
    rest = {name.rpartition(".")[2] for name in state.keys() - set(trained)}
    assert rest == {"running_mean", "running_var", "num_batches_tracked"}


def test_a_model_of_another_shape_is_refused() -> None:
    before = network_state(module())
    taker = module()
    with pytest.raises(ValueError, match=r"another shape: \d+ tensors differ \(body\.1\.weight \(5, 2\) -> \(4, 2\)"):
        load_network_state(taker, network_state(module(width=5)))
    with pytest.raises(ValueError, match=r"1 tensors differ \(head\.bias absent -> \(3,\)\)"):
        load_network_state(taker, {name: value for name, value in before.items() if name != "head.bias"})
    with pytest.raises(ValueError, match=r"1 tensors differ \(more \(1,\) -> absent\)"):
        load_network_state(taker, {**before, "more": torch.zeros(1)})
    assert all(torch.equal(value, before[name]) for name, value in network_state(taker).items())


def test_a_module_without_a_network_is_refused() -> None:
    with pytest.raises(TypeError, match="`network`, which is what clients exchange, got LightningModule"):
        network_state(pl.LightningModule())
