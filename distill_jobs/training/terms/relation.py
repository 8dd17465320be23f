"""Relations between the tokens of a row, which models of any width share.

value, query: KL of softmax(XX^T / sqrt(d)) over what a token sees (MiniLM, arXiv 2002.10957 eq. 6; MiniLMv2).
distance: RKD-D (arXiv 1904.05068 eq. 5-6): Huber loss of pairwise distances, each over its own mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from distill_jobs.training.recorder import Seen
from distill_jobs.training.terms.attention import map_kl, scores
from distill_jobs.training.terms.positions import Positions


def relation_scores(states: Tensor, positions: Positions) -> Tensor:
    """(B, heads, S, D) -> (N, heads, S): scaled products of each position with what it may see."""
    return scores(states, states, states.shape[-1] ** -0.5, positions)


def distances(states: Tensor, positions: Positions) -> Tensor:
    """(B, S, d) -> (N, S): distances to what each position may see over their mean in its sample; else 0.

    A token's distance to itself counts neither in the mean nor in the loss.
    """
    full = torch.cdist(states.float(), states.float(), compute_mode="donot_use_mm_for_euclid_dist")
    pairs = _pairs(states.shape[1], positions)
    mine = full[positions.rows, positions.columns] * pairs
    rows = len(states)
    total = mine.new_zeros(rows).index_add(0, positions.rows, mine.sum(-1))
    count = mine.new_zeros(rows).index_add(0, positions.rows, pairs.sum(-1).to(mine.dtype))
    mean = total / count.clamp_min(1)
    return mine / mean.clamp_min(1e-8)[positions.rows, None]


def _pairs(length: int, positions: Positions) -> Tensor:
    """(N, S): what each position may see, itself left out."""
    place = torch.arange(length, device=positions.columns.device)
    return positions.visible(length) & (place != positions.columns[:, None])


def distance_loss(student: Tensor, teacher: Tensor, positions: Positions) -> Tensor:
    """(B, S, d_s), (B, S, d_t) -> (N,): mean Huber loss over a position's pairs; 0 without any."""
    pairs = _pairs(student.shape[1], positions)
    loss = nn.functional.smooth_l1_loss(
        distances(student, positions), distances(teacher, positions), reduction="none"
    )
    return (loss * pairs).sum(-1) / pairs.sum(-1).clamp_min(1)


class Relations(nn.Module):
    """The mean over the layer map of the chosen relation's loss."""

    def __init__(
        self, layers: tuple[tuple[int, int], ...], kind: Literal["value", "query", "distance"]
    ) -> None:
        super().__init__()
        self.layers, self.kind = layers, kind

    def forward(self, student: Seen, teacher: Seen, positions: Positions) -> Tensor:
        """(N,) losses of the positions."""
        return torch.stack([self._pair(student, teacher, positions, a, b) for a, b in self.layers]).mean(0)

    def _pair(self, student: Seen, teacher: Seen, positions: Positions, mine: int, its: int) -> Tensor:
        if self.kind == "distance":
            return distance_loss(student.hidden[mine], teacher.hidden[its], positions)
        a, b = (getattr(seen.heads[block], self.kind) for seen, block in ((student, mine), (teacher, its)))
        return map_kl(relation_scores(a, positions), relation_scores(b, positions))
