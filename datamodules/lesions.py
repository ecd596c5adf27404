"""Procedural dermoscopy-like pictures of skin lesions with their masks.

Colours follow a small absorption model: light passes through melanin and blood, each of which takes its own
share of red, green and blue (Beer-Lambert), so brown, pink and pale lesions come out of the same two
amounts.
"""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

Domain = Literal["source", "target"]
Field = npt.NDArray[np.floating[Any]]  # float32 throughout, which the stubs lose on the way
Range = tuple[float, float]

# Share of red, green and blue that one unit absorbs: pigment is brown, blood is red.
MELANIN: Final = (0.55, 0.95, 1.35)
BLOOD: Final = (0.12, 0.75, 0.62)
CHUNK_PIXELS: Final = 1 << 16  # pixels drawn at once: the fields of one chunk stay in the CPU's cache
TABLE: Final = 5700  # uniform numbers an image may use; `_Draws` fails loudly when a change needs more


@dataclass(frozen=True)
class _Style:
    """What differs between the domains: each range is drawn from uniformly, each share is a probability."""

    skin_melanin: Range
    skin_blood: Range
    blotches: Range
    blue_cast: Range
    radius: Range
    elongation: Range
    lobes: float
    jag: float
    softness: Range
    pigment: Range
    redness: Range
    pale_share: float
    hollow_share: float
    network_share: float
    globule_share: float
    streak_share: float
    veil_share: float
    gradient: float
    vignette: Range
    aperture_share: float
    aperture: Range
    hair_counts: Range
    hair_width: Range
    light_hair_share: float
    ruler_share: float
    ruler_spacing: Range
    bubble_share: float
    plaster_share: float


STYLES: Final[dict[str, _Style]] = {
    "source": _Style(
        skin_melanin=(0.08, 0.5), skin_blood=(0.04, 0.3), blotches=(0.03, 0.17), blue_cast=(-0.1, 0.24),
        radius=(0.22, 0.56), elongation=(1.0, 1.5), lobes=0.16, jag=0.09, softness=(0.04, 0.17),
        pigment=(0.18, 0.7), redness=(0.0, 0.15), pale_share=0.2, hollow_share=0.35,
        network_share=0.6, globule_share=0.3, streak_share=0.25, veil_share=0.2,
        gradient=0.5, vignette=(0.0, 0.7), aperture_share=0.22, aperture=(1.05, 1.35),
        hair_counts=(-5.0, 7.0), hair_width=(0.003, 0.011), light_hair_share=0.0,
        ruler_share=0.3, ruler_spacing=(0.07, 0.1), bubble_share=0.3, plaster_share=0.25,
    ),
    "target": _Style(
        skin_melanin=(0.02, 0.32), skin_blood=(0.15, 0.55), blotches=(0.04, 0.2), blue_cast=(-0.28, 0.04),
        radius=(0.26, 0.66), elongation=(1.1, 1.7), lobes=0.22, jag=0.13, softness=(0.06, 0.23),
        pigment=(0.15, 0.48), redness=(-0.05, 0.3), pale_share=0.25, hollow_share=0.45,
        network_share=0.25, globule_share=0.6, streak_share=0.4, veil_share=0.35,
        gradient=0.55, vignette=(0.2, 1.1), aperture_share=0.45, aperture=(0.98, 1.25),
        hair_counts=(-3.0, 11.0), hair_width=(0.005, 0.014), light_hair_share=0.3,
        ruler_share=0.15, ruler_spacing=(0.14, 0.2), bubble_share=0.5, plaster_share=0.3,
    ),
}  # fmt: skip


class _Draws:
    """Random numbers of a chunk of images, handed out column by column.

    Each image has its own generator, so its numbers depend neither on its neighbours nor on
    how many there are.
    """

    def __init__(self, indices: range, size: int, domain: Domain, seed: int) -> None:
        self.size = size
        self.style = STYLES[domain]
        place = tuple(STYLES).index(domain)
        generators = [np.random.default_rng([seed, place, index]) for index in indices]
        self.table = np.stack([generator.random(TABLE, dtype=np.float32) for generator in generators])
        self.grain = np.stack([g.standard_normal((size, size), dtype=np.float32) for g in generators])
        self.used = 0
        centres = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
        self.y, self.x = centres[None, :, None], centres[None, None, :]

    def take(self, count: int) -> Field:
        """Hand out the next columns, [images, count] in [0, 1)."""
        self.used += count
        if self.used > TABLE:
            msg = f"TABLE holds {TABLE} numbers an image, {self.used} are asked for: raise it"
            raise RuntimeError(msg)
        return self.table[:, self.used - count : self.used]

    def uniform(self, between: Range) -> Field:
        """Draw one number an image, [images, 1, 1]."""
        return (between[0] + (between[1] - between[0]) * self.take(1))[:, :, None]

    def chance(self, share: float) -> Field:
        """Draw 1 with probability `share`, else 0, [images, 1, 1]."""
        return (self.take(1) < share).astype(np.float32)[:, :, None]

    def noise(self, cells: int) -> Field:
        """Draw a smooth field of about unit range with `cells` bumps across, [images, size, size]."""
        nodes = cells + 3
        values = (self.take(nodes * nodes) * 2 - 1).reshape(-1, nodes, nodes)
        weights = _spline_weights(self.size, cells)
        # Bumps narrower than two pixels would average out in a real camera instead of flickering.
        gain = np.float32(1.9 * min(1.0, self.size / (2 * cells)))
        field: Field = np.matmul(np.matmul(weights, values), weights.T) * gain
        return field


def _spline_weights(size: int, cells: int) -> Field:
    """Weights [size, cells + 3] of a uniform cubic B-spline at the pixel centres."""
    position = (np.arange(size) + 0.5) / size * cells
    first = np.minimum(position.astype(int), cells - 1)
    t = position - first
    taps = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1)
    weights = np.zeros((size, cells + 3), dtype=np.float32)
    np.put_along_axis(weights, first[:, None] + np.arange(4), (taps / 6).astype(np.float32), axis=1)
    return weights


def _ramp(values: Field, low: float | Field, high: float | Field) -> Field:
    """Rise smoothly from 0 at `low` to 1 at `high`."""
    t = np.clip((values - low) / (high - low), 0, 1).astype(np.float32)
    return t * t * (3 - 2 * t)


def _outline(draws: _Draws) -> tuple[Field, Field, Field]:
    """Depth inside the lesion (negative outside, in half image widths), its radius there, and the angle."""
    style = draws.style
    shift = (-0.26, 0.26)
    u = draws.x - draws.uniform(shift) + 0.07 * draws.noise(4)
    v = draws.y - draws.uniform(shift) + 0.07 * draws.noise(4)
    turn, stretch = draws.uniform((0, np.pi)), np.sqrt(draws.uniform(style.elongation))
    u, v = (u * np.cos(turn) + v * np.sin(turn)) / stretch, (v * np.cos(turn) - u * np.sin(turn)) * stretch
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    radius = np.ones_like(rho)
    for lobe in range(2, 7):
        size = style.lobes / math.sqrt(lobe - 1) * draws.uniform((-1, 1))
        radius += size * np.cos(lobe * theta + draws.uniform((0, 2 * np.pi)))
    radius = np.maximum(radius + style.jag * (draws.noise(9) + 0.6 * draws.noise(19)), 0.35) * draws.uniform(
        style.radius
    )
    return radius - rho, radius, theta


def _lesion(draws: _Draws, depth: Field, radius: Field, theta: Field) -> tuple[Field, Field, Field]:
    """Melanin and blood the lesion adds (or takes away), and the cover of a blue-white veil."""
    style = draws.style
    softness = draws.uniform(style.softness)
    body = _ramp(depth, -softness / 2, softness / 2)
    pigment = draws.uniform(style.pigment)
    uneven = 1 + 0.45 * draws.noise(5) + 0.25 * draws.noise(11)
    # Pigment network: dark lines run where a fine noise crosses zero, between lighter holes.
    lines = 1 - _ramp(np.abs(draws.noise(26)), 0.0, 0.4)
    network = draws.chance(style.network_share) * (0.9 * lines - 0.4) * _ramp(draws.noise(5), -0.7, 0.4)
    globules = draws.chance(style.globule_share) * _ramp(draws.noise(20), 0.25, 0.9)
    rays = np.cos(np.floor(draws.uniform((14, 26))) * theta + 4 * draws.noise(7))
    streaks = (
        draws.chance(style.streak_share)
        * 0.5
        * rays
        * _ramp(draws.noise(4), -0.5, 0.4)
        * _ramp(radius - depth, 0.55 * radius, 0.9 * radius)
    )
    hollow = draws.chance(style.hollow_share) * draws.uniform((0.6, 1.3)) * _ramp(depth / radius, 0.15, 0.6)
    amount = pigment * np.maximum(uneven + network + globules + streaks, 0.1) * (1 - hollow)
    scars = draws.chance(0.3) * _ramp(draws.noise(6), 0.2, 0.6)
    pale = draws.chance(style.pale_share)
    melanin = np.where(pale > 0, -0.3 * pigment * uneven, amount - 0.35 * scars)
    blood = draws.uniform(style.redness) * (1 + 0.5 * draws.noise(7)) + pale * draws.uniform((0.12, 0.3)) + 0.1 * hollow
    veil = draws.chance(style.veil_share) * _ramp(draws.noise(4), -0.1, 0.4) * _ramp(depth / radius, 0.2, 0.5)
    return body * melanin, body * blood, body * veil * 0.55


def _skin(draws: _Draws) -> tuple[Field, Field]:
    """Melanin and blood of the skin around: slow tone changes, blotches, pores, freckles and small moles."""
    style = draws.style
    blotch = draws.uniform(style.blotches)
    melanin = draws.uniform(style.skin_melanin) + blotch * draws.noise(3) + 0.5 * blotch * draws.noise(6)
    melanin = melanin + 0.03 * draws.noise(22)
    melanin = melanin + draws.chance(0.35) * draws.uniform((0.1, 0.4)) * _ramp(draws.noise(17), 0.5, 1.3)
    blood = draws.uniform(style.skin_blood) + draws.uniform(style.blotches) * draws.noise(4) + 0.04 * draws.noise(13)
    tone, present = draws.uniform(style.pigment), draws.uniform((-2, 4))
    for mole in range(3):
        away_x, away_y = draws.x - draws.uniform((-1, 1)), draws.y - draws.uniform((-1, 1))
        away = np.hypot(away_x, away_y) + 0.04 * draws.noise(8)
        radius = draws.uniform((0.05, 0.2))
        melanin = melanin + (mole < present) * draws.uniform((0.6, 1.2)) * tone * _ramp(radius - away, -0.03, 0.03)
    return np.maximum(melanin, 0), np.maximum(blood, 0)


def _light(draws: _Draws) -> tuple[Field, Field]:
    """Brightness of the lamp over the skin, and cover of the dark rim of the dermatoscope."""
    style = draws.style
    heading = draws.uniform((0, 2 * np.pi))
    slope = style.gradient * draws.uniform((-1, 1)) * (np.cos(heading) * draws.x + np.sin(heading) * draws.y)
    lamp_x, lamp_y = draws.x - draws.uniform((-0.25, 0.25)), draws.y - draws.uniform((-0.25, 0.25))
    distance = np.hypot(lamp_x * draws.uniform((0.85, 1.15)), lamp_y)
    fall = draws.uniform(style.vignette) * 0.45 * distance**3
    light = draws.uniform((0.92, 1.12)) * np.exp(slope - fall + 0.08 * draws.noise(2))
    edge = draws.uniform(style.aperture)
    rim = draws.chance(style.aperture_share) * _ramp(distance, edge, edge + draws.uniform((0.06, 0.3)))
    return light, rim


def _hairs(draws: _Draws) -> tuple[Field, Field]:
    """Cover of dark and of light hairs, each in [0, 1]."""
    style = draws.style
    covers = [np.zeros((len(draws.table), draws.size, draws.size), dtype=np.float32) for _ in range(2)]
    count, width = draws.uniform(style.hair_counts), draws.uniform(style.hair_width)
    comb = draws.uniform((0, np.pi))  # most hairs of a patch lie alike
    light = draws.chance(style.light_hair_share)
    for hair in range(int(style.hair_counts[1])):
        turn = comb + draws.uniform((-0.8, 0.8))
        u = draws.x * np.cos(turn) + draws.y * np.sin(turn) - draws.uniform((-0.5, 0.5))
        v = draws.y * np.cos(turn) - draws.x * np.sin(turn) - draws.uniform((-1, 1))
        bend, wave, phase = draws.uniform((-0.5, 0.5)), draws.uniform((0, 0.08)), draws.uniform((0, 6))
        swing = 3 * u + phase
        slope = 2 * bend * u + 3 * wave * np.cos(swing)
        distance = np.abs(v - bend * u * u - wave * np.sin(swing)) / np.sqrt(1 + slope * slope)
        half = 1 / draws.size  # half a pixel: a thinner hair stays as a fainter line of one pixel
        line = np.clip((width + half - distance) / (2 * half), 0, np.minimum(1, width / half))
        line *= (hair < count) & (np.abs(u) < draws.uniform((0.4, 1.6)))
        for cover, chosen in zip(covers, (1 - light, light), strict=True):
            np.maximum(cover, line * chosen, out=cover)
    return covers[0], covers[1]


def _ruler(draws: _Draws) -> Field:
    """Cover of ruler marks along one side of the picture, in [0, 1]."""
    style = draws.style
    turn = np.floor(draws.uniform((0, 4))) * (np.pi / 2) + draws.uniform((-0.12, 0.12))
    u = draws.x * np.cos(turn) + draws.y * np.sin(turn)
    v = draws.y * np.cos(turn) - draws.x * np.sin(turn) - draws.uniform((0.7, 0.85))
    spacing = draws.uniform(style.ruler_spacing)
    step = np.round(u / spacing)
    off, half = np.abs(u - step * spacing), 1 / draws.size
    length = np.where(step % 5 == 0, 0.16, 0.09)
    ticks = np.clip((0.012 + half - off) / (2 * half), 0, 1) * _ramp(v, -half, half) * _ramp(length - v, -half, half)
    return draws.chance(style.ruler_share) * draws.uniform((0.5, 0.9)) * ticks


def _plaster(draws: _Draws) -> tuple[Field, Field]:
    """Cover of a coloured sticker or pen mark that reaches in from the border, and its hue in [0, 1]."""
    turn = draws.uniform((0, 2 * np.pi))
    reach = draws.uniform((0.9, 1.35))
    u = draws.x * np.cos(turn) + draws.y * np.sin(turn) - reach
    v = draws.y * np.cos(turn) - draws.x * np.sin(turn) - draws.uniform((-0.6, 0.6))
    cover = _ramp(draws.uniform((0.25, 0.6)) - np.hypot(u, v * draws.uniform((0.5, 1.1))), -0.02, 0.02)
    return draws.chance(draws.style.plaster_share) * draws.uniform((0.6, 1.0)) * cover, draws.uniform((0, 1))


def _bubbles(draws: _Draws) -> Field:
    """Light added by gel bubbles (thin rings with a glint) and by wet reflections."""
    present = draws.chance(draws.style.bubble_share)
    glow = 0.4 * draws.chance(0.25) * _ramp(draws.noise(26), 0.8, 1.3)
    for _ in range(4):
        left, down = draws.x - draws.uniform((-1, 1)), draws.y - draws.uniform((-1, 1))
        radius = draws.uniform((0.03, 0.16))
        ring = np.exp(-(((np.hypot(left, down) - radius) / 0.03) ** 2))
        glint = np.exp(-((left + radius / 2) ** 2 + (down + radius / 2) ** 2) / (0.3 * radius) ** 2)
        glow = glow + present * (0.16 * ring * (0.6 - left / radius / 2) + 0.4 * glint)
    return np.maximum(glow, 0)


def _draw_chunk(indices: range, size: int, domain: Domain, seed: int) -> tuple[Field, npt.NDArray[np.bool_]]:
    """Draw the images with these indices: [n, size, size, 3] in [0, 1] and their masks."""
    draws = _Draws(indices, size, domain, seed)
    depth, radius, theta = _outline(draws)
    melanin, blood, veil = _lesion(draws, depth, radius, theta)
    skin_melanin, skin_blood = _skin(draws)
    light, rim = _light(draws)
    dark_hair, light_hair = _hairs(draws)
    plaster, hue = _plaster(draws)
    marks, glow = _ruler(draws), _bubbles(draws)
    cast = draws.uniform(draws.style.blue_cast)
    melanin, blood = np.maximum(melanin + skin_melanin, 0), np.maximum(blood + skin_blood, 0)
    grain = draws.uniform((0.006, 0.03)) * draws.grain
    images = np.empty((len(indices), size, size, 3), dtype=np.float32)
    settings = zip(MELANIN, BLOOD, (-0.5, 0.0, 0.7), (0.47, 0.52, 0.6), (0.13, 0.09, 0.08), strict=True)
    for channel, (brown, red, tint, veil_tone, hair_tone) in enumerate(settings):
        tone = 0.93 * np.exp(-brown * melanin - red * blood + tint * cast)
        tone += veil * (veil_tone - tone)
        tone += plaster * (0.5 + 0.22 * np.cos(2 * np.pi * (hue + channel / 3)) - tone)
        tone = (tone * light + glow) * (1 - 0.8 * marks)
        tone += dark_hair * 0.75 * (hair_tone - tone) + light_hair * 0.5 * (0.9 - tone)
        images[..., channel] = tone * (1 - 0.96 * rim) + grain
    return np.clip(images, 0, 1, out=images), depth > 0


def check_arguments(num_images: int, image_size: int, domain: str, seed: int, seed_name: str) -> None:
    """Refuse what `draw_lesions` cannot draw.

    Args:
        num_images: Number of images.
        image_size: Side in pixels.
        domain: Domain.
        seed: Seed of the images.
        seed_name: Name that the caller's users know the seed by.

    Raises:
        ValueError: If one is out of range.
    """
    for name, value, low in (
        ("num_images", num_images, 1),
        ("image_size", image_size, 8),
        (seed_name, seed, 0),
    ):
        if value < low:
            msg = f"Expected argument `{name}` to be at least {low}, but got {value}."
            raise ValueError(msg)
    if domain not in STYLES:
        msg = f'Expected argument `domain` to be "source" or "target", but got {domain!r}.'
        raise ValueError(msg)


def draw_lesions(
    num_images: int, image_size: int, domain: Domain, seed: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draw dermoscopy-like pictures of skin lesions and their masks.

    Image i is a function of (`seed`, `domain`, i): it does not change with `num_images`, and with
    `image_size` only in its resolution and pixel noise. The domains differ in skin and lesion palette,
    lesion size, outline and texture, hairs, ruler marks, vignette and stickers. Shadows, the rim of the
    dermatoscope, hairs, moles, stickers, pale and hollow lesions keep a threshold from finding the lesion:
    Otsu's on grey, darker side, reaches an average Jaccard per image of 0.20 in the source domain and 0.14 in the
    target domain (its brighter side 0.06 and 0.14), measured on 200 images of seed 0 at 32, 64 and 128 pixels alike by
    `benchmarks/lesion_difficulty.py`.

    Args:
        num_images: Number of images, at least 1.
        image_size: Side of the images in pixels, at least 8.
        domain: "source", or "target": paler and redder skin, fainter, larger and more irregular lesions,
            more hairs.
        seed: Seed of all images, at least 0.

    Returns:
        uint8 images [num_images, image_size, image_size, 3] and uint8 masks [num_images, image_size,
        image_size], 1 in the lesion.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_arguments(num_images, image_size, domain, seed, "seed")
    step = max(1, CHUNK_PIXELS // image_size**2)
    images = np.empty((num_images, image_size, image_size, 3), dtype=np.uint8)
    masks = np.empty((num_images, image_size, image_size), dtype=np.uint8)
    for start in range(0, num_images, step):
        stop = min(start + step, num_images)
        pictures, inside = _draw_chunk(range(start, stop), image_size, domain, seed)
        images[start:stop] = np.rint(pictures * 255)
        masks[start:stop] = inside
    return images, masks
