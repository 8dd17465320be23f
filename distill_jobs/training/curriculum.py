"""Easy rows first: at step t a step's rows are drawn from the easiest c(t) of the data.

c(t) = min(1, sqrt(t (1 - c0^2) / T + c0^2)), the square-root competence of Platanios et al. (arXiv
1903.09848). Takes the place of `data.Order`; knows nothing of what difficulty means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from contracts.errors import DataError
from distill_jobs.training.method_config import CurriculumConfig


def competence(progress: float, config: CurriculumConfig) -> float:
    """c at a progress in [0, 1] of the run."""
    c0 = config.start
    return min(1.0, math.sqrt(progress / config.full * (1 - c0**2) + c0**2))


@dataclass(frozen=True, slots=True)
class CurriculumOrder:
    """Which rows make which step: a pure function of (seed, step), as `data.Order` is."""

    difficulty: np.ndarray  # (rows,), the larger the harder
    seed: int
    batch_rows: int
    total_steps: int
    config: CurriculumConfig

    def __post_init__(self) -> None:
        if not np.isfinite(self.difficulty).all():
            raise DataError("column difficulty holds values that are not finite; curriculum needs them all.")

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.difficulty) // self.batch_rows)

    def steps(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, row indices) for first <= step < last."""
        easiest = np.argsort(self.difficulty, kind="stable")
        size = min(self.batch_rows, len(easiest))
        for step in range(first, last):
            share = competence(step / max(1, self.total_steps), self.config)
            pool = max(size, math.ceil(share * len(easiest)))
            rng = np.random.default_rng([self.seed, step, 2])
            yield step, easiest[rng.choice(pool, size=size, replace=False)]
