"""What hybrid_transfer.py prints: means, differences in pairs, and a chart."""

from collections.abc import Iterator
from math import sqrt
from statistics import mean, stdev

Case = tuple[str, str, int, int]
"""(arm, method, number of labels, seed)"""
Results = dict[Case, dict[str, float]]
METRICS = ("test_jaccard", "test_miou", "test_dice", "test_ece")
_COLORS = ("#7f7f7f", "#bcbd22", "#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2")


def _groups(results: Results) -> Iterator[tuple[str, str, int]]:
    yield from dict.fromkeys((arm, method, labels) for arm, method, labels, _ in results)


def values(results: Results, arm: str, method: str, labels: int, metric: str) -> dict[int, float]:
    """A metric of each seed."""
    return {c[3]: r[metric] for c, r in results.items() if c[:3] == (arm, method, labels)}


def means_table(results: Results) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    lines = ["| labels | method | pretraining | " + " | ".join(METRICS) + " | test_jaccard of each seed |"]
    lines.append("|---" * (len(METRICS) + 4) + "|")
    for arm, method, labels in sorted(_groups(results), key=lambda g: (g[2], g[1] != "vanilla")):
        cells = []
        for metric in METRICS:
            found = list(values(results, arm, method, labels, metric).values())
            cells.append(f"{mean(found):.4f} ± {stdev(found):.4f}" if len(found) > 1 else f"{found[0]:.4f}")
        each = ", ".join(f"{v:.4f}" for v in values(results, arm, method, labels, "test_jaccard").values())
        lines.append(f"| {labels} | {method} | {arm} | {' | '.join(cells)} | {each} |")
    return "\n".join(lines) + "\n"


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[float, float, int]:
    """Mean of a - b over the seeds both have, its standard error, and how many these are."""
    found = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    return mean(found), stdev(found) / sqrt(len(found)), len(found)


def differences_table(results: Results, reference: str = "hybrid", metric: str = "test_jaccard") -> str:
    """How much better the reference arm is than each other, and LEDM than vanilla, in pairs; as Markdown."""
    lines = [f"| labels | {metric}, difference of | mean | standard error | seeds |", "|---|---|---|---|---|"]
    groups = set(_groups(results))

    def line(labels: int, title: str, a: dict[int, float], b: dict[int, float]) -> None:
        if len(a.keys() & b.keys()) > 1:
            d, error, n = paired(a, b)
            lines.append(f"| {labels} | {title} | {d:+.4f} | {error:.4f} | {n} |")

    for arm, method, labels in sorted(groups, key=lambda g: (g[2], g[1] != "vanilla", g[0])):
        own = values(results, arm, method, labels, metric)
        if arm != reference and (reference, method, labels) in groups:
            line(labels, f"{reference} - {arm}, {method}", values(results, reference, method, labels, metric), own)
        if method == "ledm" and (arm, "vanilla", labels) in groups:
            line(labels, f"ledm - vanilla, {arm}", own, values(results, arm, "vanilla", labels, metric))
    return "\n".join(lines) + "\n"


def draw_chart(results: Results, metric: str = "test_jaccard") -> str:
    """Mean and standard deviation by number of labels, one colour an arm, one panel a method; as SVG."""
    groups = list(_groups(results))
    methods = list(dict.fromkeys(method for _, method, _ in groups))
    labels = sorted({n for *_, n in groups})
    arms = list(dict.fromkeys(arm for arm, *_ in groups))
    stats = {g: list(values(results, *g, metric).values()) for g in groups}
    low = min(mean(v) - _spread(v) for v in stats.values())
    high = max(mean(v) + _spread(v) for v in stats.values())
    low, high = int(low * 50) / 50, (int(high * 50) + 1) / 50
    width, height, left, top = 330, 260, 46, 34
    body = []

    def y_of(value: float) -> float:
        return top + height * (high - value) / (high - low)

    for panel, method in enumerate(methods):
        x0 = left + panel * (width + 24)
        title = f"{method}: {metric}"
        body.append(f'<text x="{x0 + width / 2}" y="22" text-anchor="middle" font-weight="bold">{title}</text>')
        body.append(f'<rect x="{x0}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        for tick in range(round(low * 50), round(high * 50) + 1):
            y = y_of(tick / 50)
            body.append(f'<line x1="{x0}" x2="{x0 + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            if panel == 0:
                body.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{tick / 50:.2f}</text>')
        for column, n in enumerate(labels):
            middle = x0 + width * (column + 0.5) / len(labels)
            body.append(f'<text x="{middle:.1f}" y="{top + height + 18}" text-anchor="middle">{n} labels</text>')
            shown = [arm for arm in arms if (arm, method, n) in stats]
            for place, arm in enumerate(shown):
                found = stats[arm, method, n]
                x = middle + (place - (len(shown) - 1) / 2) * 15
                color, m, s = _COLORS[arms.index(arm) % len(_COLORS)], mean(found), _spread(found)
                ends = f'y1="{y_of(m - s):.1f}" y2="{y_of(m + s):.1f}"'
                body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{color}" stroke-width="2"/>')
                body.append(f'<circle cx="{x:.1f}" cy="{y_of(m):.1f}" r="4.5" fill="{color}"/>')
    for place, arm in enumerate(arms):
        x, y = left + place * 118, top + height + 42
        body.append(f'<circle cx="{x + 6}" cy="{y - 4}" r="4.5" fill="{_COLORS[place % len(_COLORS)]}"/>')
        body.append(f'<text x="{x + 16}" y="{y}">{arm}</text>')
    total = (max(left + len(methods) * (width + 24), left + len(arms) * 118), top + height + 56)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total[0]}" height="{total[1]}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(body)}</svg>\n'
    )


def _spread(found: list[float]) -> float:
    return stdev(found) if len(found) > 1 else 0.0
