"""Which tokens of a micro-batch the terms compare, and which tokens each of them may look back on.

Positions count in padded rows, (rows of data, longest), also where the forward pass was packed. Knows nothing
of models; positions are those whose next token counts, so padding never takes part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_jobs.training.data import MicroBatch


@dataclass(frozen=True, slots=True)
class Positions:
    """N positions of a padded (B, S) batch."""

    rows: Tensor  # (N,)
    columns: Tensor  # (N,)

    @classmethod
    def of(cls, batch: MicroBatch, chosen: Tensor) -> Positions:
        """Those of the batch's counted positions that `chosen` (N,) marks."""
        places = batch.columns if batch.position_ids is None else batch.position_ids[0][batch.columns]
        return cls(batch.samples[chosen], places[chosen])

    def pick(self, states: Tensor) -> Tensor:
        """(B, S, d) -> (N, d)."""
        return states[self.rows, self.columns]

    def visible(self, length: int) -> Tensor:
        """(N, S): places that a position may look at: itself and what is before it."""
        return torch.arange(length, device=self.columns.device) <= self.columns[:, None]


def spread(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """The even layer map: student block i learns from teacher block i * teacher / student."""
    return tuple((i, max(1, round(i * teacher / student))) for i in range(1, student + 1))
