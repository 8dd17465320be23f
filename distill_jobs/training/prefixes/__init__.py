"""Who writes the answers that a step trains on: logs, teacher, student now, or student before (replay).

`Prefixes` turns a step's rows into those rows with their answers. Generated answers are shared among the
workers by one sum, so that every worker holds the same rows and the same replay buffer. Knows nothing of
losses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distill_jobs.training.data import Rows
from distill_jobs.training.method_config import PrefixConfig
from distill_jobs.training.prefixes.generate import Sampling, generate, uniforms
from distill_jobs.training.prefixes.mixture import plan
from distill_jobs.training.prefixes.replay import ReplayBuffer, Written

__all__ = ["Group", "Prefixes", "StepAnswers"]


class Group(Protocol):
    """This worker among its equals."""

    @property
    def rank(self) -> int:
        """Its number, from 0."""

    @property
    def world(self) -> int:
        """How many they are."""

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over the workers, in place."""


@dataclass(frozen=True, slots=True)
class StepAnswers:
    """A step's rows, one place a row."""

    written: list[Written]
    logged: np.ndarray  # (rows,) bool: as in the dataset
    by_student: np.ndarray  # (rows,) bool: the student wrote it, now or before


class Prefixes:
    """Decides, generates and remembers."""

    def __init__(self, config: PrefixConfig, seed: int, stop: tuple[int, ...], group: Group) -> None:
        self.config, self.seed, self.group = config, seed, group
        self.buffer = ReplayBuffer(config.capacity)
        self.how = Sampling(config.temperature, config.max_new_tokens, stop)
        self.seconds = 0.0
        self.tokens = 0

    def answers(
        self, student: Any, teacher: Any, step: int, steps: int, indices: np.ndarray, rows: Rows
    ) -> StepAnswers:
        """The step's rows with the answers of their sources; new answers of the student enter the buffer."""
        chosen = plan(self.config, self.seed, step, steps, len(indices), len(self.buffer))
        written = [Written(int(i), int(i), rows.tokens(i), int(rows.prompt_len[i])) for i in indices]
        logged, by_student = np.ones(len(indices), bool), np.zeros(len(indices), bool)
        rng = np.random.default_rng([self.seed, step, 3])
        for place, one in zip(chosen.replay, self.buffer.take(len(chosen.replay), rng), strict=True):
            written[place], logged[place], by_student[place] = one, False, True
        for model, places in ((teacher, chosen.teacher), (student, chosen.student)):
            if len(places):
                self._write(model, places, step, written, len(rows))
                logged[places] = False
        by_student[chosen.student] = True
        if self.config.replay:
            self.buffer.add([written[place] for place in chosen.student])
        return StepAnswers(written, logged, by_student)

    def _write(self, model: Any, places: np.ndarray, step: int, written: list[Written], base: int) -> None:
        """Put new answers in the given places."""
        started = time.monotonic()
        prompts = [written[p].ids[: written[p].prompt_len] for p in places]
        answers = self._share(self._mine(model, places, prompts, step), len(places), model)
        for place, prompt, answer in zip(places, prompts, answers, strict=True):
            uid = base + step * len(written) + int(place)
            written[place] = Written(
                uid, written[place].source, np.concatenate([prompt, answer]), len(prompt)
            )
        self.tokens += sum(len(a) for a in answers)
        self.seconds += time.monotonic() - started

    def _mine(
        self, model: Any, places: np.ndarray, prompts: list[np.ndarray], step: int
    ) -> dict[int, np.ndarray]:
        """This worker's share of the answers, by their order among the places."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        mine = order[self.group.rank :: self.group.world]
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(mine), self.config.batch_rows):
            part = mine[start : start + self.config.batch_rows]
            numbers = uniforms(self.seed, step, [int(places[i]) for i in part], self.how.max_new_tokens)
            answers = generate(model, [prompts[i] for i in part], numbers, self.how)
            found |= dict(zip(part, answers, strict=True))
        return found

    def _share(self, mine: dict[int, np.ndarray], count: int, model: Any) -> list[np.ndarray]:
        """Everybody's answers: each worker fills its rows of one table, the sum is the whole."""
        if self.group.world == 1:
            return [mine[i] for i in range(count)]
        device = next(model.parameters()).device
        table = torch.zeros(count, 1 + self.how.max_new_tokens, dtype=torch.long, device=device)
        for i, answer in mine.items():
            table[i, 0] = len(answer)
            table[i, 1 : 1 + len(answer)] = torch.from_numpy(answer)
        self.group.add(table)
        whole = table.cpu().numpy()
        return [row[1 : 1 + row[0]] for row in whole]

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "seconds": self.seconds, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.seconds, self.tokens = state["seconds"], state["tokens"]
