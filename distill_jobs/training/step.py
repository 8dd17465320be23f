"""What a micro-batch adds to the step's loss: the divergence, the labels' cross entropy, the extra terms.

`Step` is what the loop asks of an objective; `DistillStep` is the one that a configuration describes. Knows
nothing of optimizers or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from distill_jobs.training.ahead import About, ReadAhead
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.cross_tokenizer import CrossTokenizer
from distill_jobs.training.data import MicroBatch, Rows, RowSource
from distill_jobs.training.divergence import (
    HiddenTeacher,
    LossWeights,
    SampledTeacher,
    SparseTeacher,
    Teacher,
    linear_divergence,
    loss_weights,
)
from distill_jobs.training.live_teacher import LiveTeachers, forward
from distill_jobs.training.prefixes import Group, Prefixes
from distill_jobs.training.recorder import Recorder, Seen
from distill_jobs.training.terms import Positions, Terms, recorder_of
from distill_jobs.training.terms.rationale import Prefixed, task_scale


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

    def plan(self, passes: Sequence[np.ndarray]) -> None:
        """The rows of the micro-batches that `loss` is called for next, in their order."""

    def loss(self, batch: MicroBatch, counts: Counts) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the step's loss, and its share of `parts` as one tensor."""

    def extra_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Parameters that are trained and saved with the run but not exported with the model: learned
        projections. Names must not be the model's. Called once, before the first step."""

    def metrics(self) -> dict[str, float]:
        """What this worker measured so far beside `parts`."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs besides the parameters (a replay buffer); tensors, numbers, strings, lists and
        dicts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


@dataclass(frozen=True, slots=True)
class Alone:
    """The group of a single worker."""

    rank: int = 0
    world: int = 1

    def add(self, _: Tensor) -> None:
        """Nothing to sum."""


class DistillStep:
    """The loss that a configuration describes: teachers cached or live, terms, prefixes, tasks and stages."""

    def __init__(self, model: Any, config: TrainConfig, group: Group | None = None) -> None:
        self.model, self.config = model, config
        self.weights = loss_weights(config.loss)
        self.by_student = _on_own_answers(config, self.weights)
        self.teachers: LiveTeachers | None = None
        self.ahead: ReadAhead | None = None
        self.terms: Terms | None = None
        self.prefixes: Prefixes | None = None
        self.recorder: Recorder | None = None
        self.about: About | None = None
        self.source: RowSource | None = None
        self.predicts, self.compares = True, config.terms.intermediate and not config.terms.two_stage
        device = next(model.parameters()).device
        if config.teacher is not None:
            attention = model.config._attn_implementation
            self.teachers = LiveTeachers(config.teacher, device, attention)
            self.ahead = ReadAhead(self.teachers, config.teacher.at_once(device.type))
        self.cross = _cross_tokenizer(model, config, self.teachers)
        if config.terms.intermediate:
            assert self.teachers is not None  # TrainConfig refuses terms without a teacher
            self._add_terms(self.teachers.first, device)
        if config.prefix.generates:
            self.prefixes = Prefixes(config.prefix, config.seed, _stop_ids(model), group or Alone())
        self.prefixed = Prefixed.of(model, config)
        self.parts: Sequence[str] = ["kd", "ce", *(self.terms.names if self.terms else ())]

    def _add_terms(self, teacher: Any, device: torch.device) -> None:
        self.terms = Terms(self.config.terms, self.model.config, teacher.model.config).to(device)
        self.recorder = recorder_of(self.model.get_decoder(), self.terms, 0)
        teacher.recorder = recorder_of(teacher.model.get_decoder(), self.terms, 1)

    def rows(
        self, step: int, steps: int, indices: np.ndarray, rows: RowSource
    ) -> tuple[np.ndarray, RowSource]:
        first = step < round(self.config.terms.two_stage * steps)
        self.predicts = not first
        self.compares = self.terms is not None and (first or not self.config.terms.two_stage)
        if self.prefixed is not None:
            rows = self.prefixed.of_rows(rows)
        if self.prefixes is not None:
            assert isinstance(rows, Rows)
            return self._written(step, steps, indices, rows)
        if self.teachers is not None and (self.about is None or self.source is not rows):
            count = len(rows.lengths)
            routes = self.teachers.routes(getattr(rows, "teacher_tags", None), count)
            self.about = About(np.arange(count), np.zeros(count, bool), routes)
        self.source = rows
        return indices, rows

    def _written(
        self, step: int, steps: int, indices: np.ndarray, rows: Rows
    ) -> tuple[np.ndarray, RowSource]:
        """The step's rows with answers by their sources, as a source of their own."""
        assert self.prefixes is not None
        teacher = self.teachers.first.model if self.teachers else None
        found = self.prefixes.answers(self.model, teacher, step, steps, indices, rows)
        sources = np.array([one.source for one in found.written])
        made = Rows.of(
            [one.ids for one in found.written],
            np.array([one.prompt_len for one in found.written]),
            rows.weights[sources],
            rows.rationale[sources],
        )
        routes = np.zeros(len(sources), np.int64)
        if self.teachers is not None:
            tags = getattr(rows, "teacher_tags", None)
            routes = self.teachers.routes(None if tags is None else tags[sources], len(sources))
        self.about = About(np.array([one.uid for one in found.written]), found.by_student, routes)
        self.source = made
        return np.arange(len(sources)), made

    def plan(self, passes: Sequence[np.ndarray]) -> None:
        if self.ahead is not None:
            self.ahead.plan(passes)

    def loss(self, batch: MicroBatch, counts: Counts) -> tuple[Tensor, Tensor]:
        its_states, its_inside = self._look(batch)  # first: nothing of the student is held meanwhile
        states, inside = forward(self.model.get_decoder(), batch, self.recorder if self.compares else None)
        hidden = states[batch.rows, batch.columns]
        total, parts = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros(2, dtype=torch.float32)
        if self.predicts:
            total, parts = self._prediction(batch, hidden, its_states, counts)
        named = hidden.new_zeros(len(self.parts) - 2, dtype=torch.float32)
        if self.compares:
            extra, named = self._terms(batch, inside, its_inside, counts)
            total = total + extra
        return total, torch.cat([parts.to(named.dtype), named])

    def _look(self, batch: MicroBatch) -> tuple[list[Tensor | None], Seen]:
        """The live teachers' last hidden states at the answers' positions, and the first one's inside."""
        if self.teachers is None or self.about is None or self.cross is not None:
            return [], Seen()
        if not self.compares and not (self.predicts and self.config.loss.kd_weight):
            return [], Seen()
        assert self.ahead is not None
        assert self.source is not None
        rows = batch.indices.cpu().numpy()
        if not self.compares:
            return self.ahead.states(rows, self.source, self.about, batch), Seen()
        return self.ahead.read(rows, self.source, self.about, batch, True)

    def _prediction(
        self, batch: MicroBatch, hidden: Tensor, states: list[Tensor | None], counts: Counts
    ) -> tuple[Tensor, Tensor]:
        """Divergence and cross entropy of the answers, and the cross entropy of the prompts."""
        loss, head = self.config.loss, self.model.get_output_embeddings().weight
        counted = ~batch.in_prompt
        rows, labels, scale = hidden[counted], batch.labels[counted], self._scale(batch, counts)[counted]
        total, parts = rows.new_zeros((), dtype=torch.float32), rows.new_zeros(2, dtype=torch.float32)
        for chosen, own, route in self._groups(batch, counted):
            teacher = self._teacher(batch, counted, states, route, chosen)
            weights = self.by_student if own else self.weights
            one, seen = linear_divergence(
                rows[chosen], head, labels[chosen], teacher, weights, scale[chosen], loss.chunk
            )
            total, parts = total + one, parts + seen.float()
        if self.cross is not None and loss.kd_weight:
            gap = self._across(batch, rows, head, scale)
            total, parts = total + loss.kd_weight * gap, torch.stack([gap.detach(), parts[1]])
        if loss.prompt_weight and bool(batch.in_prompt.any()):
            total = total + self._prompts(batch, hidden, head, counts)
        return total, parts

    def _across(self, batch: MicroBatch, hidden: Tensor, head: Tensor, scale: Tensor) -> Tensor:
        """The distance to a teacher with another tokenizer."""
        assert self.cross is not None
        assert self.about is not None
        assert isinstance(self.source, Rows)
        indices = batch.indices.cpu().numpy()
        uids = self.about.uids[indices].tolist()
        return self.cross.loss(self.source, indices, uids, hidden, head, scale)

    def _scale(self, batch: MicroBatch, counts: Counts) -> Tensor:
        """(N,) each position's weight over the step's weighted tokens."""
        if self.config.terms.rationale is None:
            return batch.weights / counts.answers
        share = self.config.terms.rationale.rationale_weight
        return task_scale(batch.weights, batch.rationale, counts.answers, counts.rationales, share)

    def _groups(self, batch: MicroBatch, counted: Tensor) -> list[tuple[Any, bool, int]]:
        """(positions among the answers', written by the student, teacher): what shares one loss."""
        if self.about is None:
            return [(slice(None), False, 0)]
        rows = batch.indices.cpu().numpy()
        kinds = np.stack([self.about.by_student[rows].astype(np.int64), self.about.routes[rows]], 1)
        found, which = np.unique(kinds, axis=0, return_inverse=True)
        if len(found) == 1:
            return [(slice(None), bool(found[0][0]), int(found[0][1]))]
        group = torch.from_numpy(which.reshape(-1)).to(batch.samples.device)[batch.samples[counted]]
        return [(group == i, bool(own), int(route)) for i, (own, route) in enumerate(found.tolist())]

    def _teacher(
        self, batch: MicroBatch, counted: Tensor, states: list[Tensor | None], route: int, chosen: Any
    ) -> Teacher | None:
        """What is known of the teacher at the chosen answers' positions."""
        if not self.config.loss.kd_weight or self.cross is not None:
            return None
        if self.teachers is not None:
            return self.teachers.rows(states, route, chosen)
        return cached_teacher(batch, counted, self.source)

    def _prompts(self, batch: MicroBatch, hidden: Tensor, head: Tensor, counts: Counts) -> Tensor:
        weights = LossWeights(kd=0.0, hard=self.config.loss.prompt_weight)
        chosen, chunk = batch.in_prompt, self.config.loss.chunk
        scale = batch.weights[chosen] / counts.prompts
        loss, _ = linear_divergence(hidden[chosen], head, batch.labels[chosen], None, weights, scale, chunk)
        return loss

    def _terms(
        self, batch: MicroBatch, student: Seen, teacher: Seen, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the terms, and each of them."""
        assert self.terms is not None
        everywhere = self.config.terms.positions == "all"
        chosen = torch.ones_like(batch.in_prompt) if everywhere else ~batch.in_prompt
        total = counts.answers + (counts.prompts if everywhere else 0)
        scale = batch.weights[chosen] / total
        losses = self.terms(student, teacher, Positions.of(batch, chosen))
        sums = {name: (one * scale).sum() for name, one in losses.items()}
        weighted = [self.terms.weights[name] * one for name, one in sums.items()]
        return torch.stack(weighted).sum(), torch.stack(list(sums.values())).detach()

    def extra_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return [] if self.terms is None else [(f"terms.{n}", p) for n, p in self.terms.named_parameters()]

    def metrics(self) -> dict[str, float]:
        if self.prefixes is None:
            return {}
        return {
            "generation_seconds": self.prefixes.seconds,
            "generated_tokens": float(self.prefixes.tokens),
        }

    def state_dict(self) -> dict[str, Any]:
        return {} if self.prefixes is None else {"prefixes": self.prefixes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.prefixes is not None:
            self.prefixes.load_state_dict(state["prefixes"])


def _cross_tokenizer(model: Any, config: TrainConfig, teachers: LiveTeachers | None) -> CrossTokenizer | None:
    """The distance to a teacher with another tokenizer, where the configuration asks for it."""
    if teachers is None or teachers.config.cross_tokenizer is None:
        return None
    student = config.shape.tokenizer if config.shape else model.config._name_or_path
    mine, its = (AutoTokenizer.from_pretrained(one) for one in (student, teachers.config.models[0].model))
    settings, capacity = teachers.config.cross_tokenizer, teachers.config.cache_rows
    return CrossTokenizer(settings, mine, its, teachers.first, capacity)


def _on_own_answers(config: TrainConfig, weights: LossWeights) -> LossWeights:
    """The loss of rows that the student wrote: its own tokens are no labels."""
    kind = config.prefix.student_divergence
    divergence = weights.divergence
    if kind is not None:
        divergence = dataclasses.replace(divergence, kind=kind)
    return dataclasses.replace(weights, hard=0.0, divergence=divergence)


def _stop_ids(model: Any) -> tuple[int, ...]:
    """Ids that end an answer."""
    for config in (getattr(model, "generation_config", None), model.config):
        stop = getattr(config, "eos_token_id", None)
        if stop is not None:
            return tuple(stop) if isinstance(stop, list | tuple) else (int(stop),)
    return ()


def cached_teacher(batch: MicroBatch, counted: Tensor, rows: RowSource | None) -> Teacher | None:
    """What the rows' files say of the teacher at the counted positions; None when they say nothing."""
    if batch.teacher_hidden is not None:
        head = rows.head  # type: ignore[union-attr]
        return HiddenTeacher(batch.teacher_hidden[counted], head.to(batch.teacher_hidden))
    if batch.topk_ids is None or batch.topk_logprobs is None:
        return None
    ids, logprobs = batch.topk_ids[counted], batch.topk_logprobs[counted]
    return SampledTeacher(ids, logprobs) if batch.scheme == "sampled" else SparseTeacher(ids, logprobs)


def make_step(model: Any, config: TrainConfig, group: Group | None = None) -> Step:
    """The objective that the configuration asks for."""
    return DistillStep(model, config, group)
