"""Optimal brain surgeon over one linear layer: its columns settle one by one, the later ones make up for it.

`sweep` is SparseGPT's and GPTQ's common loop (arXiv 2301.00774, 2210.17323): when a column's weights become
what a rule says, the layer's squared error on its inputs grows least if the columns still open move by
-error / [H^-1]_jj * [H^-1]_j. The inverses of H without the settled columns are the rows of one Cholesky
factor. Knows nothing of models.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distill_jobs.training.rounding import Grid, codes_on, grid_of, values

BLOCK = 128
"""Columns after which the rest of the layer is updated: one product instead of many outer ones."""


class Rule(Protocol):
    """What weights become."""

    def open(self, weight: Tensor, diagonal: Tensor) -> None:
        """A block begins: its (out, columns) weights as they are now, and (columns,) of the factor's
        diagonal."""

    def settle(self, weight: Tensor, diagonal: Tensor, place: int) -> Tensor:
        """(out,) what the column at `place` of the block becomes; those before it are settled."""


def sweep(weight: Tensor, hessian: Tensor, rule: Rule, damping: float = 0.01, block: int = BLOCK) -> Tensor:
    """(out, in) fp32 weights, settled by the rule.

    Args:
        weight: (out, in).
        hessian: (in, in), the inputs' second moments X X^T, in any scale.
        damping: added to the diagonal, times its mean.
    """
    open_, factor = prepare(weight, hessian, damping)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        part, inner = open_[:, start:end], factor[start:end, start:end]
        diagonal, errors = inner.diagonal(), torch.zeros_like(part)
        rule.open(part, diagonal)
        for place in range(end - start):
            settled = rule.settle(part, diagonal, place)
            errors[:, place] = (part[:, place] - settled) / diagonal[place]
            part[:, place:] -= torch.outer(errors[:, place], inner[place, place:])
            part[:, place] = settled
        open_[:, end:] -= errors @ factor[start:end, end:]
    return open_


def on_grid(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """(out, in) fp32 weights by GPTQ, in blocks that hold whole groups."""
    return sweep(weight, hessian, Rounded(grid), block=max(1, BLOCK // grid.group_size) * grid.group_size)


def prepare(weight: Tensor, hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The weights in fp32, zero where an input never is anything else, and the upper factor of H^-1."""
    hessian, open_ = hessian.double().clone(), weight.detach().float().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    open_[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return open_, torch.linalg.cholesky(inverse, upper=True).to(open_.dtype)


class Sparse:
    """SparseGPT: the weights whose removal costs least, w^2 / [H^-1]_jj, become zero."""

    def __init__(self, share: float, n_of_m: tuple[int, int] | None = None) -> None:
        self.share, self.n_of_m = share, n_of_m
        self._goes = torch.zeros(0, 0, dtype=torch.bool)

    def open(self, weight: Tensor, diagonal: Tensor) -> None:
        if self.n_of_m is None:
            self._goes = lowest(weight.square() / diagonal.square(), self.share)
        else:
            self._goes = torch.zeros_like(weight, dtype=torch.bool)

    def settle(self, weight: Tensor, diagonal: Tensor, place: int) -> Tensor:
        if self.n_of_m is not None and place % self.n_of_m[1] == 0:
            n, m = self.n_of_m
            cost = (weight[:, place : place + m] / diagonal[place : place + m]).square()
            self._goes[:, place : place + m] = lowest_of_neighbours(cost, n, m)
        return torch.where(self._goes[:, place], 0.0, weight[:, place])


class Rounded:
    """GPTQ: every column is rounded to its group's grid, which is laid when the group begins."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._scale = self._zero = torch.zeros(0)

    def open(self, weight: Tensor, diagonal: Tensor) -> None:
        """Groups begin at columns. Raises: ValueError where a block cuts one in two."""
        if weight.shape[1] % self.grid.group_size:
            raise ValueError(f"{weight.shape[1]} columns are no whole groups of {self.grid.group_size}")

    def settle(self, weight: Tensor, diagonal: Tensor, place: int) -> Tensor:
        if place % self.grid.group_size == 0:
            group = weight[:, place : place + self.grid.group_size]
            self._scale, self._zero = grid_of(group[:, None], self.grid)
        column = weight[:, place, None, None]
        codes = codes_on(column, self._scale, self._zero, self.grid)
        return values(codes, self._scale, self._zero)[:, 0, 0].float()


def lowest(cost: Tensor, share: float) -> Tensor:
    """Mask of the round(share * size) lowest entries of a whole matrix; of equals the first."""
    goes = torch.zeros_like(cost, dtype=torch.bool)
    order = cost.flatten().sort(stable=True).indices
    goes.view(-1)[order[: round(share * cost.numel())]] = True
    return goes


def lowest_of_rows(cost: Tensor, share: float) -> Tensor:
    """Mask of the round(share * columns) lowest entries of every row; of equals the first."""
    order = cost.sort(dim=1, stable=True).indices[:, : round(share * cost.shape[1])]
    return torch.zeros_like(cost, dtype=torch.bool).scatter_(1, order, True)


def lowest_of_neighbours(cost: Tensor, n: int, m: int) -> Tensor:
    """Mask of the m - n lowest of every m neighbours in a row; columns must be whole groups."""
    return lowest_of_rows(cost.reshape(-1, m), (m - n) / m).view_as(cost)
