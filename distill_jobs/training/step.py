"""What a micro-batch adds to the step's loss: the model's hidden states into the chunked op.

`Step` is what the loop asks of an objective; `DistillStep` is the one for rows with a cached teacher. Knows
nothing of workers, optimizers or where rows come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from distill_jobs.training.config import LossConfig, TrainConfig
from distill_jobs.training.data import MicroBatch, RowSource
from distill_jobs.training.losses import LossWeights, SparseTeacher, linear_divergence


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a whole optimizer step, over all workers and micro-batches: what losses are divided by."""

    answers: float
    """Completion tokens, each times its row's weight; those of rationales are among them."""
    prompts: float
    """Prompt tokens that are predicted (all but the first), each times its row's weight."""
    rationales: float = 0.0
    """The completion tokens of rows whose task is "rationale", each times its row's weight."""


class Step(Protocol):
    """An objective. The loop calls `rows` once a step on every worker, then `loss` for each micro-batch of
    this worker's share; gradients and parts are summed over micro-batches and workers, so a loss divides by
    `Counts` and never by what is in its micro-batch."""

    parts: Sequence[str]
    """Names of the numbers that `loss` returns beside the loss; they appear in the run's metrics."""

    def rows(
        self, step: int, steps: int, indices: np.ndarray, rows: RowSource
    ) -> tuple[np.ndarray, RowSource]:
        """The rows that step `step` of `steps` trains on: those given, or others made from them (rollouts of
        the student). All workers must return the same. Schedules over the run may look at the step here."""

    def loss(self, batch: MicroBatch, counts: Counts) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the step's loss, and its share of `parts` as one tensor."""

    def extra_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Parameters that are trained and saved with the run but not exported with the model: learned
        projections. Names must not be the model's. Called once, before the first step."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs besides the parameters (a replay buffer); tensors, numbers, strings, lists and
        dicts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


class DistillStep:
    """Divergence from a cached teacher and cross entropy with its text: `batch_loss` over the rows as they
    are."""

    parts = ("kd", "ce")

    def __init__(self, model: Any, config: LossConfig) -> None:
        self.model, self.config = model, config

    def rows(
        self, step: int, steps: int, indices: np.ndarray, rows: RowSource
    ) -> tuple[np.ndarray, RowSource]:
        return indices, rows

    def loss(self, batch: MicroBatch, counts: Counts) -> tuple[Tensor, Tensor]:
        return batch_loss(self.model, batch, self.config, counts)

    def extra_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to continue."""


def make_step(model: Any, config: TrainConfig) -> Step:
    """The objective that the configuration asks for."""
    return DistillStep(model, config.loss)


def hidden_states(model: Any, batch: MicroBatch) -> Tensor:
    """(N, d) last hidden states of the decoder at the batch's counted positions."""
    states: Tensor = model.get_decoder()(**batch.model_inputs(), use_cache=False).last_hidden_state
    return states[batch.rows, batch.columns]


def batch_loss(model: Any, batch: MicroBatch, loss: LossConfig, counts: Counts) -> tuple[Tensor, Tensor]:
    """The micro-batch's share of the step's loss, and [KL, CE]."""
    head = model.get_output_embeddings().weight
    hidden = hidden_states(model, batch)
    counted = ~batch.in_prompt
    teacher = None
    if batch.topk_ids is not None and batch.topk_logprobs is not None and loss.kd_weight:
        teacher = SparseTeacher(batch.topk_ids[counted], batch.topk_logprobs[counted])
    weights = LossWeights(kd=loss.kd_weight, hard=loss.hard_weight, temperature=loss.temperature)
    scale = batch.weights / counts.answers
    total, parts = linear_divergence(
        hidden[counted], head, batch.labels[counted], teacher, weights, scale[counted], loss.chunk
    )
    if loss.prompt_weight and bool(batch.in_prompt.any()):
        extra, _ = linear_divergence(
            hidden[batch.in_prompt],
            head,
            batch.labels[batch.in_prompt],
            None,
            LossWeights(kd=0.0, hard=loss.prompt_weight),
            batch.weights[batch.in_prompt] / counts.prompts,
            loss.chunk,
        )
        total = total + extra
    return total, parts
