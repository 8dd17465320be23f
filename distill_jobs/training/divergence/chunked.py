"""The chunked linear-plus-divergence op: from hidden states to loss and gradients without full logits in
memory.

Logits of one chunk of rows exist at a time, in a buffer that becomes their gradient; the gradients are
computed in the forward pass and kept, accumulated in fp32. It knows nothing of models, shifting or masks:
callers pass rows that count, already shifted and selected.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distill_jobs.training.divergence.fused import fused_losses, fusible
from distill_jobs.training.divergence.products import Products
from distill_jobs.training.divergence.rows import LossWeights, check, row_losses
from distill_jobs.training.divergence.teachers import DenseTeacher, HiddenTeacher, MixtureTeacher, Teacher

_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""fp32 logits of a chunk, when the caller leaves the choice to the op: the products want many rows, and on
CUDA every chunk reads and writes the output matrix's gradient once."""

_BLOCK_BYTES = {"cpu": 2**20, "cuda": 64 * 2**20}
"""fp32 logits of a block: a CPU's passes over them stay in its L2 cache, a GPU wants fewer launches and
no temporaries of a chunk's size. The fused path has no temporaries and takes a chunk at once."""

_LEAST_ROWS = 64
"""Fewer rows than this, and a pass over the output matrix costs more than its product with them."""


def _heads(teacher: Teacher | None) -> list[Tensor]:
    """The output matrices that rebuild a teacher's logits."""
    if isinstance(teacher, MixtureTeacher):
        return [one.head for one in teacher.parts]
    return [teacher.head] if isinstance(teacher, HiddenTeacher) else []


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows a chunk, so that its logits have a fixed size in bytes."""
    return max(_LEAST_ROWS, _CHUNK_BYTES.get(device, _CHUNK_BYTES["cuda"]) // (4 * max(vocabulary, 1)))


class _Chunks:
    """One pass over the rows, with the buffers that all chunks share."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, teacher: Teacher | None, chunk: int, fused: bool = True
    ) -> None:
        rows = min(chunk, len(hidden))
        self.head = Products(weight, rows)
        self.teacher = teacher
        self.heads = [Products(head[: len(weight)], rows) for head in _heads(teacher)]
        block = _BLOCK_BYTES.get(hidden.device.type, _BLOCK_BYTES["cuda"])
        self.block = max(1, block // (4 * max(len(weight), 1)))
        self.parts = [slice(s, min(s + chunk, len(hidden))) for s in range(0, len(hidden), chunk)]
        self.fused = fused and fusible(self.head.buffer, teacher)
        self.grad = self.head.gradient() if self.fused else self.head.buffer

    def run(
        self,
        hidden: Tensor,
        labels: Tensor,
        weights: LossWeights,
        row_weights: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
    ) -> Tensor:
        """Sums over the rows of [divergence, cross entropy]; fills the gradients that are wanted."""
        sums = torch.zeros(2, dtype=self.head.exact, device=hidden.device)
        for part in self.parts:
            logits, scale = self.head.logits(hidden[part]), row_weights[part].to(self.head.exact)
            losses = self.losses(logits, labels[part], self.known(part), weights, scale)
            sums += (losses * scale[:, None]).sum(0)
            if grad_hidden is not None or grad_weight is not None:
                self.head.backward(self.grad[: len(logits)], hidden[part], grad_hidden, part, grad_weight)
        return sums

    def known(self, part: slice) -> Any:
        """What is known of the teacher in a chunk, its logits rebuilt."""
        if self.teacher is None:
            return None
        known = self.teacher.rows(part)
        if isinstance(known, HiddenTeacher):
            return DenseTeacher(self.heads[0].logits(known.hidden))
        return DenseTeacher(self._mixture(known)) if isinstance(known, MixtureTeacher) else known

    def _mixture(self, known: MixtureTeacher) -> Tensor:
        """Logarithms of the average probabilities over the vocabulary that all have."""
        common = min(head.buffer.shape[1] for head in self.heads)
        total: Tensor | None = None
        for one, weight, head in zip(known.parts, known.weights, self.heads, strict=True):
            logprobs = torch.log_softmax(head.logits(one.hidden)[:, :common], -1).add_(math.log(weight))
            total = logprobs if total is None else torch.logaddexp(total, logprobs, out=total)
        assert total is not None
        return total

    def losses(
        self, logits: Tensor, labels: Tensor, known: Any, weights: LossWeights, scale: Tensor
    ) -> Tensor:
        """(rows, 2) losses of a chunk; `grad` holds their gradient, each row times its scale, in place of the
        logits where the precision is the same."""
        if self.fused:
            return fused_losses(logits, labels, known, weights, scale, self.grad[: len(logits)])
        found = []
        for start in range(0, len(logits), self.block):
            part = slice(start, start + self.block)
            teacher = None if known is None else known.rows(part)
            found.append(row_losses(logits[part], labels[part], teacher, weights))
            logits[part].mul_(scale[part, None])
        return torch.cat(found)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, teacher, weights, row_weights, chunk, fused, learns):  # type: ignore[no-untyped-def]
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        to_hidden, to_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if to_weight else None
        parts = _Chunks(hidden, weight, teacher, chunk, fused).run(
            hidden, labels, weights, row_weights, grad_hidden, grad_weight
        )  # the buffers are gone before the gradient is copied
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(parts)
        return weights.kd * parts[0] + weights.hard * parts[1], parts

    @staticmethod
    def backward(ctx, grad_loss, _parts):  # type: ignore[no-untyped-def]
        kept = (one if one is None else one * grad_loss.to(one.dtype) for one in ctx.saved_tensors)
        return *kept, None, None, None, None, None, None, None


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Teacher | None,
    weights: LossWeights,
    row_weights: Tensor,
    chunk: int | None = None,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sum over rows of row_weight * (kd * divergence + hard * CE), and the sums [divergence, CE] without kd
    and hard, for reports.

    hidden (N, d) and weight (V, d) are differentiable; labels (N,) are token ids; `row_weights` (N,) carries
    the normalisation (1 / global number of valid tokens, times a sample's weight), so that sums over
    micro-batches and workers are the global mean whatever the split. `chunk` is the number of rows whose
    logits exist at a time; None picks it by bytes. `fused=False` keeps to the torch path on CUDA too, for
    comparisons. Raises TrainingError when the teacher cannot estimate the divergence.
    """
    check(teacher, weights)
    if chunk is None:
        chunk = chunk_rows(len(weight), hidden.device.type)
    loss, parts = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, teacher, weights, row_weights, chunk, fused, torch.is_grad_enabled()
    )
    return loss, parts
