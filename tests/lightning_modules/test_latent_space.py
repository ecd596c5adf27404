"""The frozen autoencoder: what it encodes and decodes, where its weights come from, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_autoencoders import fitted, tiny_autoencoder, tiny_latent_space
from tiny_nets import Segmenter, Squares, adamw, squares_loader, tiny_trainer
from torch import nn

from lightning_modules import HybridSegmentation, KLAutoencoder, LatentSpace, export_checkpoint
from lightning_modules.networks.autoencoder import LOG_VARIANCE_RANGE, kl_divergence

IMAGE = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a fit of two epochs; not to be written to."""
    return fitted(tmp_path_factory.mktemp("vae"))[2]


def test_moments_are_those_of_diffusers(tmp_path: Path) -> None:
    space = tiny_latent_space(tmp_path / "vae")
    vae: Any = AutoencoderKL
    theirs = vae.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False).encode(2 * IMAGE - 1).latent_dist
    moments = space.moments(IMAGE)
    assert (space.channels, space.factor, space.image_channels) == (2, 2, 3)
    torch.testing.assert_close(moments, torch.cat([theirs.mean, theirs.logvar], 1))
    assert not moments.requires_grad


def test_log_variances_are_cut_off(tmp_path: Path) -> None:
    space = tiny_latent_space(tmp_path / "vae")
    space.get_parameter("vae.quant_conv.bias")[2:] = torch.tensor([1e3, -1e3])
    log_variance = space.moments(IMAGE)[:, 2:]
    assert (float(log_variance.min()), float(log_variance.max())) == LOG_VARIANCE_RANGE


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_latents_have_the_deviation_and_decoding_undoes_it(sigma_data: float, tmp_path: Path) -> None:
    space = tiny_latent_space(tmp_path / "vae", sigma_data=sigma_data)
    torch.manual_seed(0)
    images = torch.rand(512, 3, 8, 8)
    moments = space.moments(images)
    means = moments[:, :2]
    z = space.sample(moments, noise=torch.zeros_like(means))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=0.1 * sigma_data, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.full((2,), sigma_data), rtol=0.1, atol=0)
    expected = (space.vae.decode(means).sample.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(space.decode(z), expected, atol=1e-5, rtol=1e-4)


def test_samples_have_the_moments_deviation(tmp_path: Path) -> None:
    space = tiny_latent_space(tmp_path / "vae")
    moments = torch.cat([torch.full((4000, 2, 1, 1), 3.0), torch.full((4000, 2, 1, 1), 2.0).log()], 1)
    z = space.sample(moments, torch.Generator().manual_seed(0)) / space.scale + space.shift
    assert float(z.mean()) == pytest.approx(3.0, abs=0.1)
    assert float(z.var()) == pytest.approx(2.0, rel=0.1)
    again = space.sample(moments, torch.Generator().manual_seed(0)) / space.scale + space.shift
    assert torch.equal(z, again)


@pytest.mark.parametrize(("shift", "expected"), [(None, 0.0), (0.25, 0.25)])
def test_one_factor_scales_where_there_are_no_deviations(shift: float | None, expected: float, tmp_path: Path) -> None:
    vae = tiny_autoencoder().vae
    vae.register_to_config(scaling_factor=0.18215, shift_factor=shift)
    vae.save_pretrained(tmp_path / "vae")
    space = LatentSpace(folder=str(tmp_path / "vae"))
    moments = space.moments(IMAGE)
    noise = torch.ones(5, 2, 4, 4)
    raw = moments[:, :2] + (0.5 * moments[:, 2:]).exp()
    torch.testing.assert_close(space.sample(moments, noise=noise), 0.18215 * (raw - expected))


def test_it_is_never_trained(tmp_path: Path) -> None:
    space = tiny_latent_space(tmp_path / "vae")
    before = {name: value.clone() for name, value in space.state_dict().items()}
    space.train()
    assert not any(module.training for module in space.modules())
    assert not any(p.requires_grad for p in space.parameters())
    z = space.sample(space.moments(IMAGE.clone().requires_grad_()))
    assert not z.requires_grad
    assert not space.decode(z.requires_grad_()).requires_grad
    assert all(torch.equal(before[name], value) for name, value in space.state_dict().items())


def test_a_checkpoint_is_read_at_its_first_use_and_has_averaged_weights_and_unit_deviation(checkpoint: Path) -> None:
    space = LatentSpace(tiny_autoencoder(), init_from=str(checkpoint))
    assert not bool(space.filled)
    images = torch.stack([Squares()[i]["image"] for i in range(8)])
    moments = space.moments(images)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in space.vae.state_dict().items():
        assert torch.equal(value, state[f"ema.module.vae.{name}"])
    mean, variance = moments[:, :2], moments[:, 2:].exp()
    flat = mean.movedim(1, 0).flatten(1)
    total = flat.var(1, correction=0) + variance.movedim(1, 0).flatten(1).mean(1)
    torch.testing.assert_close(space.shift.flatten(), flat.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(space.scale.flatten(), total.rsqrt(), rtol=1e-4, atol=1e-5)


def test_who_loads_a_state_dict_needs_no_file(checkpoint: Path) -> None:
    space = LatentSpace(tiny_autoencoder(), init_from=str(checkpoint))
    moments = space.moments(IMAGE)
    other = LatentSpace(tiny_autoencoder(), init_from="gone.ckpt")
    other.load_state_dict(space.state_dict())
    assert torch.equal(other.moments(IMAGE), moments)
    assert other.fingerprint() == space.fingerprint()


def test_an_exported_checkpoint_is_the_same_space(checkpoint: Path, tmp_path: Path) -> None:
    about = export_checkpoint(checkpoint, tmp_path / "exported")
    assert (about["weights"], about["image_channels"], about["latent_channels"]) == ("EMA", 3, 2)
    space, other = LatentSpace(tiny_autoencoder(), str(checkpoint)), LatentSpace(folder=str(tmp_path / "exported"))
    moments = space.moments(IMAGE)
    assert torch.equal(other.moments(IMAGE), moments)
    noise = torch.zeros(5, 2, 4, 4)
    torch.testing.assert_close(other.sample(moments, noise=noise), space.sample(moments, noise=noise))
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_fingerprints_tell_autoencoders_apart(tmp_path: Path) -> None:
    spaces = [tiny_latent_space(tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1))]
    prints = [space.fingerprint() for space in spaces]
    assert prints[0] == prints[1] != prints[2]
    nn.ModuleDict({"latent": spaces[0]}).load_state_dict({f"latent.{k}": v for k, v in spaces[2].state_dict().items()})
    assert spaces[0].fingerprint() == prints[2]


def test_the_divergence_is_torchs() -> None:
    torch.manual_seed(0)
    moments = torch.randn(3, 4, 2, 2)
    normal = torch.distributions.Normal(moments[:, :2], (0.5 * moments[:, 2:]).exp())
    standard = torch.distributions.Normal(torch.zeros(3, 2, 2, 2), torch.ones(3, 2, 2, 2))
    expected = torch.distributions.kl_divergence(normal, standard).sum((1, 2, 3))
    torch.testing.assert_close(kl_divergence(moments), expected)
    assert float(kl_divergence(torch.zeros(1, 4, 2, 2))) == 0.0


# -------------------------------------------------------------------- what it refuses


def _drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("quant_conv.bias")
    save_file(weights, file, metadata={"format": "pt"})


def _rename_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "export the autoencoder again"),
        (lambda f: (f / "config.json").write_text("[1]"), ValueError, "JSON object"),
        (_rename_class, ValueError, "describes UNet2DModel; give another folder"),
        (
            lambda f: (f / "diffusion_pytorch_model.safetensors").rename(f / "diffusion_pytorch_model.bin"),
            FileNotFoundError,
            "pickles",
        ),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99), ValueError, "do not fit"),
        (_drop_a_weight, ValueError, "quant_conv.bias; export it again"),
    ],
)
def test_a_spoilt_folder_is_refused(
    spoil: Callable[[Path], object], error: type[Exception], match: str, tmp_path: Path
) -> None:
    tiny_latent_space(tmp_path / "vae")
    spoil(tmp_path / "vae")
    with pytest.raises(error, match=match):
        LatentSpace(folder=str(tmp_path / "vae"))


@pytest.mark.parametrize("folder", ["nowhere", "/no/where", "some-one/some-autoencoder"])
def test_a_missing_folder_says_how_to_get_one(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"`lightning export`.*allow_download"):
        LatentSpace(folder=folder)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.fit(HybridSegmentation(Segmenter(), 2, "supervised", optimizer=adamw), squares_loader())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"VAETraining.*fit an autoencoder first"):
        LatentSpace(tiny_autoencoder(), str(tmp_path / "other.ckpt")).load()


def test_another_architecture_is_refused(checkpoint: Path) -> None:
    network = KLAutoencoder(3, 2, (8, 8), 1, norm_groups=4)
    with pytest.raises(ValueError, match=r"block_out_channels \[4, 8\] -> \[8, 8\]; give `network`"):
        LatentSpace(network, str(checkpoint)).load()


def test_weights_have_to_come_from_somewhere() -> None:
    with pytest.raises(ValueError, match="random without"):
        LatentSpace(tiny_autoencoder()).moments(IMAGE)
    with pytest.raises(ValueError, match="either `folder`, or `network`"):
        LatentSpace()
    with pytest.raises(ValueError, match="either `folder`, or `network`"):
        LatentSpace(tiny_autoencoder(), folder="x")
    with pytest.raises(ValueError, match="positive `sigma_data`"):
        LatentSpace(tiny_autoencoder(), sigma_data=0.0)


@pytest.mark.parametrize(
    ("shape", "match"), [((2, 1, 8, 8), "take an autoencoder for these images"), ((2, 3, 9, 8), "divisible by 2")]
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], match: str, tmp_path: Path) -> None:
    space = tiny_latent_space(tmp_path / "vae")
    with pytest.raises(ValueError, match=match):
        space.moments(torch.rand(shape))
    with pytest.raises(ValueError, match="give the network that draws them 2 channels"):
        space.decode(torch.rand(2, 4, 4, 4))


@pytest.mark.parametrize("arguments", [{"norm_groups": 3}, {"latent_channels": 0}, {"block_out_channels": ()}])
def test_an_impossible_architecture_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"Expected `(block_out_channels|latent_channels)`"):
        KLAutoencoder(**{"block_out_channels": (4, 8), "norm_groups": 4} | arguments)  # type: ignore[arg-type] # wrong on purpose
