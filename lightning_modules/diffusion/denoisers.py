"""A network and a noise process as a denoiser: `denoiser(x, sigma, label=None) -> x0`."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.noise import NoiseProcess


class JointDenoiser(nn.Module):
    """Denoise an image and predict its mask with one network.

    With F = network(c_in * x, c_noise), the first `image_channels` channels of F are preconditioned into the
    denoised image (Karras et al., arXiv 2206.00364, equation 7); the others are the mask output as it is.
    The mask has no noise: it is never an input of the network and never preconditioned (Sauvalle and
    Salzmann, arXiv 2408.03433).

    It holds no weights of its own, so one may be built around any network at any time.

    Args:
        network: Called as network(x, t), or as network(x) if it has no time input (see `takes_time`), then
            for clean images (sigma = 0) only.
        process: Noise process whose coefficients are used.
        image_channels: How many of the network's first output channels are the image; 0 for a plain
            segmenter.

    Raises:
        ValueError: If `image_channels` is negative.
    """

    def __init__(self, network: nn.Module, process: NoiseProcess, image_channels: int = 3) -> None:
        """Keep the parts."""
        super().__init__()
        if image_channels < 0:
            msg = f"Expected `image_channels` to be 0 or more, got {image_channels}."
            raise ValueError(msg)
        self.network = network
        self.process = process
        self.image_channels = image_channels

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise images.

        Args:
            x: Noisy images x + sigma * eps, [B, C, H, W], clean ones being in [-1, 1].
            sigma: Noise level of each image, [B], or one for all.
            label: Must be None; the argument is there because samplers pass it to every denoiser.

        Returns:
            Denoised images, [B, C, H, W].

        Raises:
            ValueError: If a label is given, if the network has no image output, or as in `joint`.
        """
        if label is not None:
            msg = "Expected `label` to be None, got a tensor: this denoiser is not conditioned on classes."
            raise ValueError(msg)
        if self.image_channels == 0:
            msg = "Expected `image_channels` above 0 to denoise, got 0: only `joint` works then."
            raise ValueError(msg)
        return self.joint(x, sigma)[0]

    def joint(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """Denoise images and predict their masks.

        Args:
            x: Noisy images x + sigma * eps, [B, C, H, W], clean ones being in [-1, 1].
            sigma: Noise level of each image, [B], or one for all.

        Returns:
            Denoised images, [B, image_channels, H, W], and mask output, [B, K, H, W]; either may have 0
            channels.

        Raises:
            ValueError: If a shape does not fit, or if a network without a time input gets noisy images.
        """
        if x.ndim != 4 or self.image_channels not in (0, x.shape[1]):
            msg = (
                f"Expected `x` of shape [B, {self.image_channels or 'C'}, H, W], got {list(x.shape)}. "
                f"Give `image_channels` of the images."
            )
            raise ValueError(msg)
        sigma = expand_levels(sigma, x)
        output = self._run(x, sigma)
        if output.ndim != 4 or output.shape[1] < self.image_channels or output.shape[-2:] != x.shape[-2:]:
            msg = (
                f"Expected the output of `network` to be [{x.shape[0]}, {self.image_channels} + K, "
                f"{x.shape[2]}, {x.shape[3]}], got {list(output.shape)}. Give it {self.image_channels} "
                f"channels for the image and K for the mask, or set `image_channels`."
            )
            raise ValueError(msg)
        image, mask = output[:, : self.image_channels], output[:, self.image_channels :]
        if self.image_channels:
            skip, out = (_over_pixels(c(sigma)) for c in (self.process.c_skip, self.process.c_out))
            image = skip * x + out * image
        return image, mask

    def _run(self, x: Tensor, sigma: Tensor) -> Tensor:
        scaled = scaled_input(self.network, self.process, x, sigma)
        if takes_time(self.network):
            output: Tensor = self.network(scaled, self.process.c_noise(sigma))
            return output
        if bool((sigma != 0).any()):
            msg = (
                f"Expected `sigma` to be 0, got up to {float(sigma.max()):.4g}: "
                f"{type(self.network).__name__} has no time input and only takes clean images. "
                f"Use a network called as network(x, t)."
            )
            raise ValueError(msg)
        output = self.network(scaled)
        return output


class ClassDenoiser(nn.Module):
    """Denoise images of given classes with a network called as network(x, t, label).

    D(x_sigma; sigma, label) = c_skip * x_sigma + c_out * F(c_in * x_sigma, c_noise, label) (Karras et al., arXiv
    2206.00364, equation 7). It holds no weights of its own, so one may be built around any network at any time.

    Args:
        network: The network; its `null_label`, if it has one, is the label of "no class".
        process: Noise process whose coefficients are used.
    """

    def __init__(self, network: nn.Module, process: NoiseProcess) -> None:
        """Keep the parts."""
        super().__init__()
        self.network = network
        self.process = process

    @property
    def null_label(self) -> int | None:
        """The label of "no class"; None where the network has none."""
        label = getattr(self.network, "null_label", None)
        return label if isinstance(label, int) else None

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise images.

        Args:
            x: Noisy images x + sigma * eps, [B, C, H, W], clean ones being in [-1, 1].
            sigma: Noise level of each image, [B], or one for all.
            label: Class ids [B], or `null_label`; None is `null_label` for all.

        Returns:
            Denoised images, [B, C, H, W], in float32.

        Raises:
            ValueError: If there is no label and the network has no null label, or if a shape does not fit.
        """
        if x.ndim != 4:
            msg = f"Expected `x` of shape [B, C, H, W], got {list(x.shape)}."
            raise ValueError(msg)
        if label is None:
            if self.null_label is None:
                msg = (
                    f"Expected `label`, got None: {type(self.network).__name__} knows no images without a class. "
                    "Give class ids, or build and train it with `null_class`."
                )
                raise ValueError(msg)
            label = torch.full((len(x),), self.null_label, device=x.device)
        sigma = expand_levels(sigma, x)
        scaled = scaled_input(self.network, self.process, x, sigma)
        output = self.network(scaled, self.process.c_noise(sigma), label)
        if output.shape != x.shape:
            msg = f"Expected the output of `network` to be {list(x.shape)} like its input, got {list(output.shape)}."
            raise ValueError(msg)
        skip, out = (_over_pixels(c(sigma)) for c in (self.process.c_skip, self.process.c_out))
        denoised: Tensor = skip * x + out * output.float()
        return denoised


class PairDenoiser(nn.Module):
    """Denoise pairs z = (image, mask), so that a sampler draws both at once.

    The estimate is E[z | x_sigma], given the image part x of z alone: the mask part has no way into the
    network, so its initial value is without effect, and what a sampler returns as the mask is the network's
    estimate at its last step. Pairs so drawn follow the joint distribution of images and masks if an image
    determines its mask; if it does not, each image comes with the mean of its masks (Sauvalle and Salzmann,
    arXiv 2408.03433).

    It holds no weights of its own, so one may be built around any `JointDenoiser` at any time.

    Args:
        joint: Denoiser of the images; its network gives the mask output.
        to_probabilities: Maps the mask output [B, K, H, W] to class probabilities of that shape.
        clip: Clip denoised images to [-1, 1], the range of clean ones.

    Raises:
        ValueError: If `joint` has no image output.
    """

    def __init__(self, joint: JointDenoiser, to_probabilities: Callable[[Tensor], Tensor], clip: bool = True) -> None:
        """Keep the parts."""
        super().__init__()
        if joint.image_channels == 0:
            msg = "Expected `joint` with `image_channels` above 0, got 0: a plain segmenter draws no images."
            raise ValueError(msg)
        self.joint = joint
        self.to_probabilities = to_probabilities
        self.clip = clip

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Denoise pairs.

        Args:
            x: Noisy images and, behind them, a mask part that is ignored, [B, C + K, H, W].
            sigma: Noise level of each pair, [B], or one for all.
            label: Must be None; the argument is there because samplers pass it to every denoiser.

        Returns:
            Denoised images and class probabilities, [B, C + K, H, W].

        Raises:
            ValueError: If a label is given, or if a shape does not fit.
        """
        if label is not None:
            msg = "Expected `label` to be None, got a tensor: this denoiser is not conditioned on classes."
            raise ValueError(msg)
        image, mask = self.joint.joint(x[:, : self.joint.image_channels], sigma)
        # Under autocast both come in 16 bits, too few for probabilities that sum to 1.
        image, mask = image.to(x.dtype), mask.to(x.dtype)
        if self.clip:
            image = image.clamp(-1, 1)
        pair = torch.cat([image, self.to_probabilities(mask)], 1)
        if pair.shape != x.shape:
            msg = (
                f"Expected `x` of shape {list(pair.shape)}, an image and the mask of {mask.shape[1]} classes, "
                f"got {list(x.shape)}. The values of the mask part do not matter, zeros will do."
            )
            raise ValueError(msg)
        return pair


def expand_levels(sigma: Tensor | float, x: Tensor) -> Tensor:
    """Return one noise level per image.

    Args:
        sigma: Noise level of each image, [B], or one for all.
        x: Images [B, ...].

    Raises:
        ValueError: If there are neither one nor B of them.
    """
    sigma = torch.as_tensor(sigma, device=x.device)
    if sigma.shape not in ((), (1,), (x.shape[0],)):
        msg = f"Expected `sigma` of shape [] or [{x.shape[0]}], one per image, got {list(sigma.shape)}."
        raise ValueError(msg)
    return sigma.expand(x.shape[0])


def scaled_input(network: nn.Module, process: NoiseProcess, x: Tensor, sigma: Tensor) -> Tensor:
    """Return c_in * x, as a network takes it.

    Args:
        network: Says the type: under true 16-bit precision float32 coefficients would meet 16-bit weights.
        process: Noise process.
        x: Noisy images, [B, C, H, W].
        sigma: Their noise levels, [B].
    """
    weight = next(network.parameters(), None)
    return (_over_pixels(process.c_in(sigma)) * x).to(x.dtype if weight is None else weight.dtype)


def takes_time(network: nn.Module) -> bool:
    """Tell from its signature whether a network is called as network(x, t) or as network(x).

    Wrappers that pass their arguments on (EMA, DDP, torch.compile) are looked through.

    Args:
        network: The network.

    Returns:
        Whether `forward` requires at least two positional arguments.

    Raises:
        TypeError: If `forward` requires none, or takes any number of them and wraps no other module.
    """
    parameters = list(inspect.signature(network.forward).parameters.values())
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        for name in ("module", "_orig_mod"):
            inner = getattr(network, name, None)
            if isinstance(inner, nn.Module):
                return takes_time(inner)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
    if required == 0:
        msg = (
            f"Expected a `network` with forward(x, t) or forward(x), got {type(network).__name__} with "
            f"forward({', '.join(str(p) for p in parameters)}). Wrap it in a module with one of these."
        )
        raise TypeError(msg)
    return required >= 2


def _over_pixels(coefficient: Tensor) -> Tensor:
    return coefficient[:, None, None, None]
