"""Small line charts with error bars, side by side, as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 320, 220, 52, 34, 64


@dataclass(frozen=True)
class Line:
    """One line: a mean and a spread at places of the x-axis, by their number."""

    name: str
    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart; `ticks` are places of the x-axis and what stands below them."""

    title: str
    x_label: str
    ticks: Sequence[tuple[float, str]]
    lines: Sequence[Line]


def draw(panels: Sequence[Panel], y_label: str) -> str:
    """Draw charts that share a y-axis.

    Args:
        panels: The charts.
        y_label: What is shown.

    Returns:
        SVG.
    """
    ends = [y + side * s for panel in panels for line in panel.lines for _, y, s in line.points for side in (-1, 1)]
    step = _step(max([*ends, 0.0]) - min([*ends, 0.0]))
    low = step * (min([*ends, 0.0]) // step)
    high = step * (max([*ends, 0.0]) // step + 1)
    body = [
        f'<text x="14" y="{_TOP + _HEIGHT / 2}" transform="rotate(-90 14 {_TOP + _HEIGHT / 2})" '
        f'text-anchor="middle">{y_label}</text>'
    ]
    for place, panel in enumerate(panels):
        body += _panel(panel, _LEFT + place * (_WIDTH + _GAP), low, high, step)
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    for place, name in enumerate(names):
        x, y = _LEFT + place * 150, _TOP + _HEIGHT + 58
        body.append(f'<circle cx="{x + 6}" cy="{y - 4}" r="4.5" fill="{_COLORS[place % len(_COLORS)]}"/>')
        body.append(f'<text x="{x + 16}" y="{y}">{name}</text>')
    width = max(_LEFT + len(panels) * (_WIDTH + _GAP), _LEFT + len(names) * 150)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_TOP + _HEIGHT + 70}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(body)}</svg>\n"
    )


def _panel(panel: Panel, x0: float, low: float, high: float, step: float) -> list[str]:
    first, last = (f([x for x, _ in panel.ticks]) for f in (min, max))
    margin = 0.08 * (last - first) or 1.0

    def x_of(value: float) -> float:
        return x0 + _WIDTH * (value - first + margin) / (last - first + 2 * margin)

    def y_of(value: float) -> float:
        return _TOP + _HEIGHT * (high - value) / (high - low)

    body = [
        f'<text x="{x0 + _WIDTH / 2}" y="22" text-anchor="middle" font-weight="bold">{panel.title}</text>',
        f'<rect x="{x0}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{x0 + _WIDTH / 2}" y="{_TOP + _HEIGHT + 36}" text-anchor="middle">{panel.x_label}</text>',
    ]
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        color = "#777" if abs(value) < step / 10 else "#ddd"
        body.append(
            f'<line x1="{x0}" x2="{x0 + _WIDTH}" y1="{y_of(value):.1f}" y2="{y_of(value):.1f}" stroke="{color}"/>'
        )
        body.append(f'<text x="{x0 - 6}" y="{y_of(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for x, text in panel.ticks:
        body.append(f'<text x="{x_of(x):.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{text}</text>')
    for place, line in enumerate(panel.lines):
        color = _COLORS[place % len(_COLORS)]
        # Beside each other, so that error bars at one place can be told apart.
        aside = 5 * (place - (len(panel.lines) - 1) / 2)
        path = " ".join(f"{x_of(x) + aside:.1f},{y_of(y):.1f}" for x, y, _ in line.points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for x, y, s in line.points:
            at = x_of(x) + aside
            body.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y_of(y - s):.1f}" y2="{y_of(y + s):.1f}" stroke="{color}"/>'
                f'<circle cx="{at:.1f}" cy="{y_of(y):.1f}" r="3.5" fill="{color}"/>'
            )
    return body


def _step(span: float) -> float:
    """A round distance of ticks, some five to ten of which fit."""
    size: float = 10.0 ** len(str(int(span)))
    return next((size * part for part in (0.01, 0.02, 0.05, 0.1, 0.2) if span / (size * part) <= 10), size)
