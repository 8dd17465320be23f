"""Early exit on a depth-nested student: accuracy against the layers that a token needs, with its curve.

One student is cut out of the demo's teacher and trained with the losses of all its depths, another equally
long with the last depth's alone. Each decodes the held-out requests at several thresholds of confidence, and
leaving always at one depth; all offline, since vLLM runs every block for every token of a batch. There is no
bar: what comes out is the curve. Knows nothing of other parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.compression.nested import Exiting, NestedStep, Signal
from benchmarks.compression.student_runs import FOLDER, QUICK, World, settings, world
from benchmarks.recipes.data import TEACHER
from benchmarks.recipes.job import answers_right
from benchmarks.results import Bar
from contracts.config import write_atomic
from distill_jobs.shrink.config import ShrinkConfig
from distill_jobs.shrink.student import build
from distill_jobs.studies.plots import new_figure, write_figure
from distill_jobs.training.attention import register
from distill_jobs.training.loop import Trainer
from distill_jobs.training.models import load_model, save_model
from distill_jobs.training.optim import cast_parameters

SHAPE = ShrinkConfig(layers=8, hidden=256, intermediate=512, heads=4)
EXITS = (2, 4, 6, 8)
STEPS = 500
REQUESTS = 400
THRESHOLDS: dict[Signal, tuple[float, ...]] = {
    "probability": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999),
    "entropy": (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999),
}
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "early-exit.png"
_COLOURS = {"nested": "#2563eb", "last depth only": "#94a3b8"}


def run(
    threads: int = 1, folder: Path = FOLDER, quick: bool = False
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row a student and rule; no bars."""
    torch.set_num_threads(threads)
    budget = QUICK if quick else 1.0
    about, steps, requests = world(folder, budget), max(2, round(STEPS * budget)), round(REQUESTS * budget)
    rows: list[dict[str, Any]] = []
    for name in _COLOURS:
        file = folder / f"early-exit-{name.replace(' ', '-')}-{steps}-{requests}.json"
        if not file.exists():
            model = trained(
                name == "nested", about, steps, folder / f"early-exit-{name.replace(' ', '-')}-{steps}"
            )
            write_atomic(file, json.dumps(curve(name, model, requests, quick)))
        rows += json.loads(file.read_text())
    draw(rows, folder / "early-exit.png" if quick else PICTURE)
    return rows, []


def trained(nested: bool, about: World, steps: int, out: Path) -> Any:
    """The student, trained or read from `out`, in bf16 as served."""
    if not (out / "config.json").is_file():
        model = build(load_model(TEACHER, None, 0), SHAPE, about.rows).model
        config = settings(steps)
        torch.manual_seed(config.seed)
        model.set_attn_implementation(register())
        objective = NestedStep(model, config, EXITS) if nested else None
        for _ in Trainer(model.float().requires_grad_(True), about.rows, config, objective=objective).run():
            pass
        save_model(model, TEACHER, out)
    model = load_model(str(out), None, 0).eval()
    model.set_attn_implementation(register())
    cast_parameters(model, torch.bfloat16)
    return model


def curve(name: str, model: Any, requests: int, quick: bool) -> list[dict[str, Any]]:
    """Accuracy and layers at every threshold, and at every fixed depth."""
    found = [
        _row(name, "fixed depth", float(depth), Exiting(model, (depth,), 0.0), requests) for depth in EXITS
    ]
    for signal, thresholds in THRESHOLDS.items():
        for threshold in thresholds[-2:] if quick else thresholds:
            exiting = Exiting(model, EXITS, threshold, signal)
            found.append(_row(name, signal, threshold, exiting, requests))
    return found


def _row(name: str, rule: str, at: float, model: Exiting, requests: int) -> dict[str, Any]:
    right = answers_right(model, requests)
    return {
        "part": "early_exit", "student": name, "rule": rule, "at": at,
        "accuracy": sum(right) / len(right), "mean_layers": round(model.mean_layers, 3),
        "left_at": {str(depth): count for depth, count in sorted(model.used.items())},
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy by mean layers a token: a line a student and signal, crosses for fixed depths."""
    figure, axis = new_figure(7.2, 4.2)
    lines = {(row["student"], row["rule"]): list[tuple[float, float]]() for row in rows}
    for row in rows:
        lines[row["student"], row["rule"]].append((row["mean_layers"], row["accuracy"]))
    for (student, rule), points in lines.items():
        style = {"fixed depth": "x:", "probability": "o-", "entropy": "s--"}[rule]
        xs, ys = zip(*sorted(points), strict=True)
        axis.plot(
            xs, ys, style, color=_COLOURS[student], markersize=4, linewidth=1, label=f"{student}, {rule}"
        )
    axis.set_xlabel("blocks a token needs, mean (of 8)")
    axis.set_ylabel("held-out requests answered right")
    axis.set_title("Early exit, decoded offline", loc="left", fontsize=11, fontweight="bold")
    axis.legend(fontsize=7, frameon=False)
    write_figure(figure, file)
