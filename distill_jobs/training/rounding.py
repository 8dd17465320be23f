"""The grid of group-wise quantized weights: codes, scales and zero points, and the values they stand for.

One definition for training, export and GPTQ: values are bf16((code - zero) * scale) of bf16 scales, as
compressed-tensors dequantizes them. Knows nothing of layers or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1e-8
"""Scale of a group of zeros."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How weights are rounded."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def lowest(self) -> int:
        """Smallest code; the largest is -lowest - 1."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """Largest code."""
        return -self.lowest - 1


def grid_of(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales (bf16) and zero points (codes, fp32) of (..., group_size) weights, both (..., 1).

    Symmetric: the largest magnitude is (levels - 1) / 2 steps from zero. Asymmetric: smallest to largest
    weight, zero among them, over levels - 1 steps (compressed-tensors' min-max observer).
    """
    levels = grid.highest - grid.lowest
    groups = groups.float()
    low = groups.amin(-1, keepdim=True).clamp_max(0)
    high = groups.amax(-1, keepdim=True).clamp_min(0)
    if grid.symmetric:
        scale = torch.maximum(-low, high) / (levels / 2)
    else:
        scale = (high - low) / levels
    scale = scale.clamp_min(SMALLEST).bfloat16()
    if grid.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.float32)
    return scale, (grid.lowest - low / scale.float()).round().clamp(grid.lowest, grid.highest)


def codes_on(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest codes of weights, fp32 integers; half way goes to the even one."""
    return (groups.float() / scale.float() + zero).round().clamp(grid.lowest, grid.highest)


def values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What codes stand for, in bf16."""
    return ((codes - zero) * scale.float()).bfloat16()


def encode(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """(out, in) weights, read in bf16 as a checkpoint holds them -> (out, in) codes int8, (out, groups)
    scales bf16, (out, groups) zero points int8."""
    groups = weight.detach().bfloat16().unflatten(1, (-1, grid.group_size))
    scale, zero = grid_of(groups, grid)
    codes = codes_on(groups, scale, zero, grid).flatten(1)
    return codes.to(torch.int8), scale.squeeze(-1), zero.squeeze(-1).to(torch.int8)


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """(out, in) weights on the grid, in their dtype: bit for bit what `encode`'s output stands for."""
    groups = weight.detach().bfloat16().unflatten(1, (-1, grid.group_size))
    scale, zero = grid_of(groups, grid)
    return values(codes_on(groups, scale, zero, grid), scale, zero).flatten(1).to(weight.dtype)


class StraightThrough(torch.autograd.Function):
    """Weights on the grid forward, the gradient as it is backward (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        return rounded(weight, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
