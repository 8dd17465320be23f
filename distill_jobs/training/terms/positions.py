"""Which tokens of a micro-batch the terms compare, and which tokens each of them may look back on.

Knows nothing of models; positions are those whose next token counts, so padding never takes part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Positions:
    """N positions of a (B, S) batch."""

    rows: Tensor  # (N,)
    columns: Tensor  # (N,)
    samples: Tensor  # (N,): which sample each belongs to; its own row when rows are not packed
    segments: Tensor | None = None  # (B, S): the sample at each place of a packed row, anything on padding

    def pick(self, states: Tensor) -> Tensor:
        """(B, S, d) -> (N, d)."""
        return states[self.rows, self.columns]

    def visible(self, length: int) -> Tensor:
        """(N, S): places that a position may look at: itself and what is before it in its own sample."""
        place = torch.arange(length, device=self.columns.device)
        seen = place <= self.columns[:, None]
        if self.segments is not None:
            seen = seen & (self.segments[self.rows] == self.segments[self.rows, self.columns][:, None])
        return seen


def spread(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """The even layer map: student block i learns from teacher block i * teacher / student."""
    return tuple((i, max(1, round(i * teacher / student))) for i in range(1, student + 1))
