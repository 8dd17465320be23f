"""The chunked linear-plus-divergence op: from hidden states to loss and gradients without full logits in
memory.

Logits of one chunk of rows exist at a time, in a buffer that becomes their gradient; the gradients are
computed in the forward pass and kept, accumulated in fp32. It knows nothing of models, shifting or masks:
callers pass rows that count, already shifted and selected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill_jobs.training.divergence.rows import LossWeights, check, row_losses
from distill_jobs.training.divergence.teachers import DenseTeacher, HiddenTeacher, MixtureTeacher, Teacher

_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Bytes of fp32 logits of a chunk, when the caller leaves the choice to the op."""

_LEAST_ROWS = 64
"""Fewer rows than this and the pass over the output matrix costs more than its product with them."""


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows a chunk, so that its logits have a fixed size in bytes."""
    return max(_LEAST_ROWS, _CHUNK_BYTES.get(device, _CHUNK_BYTES["cpu"]) // (4 * max(vocabulary, 1)))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32 (or fp64): bf16 logits of 20 would be off by 0.06."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


def _mixture(teacher: MixtureTeacher, vocabulary: int) -> Tensor:
    """Logarithms of the average probabilities over the vocabulary that all have."""
    common = min(vocabulary, *(len(one.head) for one in teacher.parts))
    logprobs = [
        torch.log_softmax(_product(one.hidden, one.head[:common].T), -1) + math.log(weight)
        for one, weight in zip(teacher.parts, teacher.weights, strict=True)
    ]
    return torch.logsumexp(torch.stack(logprobs), 0)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, teacher, weights, row_weights, chunk):  # type: ignore[no-untyped-def]
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=exact)
        parts = torch.zeros(2, dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            rows = hidden[part]
            known = None if teacher is None else teacher.rows(part)
            if isinstance(known, HiddenTeacher):
                known = DenseTeacher(_product(known.hidden, known.head[: len(weight)].T))
            elif isinstance(known, MixtureTeacher):
                known = DenseTeacher(_mixture(known, len(weight)))
            losses, grad = row_losses(_product(rows, weight.T), labels[part], known, weights)
            scale = row_weights[part, None].to(exact)
            parts += (losses * scale).sum(0)
            grad = grad.mul_(scale).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            grad_weight += _product(grad.T, rows)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(parts)
        return weights.kd * parts[0] + weights.hard * parts[1], parts

    @staticmethod
    def backward(ctx, grad_loss, _parts):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_loss.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_weight * scale, None, None, None, None, None


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Teacher | None,
    weights: LossWeights,
    row_weights: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over rows of row_weight * (kd * divergence + hard * CE), and the sums [divergence, CE] without kd
    and hard, for reports.

    hidden (N, d) and weight (V, d) are differentiable; labels (N,) are token ids; `row_weights` (N,) carries
    the normalisation (1 / global number of valid tokens, times a sample's weight), so that sums over
    micro-batches and workers are the global mean whatever the split. `chunk` is the number of rows whose
    logits exist at a time; None picks it by bytes. Raises TrainingError when the teacher cannot estimate the
    divergence.
    """
    check(teacher, weights)
    if chunk is None:
        chunk = chunk_rows(len(weight), hidden.device.type)
    loss, parts = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, teacher, weights, row_weights, chunk
    )
    return loss, parts
