"""InfoNCE (arXiv 1807.03748) of the student's states against the teacher's.

Other tokens are the negatives. Knows nothing of how states were recorded.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from distill_jobs.training.recorder import Seen
from distill_jobs.training.terms.hidden import Projection
from distill_jobs.training.terms.positions import Positions


def info_nce(student: Tensor, teacher: Tensor, groups: Tensor | None, temperature: float) -> Tensor:
    """(N, d) and (N, d) -> (N,): -log softmax(cosines / temperature) at the own token.

    `groups` (N,) keeps negatives within a group; None takes all N. A token alone in its group costs nothing.
    """
    a = nn.functional.normalize(student.float(), dim=-1)
    b = nn.functional.normalize(teacher.float(), dim=-1)
    logits = a @ b.T / temperature
    if groups is not None:
        logits = logits.masked_fill(groups[:, None] != groups[None], float("-inf"))
    return torch.logsumexp(logits, -1) - logits.diagonal()


class Contrast(nn.Module):
    """The mean over the layer map of InfoNCE, student states projected to the teacher's width."""

    def __init__(
        self,
        layers: tuple[tuple[int, int], ...],
        widths: tuple[int, int],
        temperature: float,
        negatives: Literal["row", "batch"],
    ) -> None:
        super().__init__()
        self.layers, self.temperature, self.within_rows = layers, temperature, negatives == "row"
        self.projection = Projection(len(layers), *widths)

    def forward(self, student: Seen, teacher: Seen, positions: Positions) -> Tensor:
        """(N,) losses of the positions."""
        groups = positions.rows if self.within_rows else None
        return torch.stack(
            [
                info_nce(
                    self.projection(pair, positions.pick(student.hidden[mine])),
                    positions.pick(teacher.hidden[its]),
                    groups,
                    self.temperature,
                )
                for pair, (mine, its) in enumerate(self.layers)
            ]
        ).mean(0)
