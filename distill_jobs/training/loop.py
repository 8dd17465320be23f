"""The plain torch training loop: accumulate, sum over workers, step, report, checkpoint, resume.

It knows nothing of Ray: workers are a rank, a world size and a function that sums tensors (`parallel`).
Everything is divided by the number of valid tokens of the whole step, so neither accumulation nor the number
of workers changes it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from contracts.errors import TrainingError
from distill_jobs.shrink.blocks import masks
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.curriculum import CurriculumOrder, order_of, planned_steps
from distill_jobs.training.data import MicroBatch, RowSource
from distill_jobs.training.optim import MasterOptimizer, schedule, whole
from distill_jobs.training.order import Order, split_for_worker
from distill_jobs.training.parallel import Workers, shard, sum_over
from distill_jobs.training.step import Counts, Step, make_step

STATE = "state.pt"
TINY = 1e-9  # the tokens of a step whose rows all weigh nothing: its gradient is zero, not 0 / 0


@dataclass(slots=True)
class Position:
    """How far a run is; all that resuming needs besides the weights, because the data's order is a function
    of it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Trainer:
    """A run in progress. `objective` is what is minimised: by default what the configuration asks for."""

    model: nn.Module
    rows: RowSource
    config: TrainConfig
    workers: Workers = field(default_factory=Workers)
    objective: Step | None = None
    position: Position = field(default_factory=Position)
    optimizer: MasterOptimizer = field(init=False)
    order: Order | CurriculumOrder = field(init=False)
    step: Step = field(init=False)
    _loss: Callable[[MicroBatch, Counts], tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        config, dtype = self.config, getattr(torch, self.config.dtype)
        self.step = self.objective or make_step(self.model, config, self.workers)
        self._loss = self.step.loss
        if config.gradient_checkpointing:
            self.model.activation_checkpointing_enable()  # type: ignore[operator]
        sharded = config.parallel == "fsdp2" and self.workers.world > 1
        if sharded:
            self._loss = shard(self.model, dtype, self.step.loss)
        self.optimizer = MasterOptimizer(
            self.model,
            config.optimizer,
            torch.float32 if sharded else dtype,
            self.step.extra_parameters(),
            self.workers.add,
            masks(self.model) if config.shrink and config.shrink.sparsify else {},
        )
        self.order = order_of(self.rows, config)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return planned_steps(len(self.rows.lengths), self.config)

    def run(self) -> Iterator[dict[str, float]]:
        """Train from the current position to the end; yields the metrics of every step."""
        self.model.train()
        for step, indices in self.order.steps(self.position.step, self.steps):
            started = time.monotonic()
            metrics = self._step(step, indices)
            self.position.step = step + 1
            self.position.seconds += time.monotonic() - started
            yield {
                "step": step + 1,
                "steps": self.steps,
                "tokens": self.position.tokens,
                "seconds": self.position.seconds,
                "epoch": (step + 1) / self.order.steps_per_epoch,
                "workers": self.workers.world,
                **metrics,
            }

    def accumulate(self, step: int, indices: np.ndarray) -> Tensor:
        """Gradients of this worker's share of a step, added to the masters'; its share of the parts."""
        indices, rows = self.step.rows(step, self.steps, indices, self.rows)
        self.position.tokens += int(rows.lengths[indices].sum())
        counts = count(rows, indices)
        device = next(self.model.parameters()).device
        sums = torch.zeros(len(self.step.parts), device=device)
        passes = self._micro_batches(rows, indices)
        self.step.plan([one for one, _ in passes])
        for one, share in passes:
            batch = rows.micro_batch(one, self.config.with_prompt, self.config.packing).to(device)
            loss, parts = self._loss(batch, counts)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            self.optimizer.accumulate()
            sums += share * parts.detach().float()
        return sums

    def _micro_batches(self, rows: RowSource, indices: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """This worker's micro-batches, each counting once. Workers whose parameters are shards go forward
        equally often: who has fewer repeats a row that counts nothing."""
        world, config = self.workers.world, self.config
        most = config.pass_tokens(next(self.model.parameters()).device.type)
        shares = [
            split_for_worker(indices, rows.lengths, rank, world, most, config.packing)
            for rank in (range(world) if config.parallel == "fsdp2" else [self.workers.rank])
        ]
        mine = shares[self.workers.rank] if len(shares) > 1 else shares[0]
        missing = max(len(one) for one in shares) - len(mine)
        return [*((one, 1.0) for one in mine), *((indices[:1], 0.0) for _ in range(missing))]

    def _step(self, step: int, indices: np.ndarray) -> dict[str, float]:
        sums = self.accumulate(step, indices)
        if self.workers.world > 1:
            reached = self.optimizer.reached()
            sum_over(self.workers, [*self.optimizer.unsummed(), reached])
            self.optimizer.drop_unreached(reached)
        self.workers.add(sums)
        if not torch.isfinite(sums).all():
            raise TrainingError(f"the loss is not finite at step {step}; lower optimizer.lr.")
        factor = schedule(step, self.steps, self.config.optimizer)
        norm = self.optimizer.step(factor)
        return {
            **dict(zip(self.step.parts, sums.tolist(), strict=True)),
            "grad_norm": norm,
            "lr": self.config.optimizer.lr * factor,
            **self.step.metrics(),
        }

    def save(self, folder: Path) -> None:
        """Write the run's state: a temporary folder first, then one rename. Every worker must call it; the
        first one writes."""
        state = {
            "position": [self.position.step, self.position.tokens, self.position.seconds],
            "optimizer": self.optimizer.state_dict(),
            "objective": self.step.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.workers.rank == 0:
            with writing(folder) as temporary:
                torch.save(state, temporary / STATE)

    def weights(self) -> dict[str, Tensor]:
        """The model's whole state dict. Every worker must call it."""
        return {name: whole(tensor) for name, tensor in self.model.state_dict().items()}

    def load(self, folder: Path) -> None:
        """Continue from a state that `save` wrote."""
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
        self.position = Position(*state["position"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step.load_state_dict(state["objective"])
        torch.set_rng_state(state["rng"])


def count(rows: RowSource, indices: np.ndarray) -> Counts:
    """The tokens of a step, weighted by row."""
    weights = rows.weights[indices].astype(np.float64)
    prompts = rows.prompt_len[indices]
    answers = weights * (rows.lengths[indices] - prompts)
    return Counts(
        answers=max(float(answers.sum()), TINY),
        prompts=max(float((weights * (prompts - 1)).sum()), TINY),
        rationales=float(answers[rows.rationale[indices]].sum()),
    )


class writing:
    """A folder that appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.temporary.rename(self.folder)
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)
