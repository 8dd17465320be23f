"""Attention maps: MSE of scores (TinyBERT, arXiv 1909.10351 eq. 7) or KL of probabilities (MiniLM).

Maps are computed again from recorded queries and keys, so any attention implementation will do. With unequal
numbers of heads the maps are averaged over heads first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from distill_jobs.training.recorder import Heads, Seen
from distill_jobs.training.terms.positions import Positions


def scores(query: Tensor, key: Tensor, scaling: float, positions: Positions) -> Tensor:
    """(N, heads, S) scores before the softmax, in fp32; what a position may not see is -inf."""
    groups = query.shape[1] // key.shape[1]
    full = torch.matmul(query * scaling, key.repeat_interleave(groups, 1).transpose(2, 3))
    mine = full[positions.rows, :, positions.columns].float()
    return mine.masked_fill(~positions.visible(key.shape[2])[:, None], float("-inf"))


def map_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """(N, heads, S) scores -> (N,): KL(teacher || student) of the probabilities, mean over heads."""
    p, q = _alike(torch.softmax(teacher, -1), torch.softmax(student, -1))
    tiny = torch.finfo(p.dtype).tiny
    return (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1).mean(-1)


def map_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """(N, heads, S) scores -> (N,): mean squared difference over what is visible, mean over heads."""
    seen = torch.isfinite(teacher[:, :1])
    b, a = _alike(teacher.masked_fill(~seen, 0.0), student.masked_fill(~seen, 0.0))
    return ((a - b).square().sum(-1) / seen.sum(-1)).mean(-1)


def _alike(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """The maps head by head, or their means when the numbers of heads differ."""
    if teacher.shape[1] == student.shape[1]:
        return teacher, student
    return teacher.mean(1, keepdim=True), student.mean(1, keepdim=True)


def _own(heads: Heads, positions: Positions) -> Tensor:
    return scores(heads.query, heads.key, heads.scaling, positions)


class AttentionMaps(nn.Module):
    """The mean over the layer map of the distances between attention maps."""

    def __init__(self, layers: tuple[tuple[int, int], ...], distance: Literal["mse", "kl"]) -> None:
        super().__init__()
        self.layers = layers
        self.compare = map_kl if distance == "kl" else map_mse

    def forward(self, student: Seen, teacher: Seen, positions: Positions) -> Tensor:
        """(N,) losses of the positions."""
        return torch.stack(
            [
                self.compare(_own(student.heads[mine], positions), _own(teacher.heads[its], positions))
                for mine, its in self.layers
            ]
        ).mean(0)
