"""A search's students: where each starts, trained up to so many tokens, its held-out loss at a precision.

One process, no Ray. A student is its folder: `start` (a checkpoint) and `state` (the trainer's), so whoever
is killed goes on from the last checkpoint and a survivor from its last rung. Knows nothing about who
survives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distill_jobs.quantizing.rounding import fake_quantize, round_tokens
from distill_jobs.search.config import Precision
from distill_jobs.search.space import Frame, Shape, group_of, shape_config
from distill_jobs.shrink.blocks import linears
from distill_jobs.shrink.config import ShrinkConfig
from distill_jobs.shrink.importance import Importance, measure
from distill_jobs.shrink.structured import cut, plan
from distill_jobs.training.attention import register
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import STATE, Trainer
from distill_jobs.training.models import load_model, save_model
from distill_jobs.training.optim import cast_parameters
from distill_jobs.training.validation import rows_loss

OnStep = Callable[[int, int], None]
"""Told (tokens, of how many)."""
_WARM_TOKENS = 0.1
"""Share of the first rung's tokens over which the rate rises."""
_MOST_EPOCHS = 1e6


@dataclass(slots=True)
class Students:
    """Makes, trains and measures students of one teacher on one set of rows."""

    teacher: str
    frame: Frame
    rows: Rows
    held_out: Rows
    train: TrainConfig
    folder: Path
    cut: bool
    importance_rows: int
    seed: int
    _measured: tuple[Any, Importance] | None = None

    def start(self, shape: Shape) -> Path:
        """The checkpoint that the shape's training starts from, made if it is not there."""
        out = self.folder / shape.name / "start"
        if not (out / "config.json").is_file():
            model = self._cut(shape) if self.cut else self._random(shape)
            save_model(model, self.teacher, out)
        return out

    def _cut(self, shape: Shape) -> Any:
        """Importance is measured once for all shapes."""
        if self._measured is None:
            model = load_model(self.teacher, None, self.seed)
            self._measured = model, measure(model, self.rows, self.importance_rows)
        model, found = self._measured
        return cut(model, plan(model.config, shrink_config(shape, self.importance_rows), found))

    def _random(self, shape: Shape) -> Any:
        return load_model(self.teacher, shape_config(self.frame, shape, self.teacher), self.seed)

    def advance(self, shape: Shape, tokens: int, on_step: OnStep) -> tuple[Any, int]:
        """(model, its tokens) after training up to `tokens`, from wherever the shape's training is."""
        torch.manual_seed(self.seed)
        model = load_model(str(self.start(shape)), None, self.seed)
        model.set_attn_implementation(register())
        trainer = Trainer(model.requires_grad_(True), self.rows, self.train)
        state = self.folder / shape.name / "state"
        if (state / STATE).is_file():
            trainer.load(state)
        if trainer.position.tokens < tokens:
            for metrics in trainer.run():
                on_step(int(metrics["tokens"]), tokens)
                whole = metrics["tokens"] >= tokens
                if whole or metrics["step"] % self.train.checkpoint_steps == 0:
                    trainer.save(state)
                if whole:
                    break
        return model, trainer.position.tokens

    def loss(self, model: Any, precision: Precision) -> float:
        """The training's loss on the held-out rows, with the blocks' layers as the precision has them,
        rounded to nearest."""
        rounded = copy.deepcopy(model)
        rounded.set_attn_implementation(register())
        with torch.no_grad():
            round_to(rounded, precision)
        cast_parameters(rounded, torch.bfloat16)
        return rows_loss(rounded, self.held_out, self.train)["validation_loss"]


def round_to(model: Any, precision: Precision) -> None:
    """Round the blocks' linear layers, and for w8a8 what goes into them, in place."""
    if precision == "bf16":
        return
    for layer in linears(model).values():
        bits = 8 if precision == "w8a8" else 4
        layer.weight.copy_(fake_quantize(layer.weight, bits, group_of(precision)))
        if precision == "w8a8":
            layer.register_forward_pre_hook(lambda _, given: (round_tokens(given[0]),))


def shrink_config(shape: Shape, rows: int) -> ShrinkConfig:
    """The cut that makes a shape."""
    return ShrinkConfig(**asdict(shape), rows=rows)


def train_config(base: TrainConfig, rows: Rows, first: int, most: int, threads: int) -> TrainConfig:
    """The job's training for one process, long enough for `most` tokens. The rate rises within the first
    rung's tokens and then is constant: a student must be comparable, and able to go on, at every rung."""
    batch = min(base.batch_rows, len(rows))
    a_step = batch * float(rows.lengths.mean())
    steps = math.ceil(1.5 * most / a_step) + 2
    warm = min(0.5, _WARM_TOKENS * first / (a_step * steps))
    optimizer = base.optimizer.model_copy(update={"schedule": "constant", "warmup": warm})
    changes = {
        "workers": 1, "threads": threads, "batch_rows": batch, "max_steps": steps, "epochs": _MOST_EPOCHS,
        "optimizer": optimizer, "shape": None, "shrink": None, "fake_quant": None, "validate_steps": None,
        "early_stop": None, "parallel": "ddp", "compile": False,
    }  # fmt: skip
    return base.model_copy(update=changes)
