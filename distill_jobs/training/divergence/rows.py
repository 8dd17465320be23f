"""Losses and gradients of a block of rows whose student logits exist: one function for each kind of teacher.

Everything works on the student's logits in place, because a block's temporaries are the op's peak memory.
Knows nothing of hidden states, chunks or normalisation over a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from contracts.errors import TrainingError
from distill_jobs.training.config import LossConfig
from distill_jobs.training.divergence.formulas import NEVER, Divergence, divergence
from distill_jobs.training.divergence.teachers import DenseTeacher, SampledTeacher, SparseTeacher

Known = SparseTeacher | SampledTeacher | DenseTeacher
"""A teacher as a block sees it: hidden states have become logits."""

_NO_TAIL = float(torch.finfo(torch.float32).eps)
"""The least tail: 1 - sum(p) cannot tell a smaller one from rounding, and the reverse KL to 0 is infinite."""


@dataclass(frozen=True, slots=True)
class LossWeights:
    """The loss of a row: kd * divergence(teacher, student) + hard * cross entropy with the label."""

    kd: float = 1.0
    hard: float = 1.0
    divergence: Divergence = field(default_factory=Divergence)


def loss_weights(config: LossConfig) -> LossWeights:
    """What a configuration asks for."""
    return LossWeights(
        kd=config.kd_weight,
        hard=config.hard_weight,
        divergence=Divergence(
            kind=config.divergence,
            beta=config.beta,
            alpha=config.alpha,
            temperature=config.temperature,
            t_squared=config.t_squared,
            over_beta=config.over_beta,
        ),
    )


def check(teacher: object, weights: LossWeights) -> None:
    """Raise TrainingError for a divergence that this teacher cannot estimate."""
    one = weights.divergence
    if not isinstance(teacher, SampledTeacher) or not weights.kd:
        return
    if one.kind != "forward_kl":
        raise TrainingError(
            f"loss.divergence '{one.kind}' is not linear in the teacher's probabilities, so draws of it "
            "are no estimate; use forward_kl, or collect top-k logits or hidden states."
        )
    if one.temperature != 1.0:
        raise TrainingError(
            f"loss.temperature {one.temperature} with a sampled teacher: its tokens were drawn at "
            "temperature 1; use 1, or collect top-k logits or hidden states."
        )


def row_losses(logits: Tensor, labels: Tensor, teacher: Known | None, weights: LossWeights) -> Tensor:
    """(rows, 2) losses [divergence, cross entropy]; `logits` becomes the gradient of their weighted sum."""
    if teacher is None or not weights.kd:
        return _hard(logits, labels, weights)
    if isinstance(teacher, SparseTeacher):
        return _sparse(logits, labels, teacher, weights)
    if isinstance(teacher, SampledTeacher):
        return _sampled(logits, labels, teacher, weights)
    return _dense(logits, labels, teacher, weights)


def _hard(logits: Tensor, labels: Tensor, weights: LossWeights) -> Tensor:
    logprobs = torch.log_softmax(logits, -1)
    loss = -logprobs.gather(-1, labels[:, None])
    torch.exp(logprobs, out=logits).mul_(weights.hard)
    _at_labels(logits, labels, weights)
    return torch.cat([torch.zeros_like(loss), loss], -1)


def _at_labels(grad: Tensor, labels: Tensor, weights: LossWeights) -> None:
    """The cross entropy's gradient beside the softmax."""
    grad.scatter_add_(-1, labels[:, None], grad.new_full((len(labels), 1), -weights.hard))


def _sampled(logits: Tensor, labels: Tensor, teacher: SampledTeacher, weights: LossWeights) -> Tensor:
    """The cross entropy sum(w * -log q) with the draws' weights: unbiased for KL(p || q) plus the teacher's
    entropy (which draws cannot estimate without bias), and its gradient for the KL's."""
    inside = teacher.ids < logits.shape[-1]
    w = torch.where(inside, teacher.logweights.to(logits.dtype), -torch.inf).exp()
    ids = teacher.ids.long() * inside
    logprobs = torch.log_softmax(logits, -1)
    kd = -(w * logprobs.gather(-1, ids).clamp_min(NEVER)).sum(-1, keepdim=True)
    hard = -logprobs.gather(-1, labels[:, None])
    torch.exp(logprobs, out=logits).mul_(weights.hard + weights.kd * w.sum(-1, keepdim=True))
    logits.scatter_add_(-1, ids, -weights.kd * w)
    _at_labels(logits, labels, weights)
    return torch.cat([kd, hard], -1)


def _categories(teacher: SparseTeacher, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities of k + 1 categories, the last of them all other tokens, and which of the k are used.

    Rounded probabilities may sum to a little over one; with k = V there is no tail at all.
    """
    known = teacher.logprobs.to(dtype)
    used = (teacher.ids < vocabulary) & ~torch.isneginf(known)
    tail = (1 - known.exp().sum(-1, keepdim=True)).clamp_min(_NO_TAIL).log()
    tail = torch.where(used.sum(-1, keepdim=True) < vocabulary, tail, -torch.inf)
    return torch.cat([known.masked_fill(~used, -torch.inf), tail], -1), used


def _sparse(logits: Tensor, labels: Tensor, teacher: SparseTeacher, weights: LossWeights) -> Tensor:
    """Against k tokens and a tail. Both sides are gathered into the same categories and then tempered, so
    that the pair stays comparable.

    Only a few passes touch the whole vocabulary: outside the k tokens the gradient is the softmax times one
    number a row.
    """
    one = weights.divergence
    categories, used = _categories(teacher, logits.shape[-1], logits.dtype)
    ids = teacher.ids.long() * used
    logits -= logits.amax(-1, keepdim=True)
    known, at_label = logits.gather(-1, ids), logits.gather(-1, labels[:, None])
    rest = logits.exp_()
    known_mass = rest.gather(-1, ids) * used
    rest.scatter_add_(-1, ids, -known_mass)
    rest_mass = rest.sum(-1, keepdim=True).clamp_min(1e-30)  # zero when k = V: no tail, no gradient there
    mass = rest_mass + known_mass.sum(-1, keepdim=True)
    log_p, log_q = _pair(categories, torch.cat([known, rest_mass.log()], -1), one.temperature)
    kd, slope = divergence(log_p, log_q, one)
    slope = (slope - log_q.exp() * slope.sum(-1, keepdim=True)) * (weights.kd * one.scale / one.temperature)
    rest.mul_(weights.hard / mass + slope[:, -1:] / rest_mass)
    rest.scatter_add_(-1, ids, slope[:, :-1] * used + weights.hard * known_mass / mass)
    _at_labels(rest, labels, weights)
    return torch.stack([kd * one.scale, (mass.log() - at_label).squeeze(-1)], -1)


def _dense(logits: Tensor, labels: Tensor, teacher: DenseTeacher, weights: LossWeights) -> Tensor:
    """Over the common vocabulary; the student's padding gets no gradient from the divergence."""
    one = weights.divergence
    common = min(logits.shape[-1], teacher.logits.shape[-1])
    log_p, log_q = _pair(teacher.logits[:, :common].to(logits.dtype), logits[:, :common], one.temperature)
    kd, slope = divergence(log_p, log_q, one)
    size = weights.kd * one.scale / one.temperature
    lost = size * slope.sum(-1, keepdim=True)
    losses = _hard(logits, labels, weights)
    logits[:, :common].add_(slope, alpha=size).sub_(log_q.exp_().mul_(lost))
    losses[:, 0] = kd * one.scale
    return losses


def _pair(teacher: Tensor, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tempered log-probabilities of both; a token that one side cannot take is taken from the other."""
    never = torch.isneginf(torch.minimum(teacher, student))
    if bool(never.any()):
        teacher, student = (one.masked_fill(never, -torch.inf) for one in (teacher, student))
        pair = (torch.log_softmax(one / temperature, -1) for one in (teacher, student))
        log_p, log_q = (one.clamp_min_(NEVER) for one in pair)
        return log_p, log_q
    if temperature != 1.0:
        teacher, student = teacher / temperature, student / temperature
    return torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
