"""The space of a frozen autoencoder, in which latent diffusion learns and draws."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_modules.checkpoints import load_checkpoint, network_weights, state_sha256
from lightning_modules.networks.autoencoder import KLAutoencoder, decode, draw, encode, factor_of
from lightning_modules.networks.pretrained import CONFIG_FILE, WEIGHTS_FILE, read_weights, write_pretrained

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

# What of an autoencoder's configuration decides its moments and cannot be read off the shapes of its weights.
_BESIDE_WEIGHTS = ("act_fn", "norm_num_groups", "down_block_types")


class LatentSpace(nn.Module):
    """A frozen autoencoder: images in [0, 1] to latents of a known deviation, and back.

    It is never trained: no parameter takes a gradient, it stays in evaluation mode, and it computes in float32.

    The encoder's latents are brought to mean 0 and deviation `sigma_data`, z = sigma_data (z_vae - shift) scale: with
    the mean and the deviation of each channel where the autoencoder brings them along (VAETraining measures them;
    diffusers calls them latents_mean and latents_std), else with the one scaling_factor (and shift_factor) of its
    configuration, 0.18215 for the f8 autoencoder of Stable Diffusion (arXiv 2112.10752, section 4.3.2 and appendix G).

    The autoencoder comes from a `folder`, or is a `network` whose weights are read from `init_from` at their first
    use: a stage may write them after this was built. What a checkpoint of a module that holds a LatentSpace brings
    along needs neither file.

    Args:
        network: The architecture that VAETraining was given.
        init_from: Checkpoint of VAETraining.
        folder: Folder in diffusers' format with config.json and safetensors, as `lightning export` writes it; pickles
            are not opened. Or, where there is no such folder, the name of an autoencoder on the Hugging Face Hub.
        allow_download: Whether such a name may be fetched; otherwise it must have been before.
        sigma_data: Deviation of the latents; 1 is usual for the noise schedules of latent diffusion.

    Attributes:
        channels: Channels of the latents.
        factor: The side of an image over the side of its latents.
        image_channels: Channels of the images.

    Raises:
        ValueError: Neither or both of `network` and `folder` are given, or the folder holds something else.
        FileNotFoundError: There is no such folder.
    """

    shift: Tensor
    scale: Tensor
    filled: Tensor

    def __init__(
        self,
        network: KLAutoencoder | None = None,
        init_from: str | None = None,
        folder: str | None = None,
        allow_download: bool = False,
        sigma_data: float = 1.0,
    ) -> None:
        """Build the autoencoder; read a folder now, a checkpoint at its first use."""
        super().__init__()
        if (network is None) == (folder is None) or (folder is not None and init_from is not None):
            msg = (
                "Expected either `folder`, or `network` with `init_from`, the architecture of an autoencoder and the "
                f"checkpoint of its training; got network {type(network).__name__}, init_from {init_from!r}, folder "
                f"{folder!r}."
            )
            raise ValueError(msg)
        if sigma_data <= 0:
            msg = f"Expected a positive `sigma_data`, got {sigma_data}; 1 leaves the latents at deviation 1."
            raise ValueError(msg)
        self.sigma_data = sigma_data
        self.init_from = init_from
        self._settings = None if network is None else network.settings()
        self.vae: AutoencoderKL = network.vae if network is not None else _from_folder(str(folder), allow_download)
        self.channels = int(self.vae.config["latent_channels"])
        self.image_channels = int(self.vae.config["in_channels"])
        self.factor = factor_of(self.vae)
        shift, scale = _normalisation(self.vae.config, self.channels)
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        # Part of the state dict: whoever loads one has weights and needs no file.
        self.register_buffer("filled", torch.tensor(folder is not None))
        self._is_filled = False
        self._fingerprint: str | None = None
        self.register_load_state_dict_post_hook(_forget_fingerprint)  # type: ignore[no-untyped-call]  # torch's
        self.vae.float().requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "LatentSpace":
        """Stay in evaluation mode."""
        return super().train(False)

    # ---------------------------------------------------------------- images and latents

    @torch.no_grad()
    def moments(self, image: Tensor) -> Tensor:
        """Encode images.

        Args:
            image: [B, C, H, W] in [0, 1], H and W divisible by `factor`.

        Returns:
            [B, 2 z, h, w] float32: means and log-variances (in [-30, 20]) of the autoencoder's own latents, before
            they are shifted and scaled.
        """
        self.load()
        with torch.autocast(image.device.type, enabled=False):
            # Noise drawn like them must not depend on how a convolution lays out its channels.
            return encode(self.vae, 2.0 * image.float() - 1.0).contiguous()

    def sample(self, moments: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Draw latents of images, of mean 0 and deviation `sigma_data` over the images.

        Args:
            moments: [B, 2 z, h, w], see `moments`.
            generator: Source of the noise; None is torch's global one.
            noise: Standard normal [B, z, h, w] instead; zeros give the means.

        Returns:
            [B, z, h, w].
        """
        self.load()
        if noise is None:
            shape, device = (len(moments), self.channels, *moments.shape[2:]), moments.device
            source = device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=source).to(device)
        return self.sigma_data * (draw(moments, noise) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents.

        Args:
            z: [B, z, h, w], of mean 0 and deviation `sigma_data`.

        Returns:
            Images [B, C, H, W] in [0, 1].

        Raises:
            ValueError: The latents do not fit.
        """
        self.load()
        if z.ndim != 4 or z.shape[1] != self.channels:
            msg = (
                f"Expected latents [B, {self.channels}, h, w], as the autoencoder has {self.channels} latent channels, "
                f"got {list(z.shape)}; give the network that draws them {self.channels} channels."
            )
            raise ValueError(msg)
        with torch.autocast(z.device.type, enabled=False):
            x = decode(self.vae, z.float() / (self.sigma_data * self.scale) + self.shift)
        return (x.clamp(-1, 1) + 1) / 2

    # ---------------------------------------------------------------- weights

    def load(self) -> None:
        """Read the weights from `init_from`, unless they are here already.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ValueError: It is that of something else, or `init_from` was not given.
        """
        if self._is_filled:  # and not the buffer each time: on a GPU that would wait for it
            return
        if not bool(self.filled):
            self._load_checkpoint()
        self._is_filled = True

    def _load_checkpoint(self) -> None:
        if self.init_from is None:
            msg = (
                "Expected `init_from` to be the checkpoint of the autoencoder's training, got None; the weights of "
                "`network` are random without."
            )
            raise ValueError(msg)
        checkpoint = load_checkpoint(self.init_from, "init_from")
        settings = checkpoint.get("meaning", {}).get("autoencoder")
        if settings is None:
            msg = (
                f"Expected `init_from` to be a checkpoint of VAETraining, but {self.init_from} is that of another "
                "module; fit an autoencoder first (configs/vae_digits.yaml), or give a `folder`."
            )
            raise ValueError(msg)
        if settings != self._settings:
            own = self._settings or {}
            differing = [f"{k} {settings.get(k)} -> {v}" for k, v in own.items() if settings.get(k) != v]
            msg = (
                f"Expected `init_from` to hold weights of this `network`, but those of {self.init_from} differ: "
                f"{'; '.join(differing)}; give `network` the arguments that the checkpoint was trained with."
            )
            raise ValueError(msg)
        state = checkpoint["state_dict"]
        if not bool(state["latents_measured"]):
            msg = (
                f"Expected `init_from` to hold the deviation of the latents, but {self.init_from} was written before "
                "the end of its first epoch; let the fit go on."
            )
            raise ValueError(msg)
        weights, _ = network_weights(checkpoint, self.init_from, "init_from")
        self.vae.load_state_dict({name.removeprefix("vae."): value for name, value in weights.items()})
        self.shift.copy_(state["latent_mean"].view(1, -1, 1, 1))
        self.scale.copy_(1.0 / state["latent_std"].view(1, -1, 1, 1))
        self.filled.fill_(True)

    def fingerprint(self) -> str:
        """SHA-256 of what decides the moments: the weights, and what their shapes leave open.

        It is worked out once: every checkpoint of a classifier of latents asks for it.
        """
        self.load()
        if self._fingerprint is None:
            config = {name: self.vae.config[name] for name in _BESIDE_WEIGHTS}
            self._fingerprint = state_sha256(self.vae.state_dict(), json.dumps(config, sort_keys=True, default=list))
        return self._fingerprint

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the autoencoder as a folder for diffusers: `AutoencoderKL.from_pretrained(folder)`.

        Mean and deviation of the latents become latents_mean and latents_std of its configuration.

        Args:
            folder: A new or empty folder; it is written whole or not at all.
            overwrite: Replace a network that was exported to it before.

        Raises:
            OSError: The folder is in use, or cannot be written; what was there still is.
        """
        self.load()
        config = json.loads(self.vae.to_json_string())
        config |= {
            "latents_mean": self.shift.flatten().tolist(),
            "latents_std": (1.0 / self.scale).flatten().tolist(),
            "scaling_factor": 1.0,
            "shift_factor": None,
        }
        write_pretrained(json.dumps(config, indent=2, sort_keys=True), self.vae.state_dict(), folder, overwrite)


def _forget_fingerprint(module: nn.Module, _: object) -> None:
    """Other weights have another."""
    if isinstance(module, LatentSpace):
        module._fingerprint = None


def _normalisation(config: Any, channels: int) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - diffusers' frozen mapping
    """Shift and scale [1, z, 1, 1] of a configuration: (z - shift) scale has deviation 1."""
    factor, mean, std = (config.get(name) for name in ("scaling_factor", "latents_mean", "latents_std"))
    scale = torch.full((channels,), 1.0 if factor is None else float(factor))
    if mean is not None and std is not None:
        shift, scale = torch.tensor(mean, dtype=torch.float32), scale / torch.tensor(std, dtype=torch.float32)
    else:
        shift = torch.full((channels,), float(config.get("shift_factor") or 0.0))
    return shift.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)


def _from_folder(folder: str, allow_download: bool) -> "AutoencoderKL":
    """Let diffusers load an autoencoder; it also knows the names that older versions gave to weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    path = Path(folder).expanduser()
    if path.is_dir():
        _require_autoencoder(path)
    elif not allow_download and (path.is_absolute() or folder.count("/") != 1):
        raise FileNotFoundError(_missing(folder))
    vae: AutoencoderKL
    try:
        vae, report = AutoencoderKL.from_pretrained(
            str(path) if path.is_dir() else folder,
            use_safetensors=True,
            local_files_only=path.is_dir() or not allow_download,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if not path.is_dir():
            raise FileNotFoundError(_missing(folder)) from error
        msg = f"Expected `folder` to hold the weights of its {CONFIG_FILE}, but those of {path} do not fit: {error}"
        raise ValueError(msg) from error
    missing = sorted(report["missing_keys"])
    if missing:
        msg = (
            f"Expected `folder` to hold all weights of the autoencoder, but in {folder} {len(missing)} are missing, "
            f"the first {missing[0]}; export it again."
        )
        raise ValueError(msg)
    return vae


def _missing(folder: str) -> str:
    return (
        f"Expected `folder` to be a folder with an autoencoder in diffusers' format, but there is none at {folder} "
        f"(looked in {Path.cwd()}); write one with `lightning export`, or, if that is a name on the Hugging Face Hub, "
        "set `allow_download: true` once where there is a network."
    )


def _require_autoencoder(path: Path) -> None:
    file = path / CONFIG_FILE
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except FileNotFoundError as error:
        msg = f"Expected `folder` to hold {CONFIG_FILE}, but there is none in {path}; export the autoencoder again."
        raise FileNotFoundError(msg) from error
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        msg = f"Expected `folder` to hold a JSON object in {CONFIG_FILE}, got {file}; export the autoencoder again."
        raise ValueError(msg) from error
    if name != "AutoencoderKL":
        msg = f"Expected `folder` to hold an AutoencoderKL, but {file} describes {name}; give another folder."
        raise ValueError(msg)
    if not (path / WEIGHTS_FILE).is_file():
        read_weights(path)  # says so
