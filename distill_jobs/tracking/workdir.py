"""What a job's workdir holds that is worth tracking, as plain data.

Pure but for reading. Knows nothing about MLflow or about what was sent before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from contracts.dataset import Manifest
from distill_jobs.stage import ORDER
from distill_jobs.tracking.state import Curve

CONFIG, GATES = "config.json", "gates.json"
_CARDS = {"collect": ("CARD.md", "dataset_card.md"), "publish": ("MODEL_CARD.md", "MODEL_CARD.md")}
_PARAM_CHARS = 6000
"""What MLflow's column holds."""
_TEXT_CHARS = 2000


def config_of(workdir: Path) -> dict[str, Any]:
    """The job's resolved configuration; empty before the job wrote it."""
    try:
        found: dict[str, Any] = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted names → values as text, cut to what a parameter may hold; lists of plain values stay whole."""
    if isinstance(value, dict) and value:
        found = {}
        for name, inner in value.items():
            found |= flat(inner, f"{prefix}.{name}" if prefix else str(name))
        return found
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return flat({str(n): inner for n, inner in enumerate(value)}, prefix)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return {prefix: text[:_PARAM_CHARS]}


def manifests_of(workdir: Path) -> dict[str, Manifest]:
    """Manifests of finished stages, in the pipeline's order; of one stage the last."""
    found: dict[str, Manifest] = {}
    for file in sorted(workdir.glob("*-*/manifest.json"), key=lambda f: f.stat().st_mtime):
        try:
            manifest = Manifest.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, ValidationError):  # another program's
            continue
        if manifest.stage in ORDER:
            found[manifest.stage] = manifest
    return {stage: found[stage] for stage in ORDER if stage in found}


def figures_of(manifest: Manifest) -> dict[str, float]:
    """A stage's counts, metrics (finite ones) and intervals, by name."""
    stage = manifest.stage
    prefix = "" if stage == "evaluate" else f"{stage}."
    found: dict[str, float] = {f"{stage}.seconds": manifest.seconds}
    found |= {f"{stage}.rows.{name}": float(count) for name, count in manifest.counts.items()}
    found |= {f"{prefix}{name}": value for name, value in manifest.metrics.items() if value is not None}
    intervals: dict[str, tuple[float, float]] = getattr(manifest, "intervals", None) or {}
    for name, (low, high) in intervals.items():
        found |= {f"{prefix}{name}.low": low, f"{prefix}{name}.high": high}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def curves_of(workdir: Path) -> Iterator[Path]:
    """The trainer's progress files."""
    yield from sorted(workdir.glob("train-*/*.run/*/progress.jsonl"))


def new_points(file: Path, since: Curve) -> tuple[list[tuple[int, dict[str, float]]], Curve]:
    """(step, figures) of whole lines that were not read before, and where to go on. A file that became
    shorter is read anew.
    """
    size = file.stat().st_size
    start = since.bytes if size >= since.bytes else 0
    with file.open("rb") as source:
        source.seek(start)
        data = source.read(size - start)
    whole = data.rfind(b"\n") + 1
    points, last = [], since.step
    for line in data[:whole].splitlines():
        try:
            figures = {k: float(v) for k, v in json.loads(line).items() if isinstance(v, int | float)}
            step = int(figures.pop("step"))
        except (ValueError, KeyError, AttributeError):  # torn by a kill
            continue
        figures.pop("steps", None)
        if step > last:
            last = step
            points.append((step, {k: v for k, v in figures.items() if math.isfinite(v)}))
    return points, Curve(bytes=start + whole, step=last)


def files_of(workdir: Path, manifests: dict[str, Manifest]) -> dict[str, Path]:
    """Artifact's name → file: configuration, gates, cards, the evaluation's report, plots."""
    found = {"config.json": workdir / CONFIG, "gates.json": workdir / GATES}
    for stage, manifest in manifests.items():
        for output in manifest.outputs.values():
            path = Path(output.path)
            if stage in _CARDS and path.name == _CARDS[stage][0]:
                found[_CARDS[stage][1]] = path
            elif stage == "evaluate" and path.name == "report.json":
                found["evaluation.json"] = path
    for plot in sorted(workdir.glob("*/*.png")) + sorted(workdir.glob("*/plots/*.png")):
        found[f"plots/{plot.parent.name}-{plot.name}"] = plot
    return {name: path for name, path in found.items() if path.is_file()}


def samples_of(evaluated: Manifest, limit: int) -> dict[str, list[Any]]:
    """{"columns": …, "data": …} of the first requests with each model's answer; no columns without any."""
    output = evaluated.outputs.get("requests")
    if output is None or limit == 0:
        return {"columns": [], "data": []}
    rows = []
    with Path(output.path).open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(limit), strict=False):
            rows.append(json.loads(line))
    models = list(rows[0]["models"]) if rows else []
    columns = ["request", "reference", *models, *(f"{name} is right" for name in models)]
    return {"columns": columns, "data": [_sample(row, models) for row in rows]}


def _sample(row: dict[str, Any], models: list[str]) -> list[Any]:
    messages = row["request"].get("messages") or [{}]
    asked = messages[-1].get("content")
    texts = [str(row["models"][name].get("text"))[:_TEXT_CHARS] for name in models]
    right = [row["models"][name].get("right") for name in models]
    return [str(asked)[:_TEXT_CHARS], str(row.get("reference"))[:_TEXT_CHARS], *texts, *right]
