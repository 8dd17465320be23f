"""Trainings on the demo's teacher and rows for the parts of this benchmark, in this process, without Ray.

Rows are those of the recipes' table: requests of the demo's world with the teacher's greedy answers and its
top 20. Knows nothing of what is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipes import data
from contracts.config import load_config
from distill_jobs.config import DistillConfig
from distill_jobs.training.attention import register
from distill_jobs.training.config import OptimizerConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from distill_jobs.training.optim import cast_parameters
from distill_jobs.training.validation import rows_loss

FOLDER = Path("runs/bench-compression/full")
QUICK = 0.1
"""Share of rows and steps of a run that only shows that it runs."""
BASE = Path("configs/distill-support.yaml")
ROWS, HELD_OUT, BATCH = 4000, 400, 32


@dataclass(frozen=True, slots=True)
class World:
    """What is trained on, and what is measured on."""

    rows: Rows
    held_out: Rows


def world(folder: Path, budget: float) -> World:
    """The demo's rows, made once in `folder`; `budget` scales how many."""
    rows, held_out = max(BATCH, round(ROWS * budget)), max(BATCH, round(HELD_OUT * budget))
    made = folder / f"rows-{rows}-{held_out}"
    data.make(made, rows, held_out, [])
    found = (Rows(made / name, data.MAX_LENGTH, True) for name in ("rows", "held-out"))
    return World(*found)


def settings(steps: int, **changes: Any) -> TrainConfig:
    """The demo's training, for one process and so many steps."""
    base = load_config(BASE, DistillConfig).train
    plain = {"workers": 1, "max_length": data.MAX_LENGTH, "batch_rows": BATCH, "max_steps": steps}
    return base.model_copy(update={**plain, "epochs": 1000.0, **changes})


def gentler(config: TrainConfig, factor: float) -> OptimizerConfig:
    """The optimizer at a lower rate, for a student that is trained already."""
    return config.optimizer.model_copy(update={"lr": config.optimizer.lr * factor})


def train(model: Any, config: TrainConfig, rows: Rows) -> int:
    """Train in place; the tokens that were seen."""
    torch.manual_seed(config.seed)
    model.set_attn_implementation(register())
    trainer = Trainer(model.float().requires_grad_(True), rows, config)
    tokens = 0
    for metrics in trainer.run():
        tokens = int(metrics["tokens"])
    return tokens


def held_out_loss(model: Any, held_out: Rows) -> dict[str, float]:
    """validation_loss (the training's), validation_kd and validation_ce, computed in bf16 as served."""
    model.set_attn_implementation(register())
    cast_parameters(model, torch.bfloat16)
    return rows_loss(model, held_out, settings(1))
