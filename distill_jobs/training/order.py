"""Which rows make which step, and which worker takes which of them, in what micro-batches.

Everything here is a pure function of the rows' lengths, the seed and the step, so workers agree without
talking and a run continues anywhere. Knows nothing of tokens, models or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Order:
    """Which rows make which step: a pure function of (seed, step), the same for any number of workers."""

    lengths: np.ndarray
    seed: int
    batch_rows: int
    bucket_window: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.lengths) // self.batch_rows)

    def _epoch(self, epoch: int) -> np.ndarray:
        """(steps, batch_rows) row indices of one pass; the rows of `bucket_window` steps are sorted by
        length together."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        size = min(self.batch_rows, len(order))
        order = order[: self.steps_per_epoch * size].reshape(-1, size)
        if self.bucket_window == 1:
            return order
        windows = []
        for start in range(0, len(order), self.bucket_window):
            flat = order[start : start + self.bucket_window].reshape(-1)
            steps = flat[np.argsort(self.lengths[flat], kind="stable")].reshape(-1, size)
            windows.append(rng.permutation(steps))
        return np.concatenate(windows)

    def steps(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, row indices) for first <= step < last; starting in the middle costs nothing."""
        epoch = -1
        for step in range(first, last):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                table = self._epoch(epoch)
            yield step, table[step % self.steps_per_epoch]


def split_for_worker(
    indices: np.ndarray, lengths: np.ndarray, rank: int, world: int, budget: int, packed: bool = False
) -> list[np.ndarray]:
    """The worker's share of a step, as micro-batches of at most `budget` tokens (or one row): padded ones, or
    the rows' own where they are packed."""
    ordered = indices[np.argsort(lengths[indices], kind="stable")]
    mine = ordered[rank::world]
    batches: list[np.ndarray] = []
    current: list[int] = []
    held = 0
    for index in mine:
        length = int(lengths[index])
        held = held + length if packed else (len(current) + 1) * length
        if current and held > budget:
            batches.append(np.array(current))
            current, held = [], length
        current.append(index)
    return [*batches, np.array(current)] if current else batches
