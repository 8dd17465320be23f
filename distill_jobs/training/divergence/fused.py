"""Losses and gradients of a chunk of rows in one launch, where a CUDA device and triton are: what `rows` does
in torch, in a kernel.

The matrix products stay cuBLAS. Only labels and full teacher logits are fused (rebuilt from hidden states
included): against k tokens or draws, `rows` makes few passes over the vocabulary and the rest are gathers of
k numbers, which a kernel would not make shorter. Importable without triton. Knows nothing of hidden states
or chunks.
"""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill_jobs.training.divergence.formulas import Divergence
from distill_jobs.training.divergence.rows import LossWeights
from distill_jobs.training.divergence.teachers import DenseTeacher, SampledTeacher, SparseTeacher

_BLOCK, _WARPS = 2048, 8
"""Tokens a step and warps a row: 8 tokens a thread, so that six running sums of each stay in registers."""


def fusible(logits: Tensor, teacher: object) -> bool:
    """Whether such logits, compared with such a teacher, can go through the kernel."""
    if isinstance(teacher, SparseTeacher | SampledTeacher) or logits.dtype != torch.float32:
        return False
    return logits.device.type == "cuda" and importlib.util.find_spec("triton") is not None


class _Formula(NamedTuple):
    """A divergence as the kernel takes it."""

    kind: str
    share: float = 0.0
    of_teacher: float = 0.5  # the teacher's share in the mixture
    over: float = 1.0

    def shares(self) -> tuple[float, float, float]:
        """The share, and the logarithms of the teacher's and the student's part of the mixture."""
        return self.share, math.log(self.of_teacher), math.log1p(-self.of_teacher)


def _formula(one: Divergence) -> _Formula:
    """Its ends are other divergences, as in `formulas`."""
    if one.kind == "jsd":
        if one.beta in (0.0, 1.0):
            return _Formula("reverse_kl" if one.beta else "forward_kl")
        return _Formula("jsd", one.beta, one.beta, one.beta * (1 - one.beta) if one.over_beta else 1.0)
    if one.kind == "skew_kl":
        return _Formula("skew_kl", one.alpha, one.alpha) if one.alpha else _Formula("forward_kl")
    if one.kind == "skew_reverse_kl":
        return _Formula(one.kind, one.alpha, 1 - one.alpha) if one.alpha else _Formula("reverse_kl")
    return _Formula(one.kind)


def fused_losses(
    logits: Tensor,
    labels: Tensor,
    teacher: DenseTeacher | None,
    weights: LossWeights,
    row_weights: Tensor,
    grad: Tensor,
    block: int = _BLOCK,
) -> Tensor:
    """(rows, 2) losses [divergence, cross entropy]; `grad` becomes the gradient of their weighted sum, each
    row times its row weight.

    `logits` (rows, V) and `row_weights` (rows,) are fp32, the teacher's logits of any precision; `grad`
    (rows, V) is `logits` itself, or a tensor of the precision that the products want. A label outside the
    vocabulary makes its row's cross entropy NaN. `block` is a power of two.
    """
    from distill_jobs.training.divergence.kernel import row_kernel

    one = weights.divergence
    formula = _Formula("none") if teacher is None or not weights.kd else _formula(one)
    theirs = logits if teacher is None else teacher.logits
    if theirs.stride(-1) != 1:
        theirs = theirs.contiguous()
    scale = one.scale / formula.over
    losses = torch.empty(len(logits), 2, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        row_kernel[(len(logits),)](
            logits,
            theirs,
            labels.contiguous(),
            row_weights.contiguous(),
            grad,
            losses,
            logits.stride(0),
            theirs.stride(0),
            grad.stride(0),
            logits.shape[1],
            min(logits.shape[1], theirs.shape[1]),
            1 / one.temperature,
            *formula.shares(),
            scale,
            weights.kd * scale / one.temperature,
            weights.hard,
            KIND=formula.kind,
            BLOCK=block,
            num_warps=_WARPS,
            enable_fp_fusion=True,  # triton's default is changing, and warns
        )
    return losses
