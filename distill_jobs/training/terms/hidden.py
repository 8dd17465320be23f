"""Hidden states through a learned projection (FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351 eq. 8).

The projection is trained with the student, kept in its checkpoints, and no part of what is exported.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from distill_jobs.training.recorder import Seen
from distill_jobs.training.terms.positions import Positions


def hidden_distance(student: Tensor, teacher: Tensor, distance: Literal["mse", "cosine"]) -> Tensor:
    """(N, d) and (N, d) -> (N,): mean squared difference over dimensions, or 1 - cosine; in fp32."""
    a, b = student.float(), teacher.float()
    if distance == "cosine":
        return 1 - torch.cosine_similarity(a, b, dim=-1)
    return (a - b).square().mean(-1)


class Projection(nn.Module):
    """Student widths to teacher widths, one matrix a pair of blocks; orthogonal at the start."""

    def __init__(self, pairs: int, student: int, teacher: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(student, teacher, bias=False) for _ in range(pairs))
        for one in self.maps:
            nn.init.orthogonal_(one.weight)  # type: ignore[arg-type]

    def forward(self, pair: int, states: Tensor) -> Tensor:
        """In fp32, whatever the student computes in: a projection has no copy in another dtype."""
        projected: Tensor = self.maps[pair](states.float())
        return projected


class HiddenStates(nn.Module):
    """The mean over the layer map of the distances between projected student and teacher states."""

    def __init__(
        self,
        layers: tuple[tuple[int, int], ...],
        widths: tuple[int, int],
        distance: Literal["mse", "cosine"],
    ) -> None:
        super().__init__()
        self.layers, self.distance = layers, distance
        self.projection = Projection(len(layers), *widths)

    def forward(self, student: Seen, teacher: Seen, positions: Positions) -> Tensor:
        """(N,) losses of the positions."""
        return torch.stack(
            [
                hidden_distance(
                    self.projection(pair, positions.pick(student.hidden[mine])),
                    positions.pick(teacher.hidden[its]),
                    self.distance,
                )
                for pair, (mine, its) in enumerate(self.layers)
            ]
        ).mean(0)
