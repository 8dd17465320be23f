"""Students cut out of the demo's teacher against the same shape from random weights: tokens to the same loss.

The random start is trained for a budget with its whole schedule; the cut one for growing shares of that
budget, each with a whole schedule of its own, until its held-out loss is no higher. The rows that importance
is measured on count as tokens. A shape that is finished is not trained again by a run that goes on. Knows
nothing of other parts.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.compression.student_runs import FOLDER, QUICK, World, held_out_loss, settings, train, world
from benchmarks.recipes.data import TEACHER
from benchmarks.results import Bar, at_least
from contracts.config import write_atomic
from distill_jobs.shrink.config import ShrinkConfig
from distill_jobs.shrink.student import build
from distill_jobs.training.models import load_model

STEPS = 400
SHARES = (1 / 40, 1 / 20, 1 / 10, 1 / 5, 1 / 2, 1.0)
"""Of the random start's steps, for the cut student; the first that is enough counts."""
SHAPES = {
    "depth": ShrinkConfig(layers=6),
    "width": ShrinkConfig(hidden=192, intermediate=384, heads=4),
    "depth and width": ShrinkConfig(layers=8, hidden=256, intermediate=512, heads=4),
}
FEWER = 5.0


def run(
    threads: int = 1, folder: Path = FOLDER, quick: bool = False
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Rows of all trainings, and a bar a shape."""
    torch.set_num_threads(threads)
    budget = QUICK if quick else 1.0
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    about, files = world(folder, budget), []
    for name, shape in SHAPES.items():
        files.append(folder / f"shrink-{name.replace(' ', '-')}.json")
        if not files[-1].exists():
            measured = compare(name, shape, about, max(2, round(STEPS * budget)))
            write_atomic(files[-1], json.dumps(measured))
        found = json.loads(files[-1].read_text())
        rows += found
        what = f"{name}-pruned start against random start, times fewer tokens to the same loss"
        bars.append(at_least(what, fewer(found), FEWER))
    for file in files:  # what comes next measures again
        file.unlink()
    return rows, bars


def compare(name: str, shape: ShrinkConfig, about: World, steps: int) -> list[dict[str, Any]]:
    """The random start's row first, then the cut one's: unhealed, and for as many budgets as it needs."""
    built = build(load_model(TEACHER, None, 0), shape, about.rows)
    looked = int(about.rows.lengths[: shape.rows].sum())
    found = [_row(name, "random", _random(built.model), about, steps, 0)]
    cut = [_row(name, "cut", copy.deepcopy(built.model), about, 0, looked)]
    for share in SHARES:
        healed = max(1, round(share * steps))
        cut.append(_row(name, "cut", copy.deepcopy(built.model), about, healed, looked))
        if cut[-1]["loss"] <= found[0]["loss"]:
            break
    return [*found, *cut]


def fewer(rows: list[dict[str, Any]]) -> float:
    """Tokens of the random start over those of the cut one that is no worse; 0 where none is."""
    random, *cut = rows
    enough = [one["tokens"] for one in cut if one["loss"] <= random["loss"]]
    return float(random["tokens"] / min(enough)) if enough else 0.0


def _random(like: Any) -> Any:
    """The same architecture, freshly initialised."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(like.config), dtype=torch.float32)


def _row(name: str, start: str, model: Any, about: World, steps: int, looked: int) -> dict[str, Any]:
    began = time.monotonic()
    tokens = train(model, settings(steps), about.rows) if steps else 0
    seconds = time.monotonic() - began
    loss = held_out_loss(model, about.held_out)
    return {
        "part": "shrink",
        "shape": name,
        "start": start,
        "params": sum(one.numel() for one in model.parameters()),
        "steps": steps,
        "tokens": tokens + looked,
        "loss": round(loss["validation_loss"], 4),
        "kl": round(loss["validation_kd"], 4),
        "seconds": round(seconds, 1),
    }
