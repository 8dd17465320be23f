"""The chunked linear-plus-divergence op: from hidden states to loss and gradients without full logits in
memory.

Logits of at most `chunk` rows exist at a time; the gradients are computed in the forward pass and kept,
accumulated in fp32. It knows nothing of models, shifting or masks: callers pass rows that count, already
shifted and selected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparseTeacher:
    """Natural-log, untempered teacher probabilities of k tokens a row; what they leave is one tail
    category."""

    ids: Tensor  # (N, k) integers
    logprobs: Tensor  # (N, k)

    def rows(self, part: slice) -> SparseTeacher:
        return SparseTeacher(self.ids[part], self.logprobs[part])


@dataclass(frozen=True, slots=True)
class DenseTeacher:
    """Full teacher logits; a vocabulary padded differently from the student's is cut to the common part."""

    logits: Tensor  # (N, V_teacher)

    def rows(self, part: slice) -> DenseTeacher:
        return DenseTeacher(self.logits[part])


Teacher = SparseTeacher | DenseTeacher


@dataclass(frozen=True, slots=True)
class LossWeights:
    """The loss of a row: kd * T^2 * KL(teacher || student) + hard * cross entropy."""

    kd: float = 1.0
    hard: float = 1.0
    temperature: float = 1.0


def _kl(target: Tensor, log_target: Tensor, log_student: Tensor) -> Tensor:
    """KL(target || student) a row; categories without mass contribute nothing, not 0 * -inf."""
    terms = target * (log_target - log_student)
    return torch.where(target > 0, terms, torch.zeros_like(terms)).sum(-1)


def _tempered_teacher(
    teacher: SparseTeacher, vocabulary: int, temperature: float, dtype: torch.dtype
) -> Tensor:
    """Log-probabilities of k + 1 categories, the last of them all other tokens, tempered after they are
    gathered."""
    known = teacher.logprobs.to(dtype)
    # Rounded probabilities may sum to a little over one: then there is no tail. With k = V there is none at
    # all.
    tail = (1 - known.exp().sum(-1, keepdim=True)).clamp_min(0) * (known.shape[-1] < vocabulary)
    return torch.log_softmax(torch.cat([known, torch.log(tail)], -1) / temperature, -1)


def _sparse(
    logits: Tensor, labels: Tensor, teacher: SparseTeacher, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Losses and gradient against k tokens and a tail. Overwrites `logits` with the gradient.

    Both sides are gathered into the same categories and then tempered, so that the pair stays comparable.
    Only a few passes touch the whole vocabulary: outside the k tokens the gradient is the softmax times one
    number a row.
    """
    t, ids, label = weights.temperature, teacher.ids.long(), labels[:, None]
    logits -= logits.amax(-1, keepdim=True)
    known, at_label = logits.gather(-1, ids), logits.gather(-1, label)
    known_mass, rest = known.exp(), logits.exp_().scatter_(-1, ids, 0.0)
    rest_mass = rest.sum(-1, keepdim=True).clamp_min(1e-30)  # zero when k = V: no tail, no gradient there
    mass = rest_mass + known_mass.sum(-1, keepdim=True)
    log_target = _tempered_teacher(teacher, logits.shape[-1], t, logits.dtype)
    log_student = torch.log_softmax(torch.cat([known, rest_mass.log()], -1) / t, -1)
    target = log_target.exp()
    slope = weights.kd * t * (log_student.exp() - target)
    grad = rest.mul_(weights.hard / mass + slope[:, -1:] / rest_mass)
    grad.scatter_(-1, ids, slope[:, :-1] + weights.hard * known_mass / mass)
    grad.scatter_add_(-1, label, torch.full_like(at_label, -weights.hard))
    return torch.stack(
        [t**2 * _kl(target, log_target, log_student), (mass.log() - at_label).squeeze(-1)], -1
    ), grad


def _dense(logits: Tensor, teacher: DenseTeacher, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 * KL over the common vocabulary, and its gradient in the logits (zero on the padding)."""
    common = min(logits.shape[-1], teacher.logits.shape[-1])
    log_target = torch.log_softmax(teacher.logits[:, :common].to(logits.dtype) / temperature, -1)
    log_student = torch.log_softmax(logits[:, :common] / temperature, -1)
    target = log_target.exp()
    grad = torch.zeros_like(logits)
    grad[:, :common] = temperature * (log_student.exp() - target)
    return temperature**2 * _kl(target, log_target, log_student), grad


def _hard(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and its gradient in the logits."""
    logprobs = torch.log_softmax(logits, -1)
    loss = -logprobs.gather(-1, labels[:, None]).squeeze(-1)
    grad = logprobs.exp_()
    return loss, grad.scatter_add_(-1, labels[:, None], grad.new_full((len(labels), 1), -1.0))


def row_losses(
    logits: Tensor, labels: Tensor, teacher: Teacher | None, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """(rows, 2) losses [divergence, cross entropy] and the gradient of their weighted sum in the logits.

    `logits` may be overwritten.
    """
    if isinstance(teacher, SparseTeacher) and weights.kd:
        return _sparse(logits, labels, teacher, weights)
    hard, grad = _hard(logits, labels)
    grad = grad.mul_(weights.hard)
    kd = torch.zeros_like(hard)
    if isinstance(teacher, DenseTeacher) and weights.kd:
        kd, kd_grad = _dense(logits, teacher, weights.temperature)
        grad = grad.add_(kd_grad, alpha=weights.kd)
    return torch.stack([kd, hard], -1), grad


def _logits(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T in fp32 (or fp64): bf16 logits of 20 would be off by 0.06."""
    if rows.dtype in (torch.float32, torch.float64):
        return rows @ weight.T
    return (
        torch.mm(rows, weight.T, out_dtype=torch.float32) if rows.is_cuda else rows.float() @ weight.float().T
    )


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
            losses, grad = row_losses(_logits(rows, weight), labels[part], known, weights)
            scale = row_weights[part, None].to(exact)
            parts += (losses * scale).sum(0)
            grad = grad.mul_(scale).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            grad_weight += (grad.T @ rows).to(exact)
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
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Sum over rows of row_weight * (kd * T^2 * KL + hard * CE), and the unweighted pair [KL, CE] for
    reports.

    `row_weights` carries the normalisation (1 / global number of valid tokens), so that sums over
    micro-batches and workers are the global mean whatever the split.
    """
    loss, parts = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, teacher, weights, row_weights, chunk
    )
    return loss, parts
