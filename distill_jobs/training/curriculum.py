"""Easy rows first: at step t a step's rows are drawn from the easiest c(t) of the data.

c(t) = min(1, sqrt(t (1 - c0^2) / T + c0^2)), the square-root competence of Platanios et al. (arXiv
1903.09848). Takes the place of `order.Order`; knows nothing of what difficulty means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from contracts.errors import DataError
from distill_jobs.training.config import TrainConfig
from distill_jobs.training.data import RowSource
from distill_jobs.training.method_config import CurriculumConfig
from distill_jobs.training.order import Order


def competence(progress: float, config: CurriculumConfig) -> float:
    """c at a progress in [0, 1] of the run."""
    c0 = config.start
    return min(1.0, math.sqrt(progress / config.full * (1 - c0**2) + c0**2))


@dataclass(frozen=True, slots=True)
class CurriculumOrder:
    """Which rows make which step: a pure function of (seed, step), as `order.Order` is."""

    difficulty: np.ndarray  # (rows,), the larger the harder
    seed: int
    batch_rows: int
    total: int
    """Steps of the whole run."""
    config: CurriculumConfig

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.difficulty) // self.batch_rows)

    def steps(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, row indices) for first <= step < last; starting in the middle costs nothing."""
        easiest = np.argsort(self.difficulty, kind="stable")
        size = min(self.batch_rows, len(easiest))
        for step in range(first, last):
            share = competence(step / max(1, self.total), self.config)
            pool = max(size, math.ceil(share * len(easiest)))
            rng = np.random.default_rng([self.seed, step, 2])
            yield step, easiest[rng.choice(pool, size=size, replace=False)]


def planned_steps(rows: int, config: TrainConfig) -> int:
    """Optimizer steps of a whole run."""
    planned = max(1, round(config.epochs * max(1, rows // config.batch_rows)))
    return min(planned, config.max_steps or planned)


def order_of(rows: RowSource, config: TrainConfig) -> Order | CurriculumOrder:
    """The order that a configuration asks for.

    Raises: DataError when there is a curriculum and every row is as difficult as the next.
    """
    if config.curriculum is None:
        return Order(rows.lengths, config.seed, config.batch_rows, config.bucket_window)
    difficulty = getattr(rows, "difficulty", None)
    if difficulty is None or len(np.unique(difficulty)) < 2:
        raise DataError("curriculum needs a `difficulty` column whose values differ; the rows have none.")
    total = planned_steps(len(rows.lengths), config)
    return CurriculumOrder(difficulty, config.seed, config.batch_rows, total, config.curriculum)
