"""Quantization-aware distillation at INT4 and INT3, groups of 128, against quantizing afterwards.

The demo's student is distilled in bf16 and gets outliers (without, INT4 costs less than two trainings differ
by); then it is trained equally long in three ways: in bf16, on INT4's and on INT3's grid. What quantizing
loses is measured on the longer trained bf16 student, so that more training is no recovery. The bars hold
rounding to nearest against it, which is what the grid trains for; GPTQ stands in the table. Knows nothing of
other parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.compression.outliers import CHANNELS, FACTOR, plant_outliers
from benchmarks.compression.student_runs import (
    FOLDER,
    QUICK,
    World,
    gentler,
    held_out_loss,
    settings,
    train,
    world,
)
from benchmarks.recipes.data import STUDENT
from benchmarks.results import Bar, at_least
from distill_jobs.shrink.blocks import linears
from distill_jobs.shrink.calibration import block_by_block
from distill_jobs.shrink.surgeon import on_grid
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.fake_quant import fake_quantize, grid_for
from distill_jobs.training.method_config import FakeQuantConfig
from distill_jobs.training.models import load_model, save_model
from distill_jobs.training.rounding import Grid, rounded

STEPS, MORE, RATE = 600, 300, 0.1
"""Steps of the bf16 student, steps after it, and their rate against its own: outliers stand higher ones
badly."""
CALIBRATION = 128
RECOVERED = 0.6
FORMATS = {"INT4 g128": FakeQuantConfig(bits=4), "INT3 g128": FakeQuantConfig(bits=3)}


def run(
    threads: int = 1, folder: Path = FOLDER, quick: bool = False
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Held-out losses, and a bar a format."""
    torch.set_num_threads(threads)
    budget = QUICK if quick else 1.0
    about, steps, more = world(folder, budget), max(2, round(STEPS * budget)), max(2, round(MORE * budget))
    student = _student(folder, steps, about)
    shorter = _row("bf16", "before", student, about)
    longer = settings(more, optimizer=gentler(settings(more), RATE))
    whole = copy.deepcopy(student)
    train(whole, longer, about.rows)
    reference = _row("bf16", "trained on", whole, about)
    rows, bars = [shorter, reference], list[Bar]()
    for name, config in FORMATS.items():
        found = [
            _row(name, "RTN afterwards", _changed(whole, _rtn(grid_for(config))), about),
            _row(name, "GPTQ afterwards", _changed(whole, _gptq(grid_for(config), about)), about),
            _row(name, "distilled on the grid", _distilled(student, longer, config, about), about),
        ]
        rows += found
        bars.append(_bar(name, reference, found))
    return rows, bars


def _student(folder: Path, steps: int, about: World) -> Any:
    """Distilled in bf16, then with outliers that change no product."""
    model = load_model(STUDENT, None, 0)
    train(model, settings(steps), about.rows)
    plain, planted = folder / "qad-student", folder / "qad-outliers"
    save_model(model, str(STUDENT), plain)
    plant_outliers(plain, planted, CHANNELS, FACTOR)
    return load_model(str(planted), None, 0)


def recovered(whole: float, afterwards: float, on_grid: float) -> float:
    """The share of what quantizing afterwards lost that the student trained on the grid did not lose; 0 where
    nothing was lost."""
    lost = afterwards - whole
    return (afterwards - on_grid) / lost if lost > 0 else 0.0


def _bar(name: str, reference: dict[str, Any], found: list[dict[str, Any]]) -> Bar:
    """Against rounding to nearest."""
    rtn, _, on_grid = (one["kl"] for one in found)
    share = recovered(reference["kl"], rtn, on_grid)
    return at_least(f"{name}: distilling on the grid recovers of what rounding loses", share, RECOVERED)


def _changed(model: Any, change: Callable[[Any], None]) -> Any:
    """A changed copy, as it would be served."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        change(copied)
    return copied


def _rtn(grid: Grid) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in linears(model).values():
            layer.weight.copy_(rounded(layer.weight, grid))

    return change


def _gptq(grid: Grid, about: World) -> Callable[[Any], None]:
    def settle(layer: torch.nn.Linear, moments: torch.Tensor) -> None:
        layer.weight.copy_(on_grid(layer.weight, moments, grid))

    return lambda model: block_by_block(model, about.rows, CALIBRATION, True, settle)


def _distilled(student: Any, config: TrainConfig, fake_quant: FakeQuantConfig, about: World) -> Any:
    """The student trained on with rounded weights, against the same teacher's columns."""
    model = copy.deepcopy(student).float()
    fake_quantize(model, fake_quant)
    train(model, config.model_copy(update={"fake_quant": fake_quant}), about.rows)
    return model


def _row(name: str, how: str, model: Any, about: World) -> dict[str, Any]:
    loss = held_out_loss(model, about.held_out)
    kl, ce = loss["validation_kd"], loss["validation_ce"]
    return {"part": "qad", "format": name, "how": how, "kl": round(kl, 6), "cross_entropy": round(ce, 6)}
