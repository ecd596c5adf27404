from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks import pixel_classifiers
from lightning_modules.networks.pixel_classifiers import PixelClassifiers, features_at, interpolation_matrix
from lightning_modules.uncertainty import entropy, jensen_shannon

# Neither side is a multiple of the maps' sides everywhere, and one map is as large as the image.
SIZE = (12, 10)
SHAPES = [(4, 3, 2), (3, 3, 2), (5, 6, 5), (2, 12, 10), (1, 1, 1), (2, 5, 7)]


def _maps(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, c, h, w, generator=generator) for c, h, w in SHAPES]


def _full(maps: list[Tensor]) -> Tensor:
    """The feature vectors of all pixels, the memory-hungry way: [B, D, H, W]."""
    return torch.cat([F.interpolate(f, SIZE, mode="bilinear", align_corners=False) for f in maps], 1)


def _trained(num_classes: int = 3, num_members: int = 4) -> PixelClassifiers:
    """An ensemble whose every number matters."""
    torch.manual_seed(1)
    ensemble = PixelClassifiers(17, num_classes, num_members, (8, 6))
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.normal_()
        for name, buffer in ensemble.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2.0) if name.endswith("var") else buffer.normal_()
    return ensemble


def _alone(ensemble: PixelClassifiers, member: int) -> nn.Sequential:
    """One member as the plain network of the paper's code."""
    h1, h2 = 8, 6
    network = nn.Sequential(
        nn.Linear(17, h1),
        nn.ReLU(),
        nn.BatchNorm1d(h1),
        nn.Linear(h1, h2),
        nn.ReLU(),
        nn.BatchNorm1d(h2),
        nn.Linear(h2, 3),
    )
    for i, layer in enumerate((0, 3, 6)):
        network[layer].load_state_dict({"weight": ensemble.weights[i][member].t(), "bias": ensemble.biases[i][member]})
    for layer, width, norm in ((2, h1, ensemble.norm1), (5, h2, ensemble.norm2)):
        mine = slice(member * width, (member + 1) * width)
        network[layer].load_state_dict({n: v[mine] if v.ndim else v for n, v in norm.state_dict().items()})
    return network


def test_interpolation_is_torchs() -> None:
    for length, size in ((1, 4), (3, 12), (5, 7), (8, 8), (16, 256), (7, 5)):
        line = torch.randn(2, 1, length)
        expected = F.interpolate(line, size, mode="linear", align_corners=False)
        torch.testing.assert_close(line @ interpolation_matrix(length, size).t(), expected)


def test_features_of_single_pixels_are_those_of_the_upsampled_maps_also_at_the_borders() -> None:
    maps = _maps()
    y, x = torch.meshgrid(*(torch.arange(side) for side in SIZE), indexing="ij")
    row = torch.tensor([0, 2, 1]).repeat_interleave(y.numel())
    found = features_at(maps, row, y.flatten().repeat(3), x.flatten().repeat(3), SIZE)
    expected = _full(maps)[[0, 2, 1]].movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_members_are_the_separate_networks(training: bool) -> None:
    ensemble = _trained().train(training)
    separate = [_alone(ensemble, m).train(training) for m in range(4)]
    x, target = torch.randn(4, 20, 17), torch.randint(3, (4, 20))
    losses = torch.stack([F.cross_entropy(network(x[m]), target[m]) for m, network in enumerate(separate)])
    found = ensemble.loss(x, target)
    torch.testing.assert_close(found, losses)
    torch.autograd.backward(losses.sum())
    torch.autograd.backward(found.sum())
    for m, network in enumerate(separate):
        for i, layer in enumerate((0, 3, 6)):
            expected = network[layer].get_parameter("weight").grad
            weight = ensemble.weights[i].grad
            assert expected is not None
            assert weight is not None
            torch.testing.assert_close(weight[m], expected.t(), rtol=1e-4, atol=1e-5)
        for layer, norm in ((2, ensemble.norm1), (5, ensemble.norm2)):
            for name, expected in network[layer].named_buffers():
                own = norm.get_buffer(name)
                torch.testing.assert_close(own.view(4, -1)[m] if own.ndim else own, expected)


def test_members_do_not_influence_each_other() -> None:
    ensemble, x, target = _trained(), torch.randn(4, 20, 17), torch.randint(3, (4, 20))
    torch.autograd.backward(ensemble.loss(x, target)[2])
    for parameter in (*ensemble.weights, *ensemble.biases):
        assert parameter.grad is not None
        assert parameter.grad[2].any()
        assert not parameter.grad[[0, 1, 3]].any()
    before = ensemble.loss(x, target).detach()
    x[1], target[1] = 100.0 * torch.randn(20, 17), 0
    after = ensemble.loss(x, target).detach()
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert before[1] != after[1]


@pytest.mark.parametrize("pixels", [8192, 240, 50, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_prediction_is_that_of_the_full_resolution_features(
    pixels: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many pixels are worked on at a time, and whatever mode the module is in."""
    monkeypatch.setattr(pixel_classifiers, "PIXELS_AT_ONCE", pixels)
    ensemble, maps = _trained(), _maps()
    vectors = _full(maps).movedim(1, -1).flatten(0, 2)
    members = []
    for m in range(4):
        logits = _alone(ensemble, m).eval()(vectors)
        members.append(logits.softmax(1).view(3, *SIZE, 3).movedim(-1, 1).detach())
    p = torch.stack(members)
    if channels_last:
        maps = [features.to(memory_format=torch.channels_last) for features in maps]
    said = ensemble.predict(maps, SIZE)
    torch.testing.assert_close(said.probabilities, p.mean(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(said.entropy, torch.stack([entropy(member) for member in p]).mean(0), rtol=0, atol=1e-4)
    votes = F.one_hot(p.argmax(2), 3).float().mean(0).movedim(-1, 1)
    torch.testing.assert_close(said.votes, votes)
    disagreement = entropy(said.probabilities) - said.entropy
    torch.testing.assert_close(disagreement.clamp(min=0), jensen_shannon(p), rtol=0, atol=1e-4)
    assert disagreement.max() > 0.1


def test_maps_of_sixteen_bits_are_computed_with_in_thirty_two() -> None:
    ensemble, maps = _trained(), [features.bfloat16() for features in _maps()]
    expected = ensemble.predict([features.float() for features in maps], SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        said = ensemble.predict(maps, SIZE)
        logits = ensemble(torch.randn(4, 5, 17))
    assert torch.equal(said.probabilities, expected.probabilities)
    assert logits.dtype == torch.float32


def test_widths_and_start_are_the_papers() -> None:
    few, many = PixelClassifiers(300, 29, 6), PixelClassifiers(300, 30, 2)
    assert [tuple(w.shape) for w in few.weights] == [(6, 300, 128), (6, 128, 32), (6, 32, 29)]
    assert [tuple(w.shape) for w in many.weights] == [(2, 300, 256), (2, 256, 128), (2, 128, 30)]
    assert few.weights[0].std().item() == pytest.approx(0.02, rel=0.01)
    assert not torch.equal(few.weights[0][0], few.weights[0][1])
    assert not any(bias.any() for bias in few.biases)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: PixelClassifiers(4, 2, 0), "`num_members` >= 1, got 0; 10 is usual"),
        (lambda: PixelClassifiers(4, 2, 1, (0, 3)), r"`hidden` to be two positive widths, got \(0, 3\)"),
    ],
)
def test_bad_configuration(build: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()
