"""What a finished fit consumed and made, in a few lines that are read off its manifest and those of its artifacts."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_MANIFEST = "manifest.json"
_MOST_METRICS = 4
# The metrics that tell most, first ones first; those of single classes and of extractors beside the main one follow.
_TELLING = ("accuracy", "jaccard", "miou", "fid", "cw_fid", "label_consistency", "cas", "psnr", "loss")


def stage_lines(run_dir: Path, manifest: Mapping[str, Any] | None) -> list[str]:
    """Say what a finished fit consumed, what it made, and what was measured.

    Args:
        run_dir: Its run directory.
        manifest: Its manifest; None where there is none. What it lacks is left out.

    Returns:
        At most two lines: "consumed: ...", "made: ...".
    """
    manifest = manifest or {}
    consumed = [*_data(_mapping(manifest, "counts")), *(_file(Path(path)) for path in _mapping(manifest, "inputs"))]
    made = [_file(Path(path)) for path in _mapping(manifest, "artifacts")]
    checkpoint = _mapping(manifest, "checkpoint").get("path")
    if isinstance(checkpoint, str):
        step = manifest.get("global_step")
        made.append(f"weights {run_dir / checkpoint}" + (f" (step {step:,})" if isinstance(step, int) else ""))
    made += _metrics(_mapping(manifest, "metrics"))
    return [f"  {verb}: {'; '.join(parts)}" for verb, parts in (("consumed", consumed), ("made", made)) if parts]


def _mapping(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry of a manifest; an empty one where it is missing or something else."""
    found = manifest.get(name)
    return found if isinstance(found, Mapping) else {}


def _data(counts: Mapping[str, Any]) -> list[str]:
    """Images by use, those that there are."""
    used = [f"{name} {count:,}" for name, count in counts.items() if isinstance(count, int) and count]
    return [f"images: {', '.join(used)}"] if used else []


def _file(path: Path) -> str:
    """What a file is that a run started from or made: of an artifact how much is in it, else its name."""
    if path.name != _MANIFEST:
        return f"weights {path}" if path.suffix in (".ckpt", ".safetensors", ".pt", ".pth", ".tar") else str(path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return str(path.parent)
    manifest = manifest if isinstance(manifest, dict) else {}
    kind, count = manifest.get("kind"), _mapping(manifest, "counts").get("images")
    noun = {"pseudo_labels": "pseudo-labels", "synthetic_images": "images drawn"}.get(str(kind))
    if noun is None:
        return str(path.parent)
    return f"{f'{count:,} ' if isinstance(count, int) else ''}{noun} in {path.parent}"


def _metrics(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The most telling metrics of the test, or of the validation where there was no test."""
    finite = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
    for split in ("test_", "val_"):
        names = [name for name in finite if name.startswith(split) and "/" not in name]
        if names:
            best = sorted(names, key=lambda name: _place(name.removeprefix(split)))[:_MOST_METRICS]
            yield ", ".join(f"{name} {finite[name]:.4g}" for name in best)
            return


def _place(metric: str) -> tuple[int, int]:
    """Where a metric stands among others: by what it is, the one without an addition to its name first."""
    for place, name in enumerate(_TELLING):
        if metric == name or metric.startswith(f"{name}_"):
            return place, len(metric)
    return len(_TELLING), 0
