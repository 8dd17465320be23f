"""The divergences written the plain way, in float64, all logits at once, gradients by autograd.

Nothing here is shared with the code under test.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distill_jobs.training.divergence import (
    DenseTeacher,
    Divergence,
    HiddenTeacher,
    LossWeights,
    MixtureTeacher,
    SampledTeacher,
    SparseTeacher,
    Teacher,
    linear_divergence,
)

Found = tuple[Tensor, Tensor, Tensor]
"""Loss, gradient in the hidden states, gradient in the output matrix."""


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of probabilities; 0 log 0 is 0, with gradient 0."""
    some = p > 0
    ratio = torch.where(some, p, 1.0).log() - torch.where(some, q, 1.0).log()
    return (p * ratio).sum(-1)


def value(p: Tensor, q: Tensor, one: Divergence) -> Tensor:
    """Each divergence as its paper has it, in probabilities."""
    b, a = one.beta, one.alpha
    if one.kind == "jsd" and 0 < b < 1:
        m = b * p + (1 - b) * q
        return (b * kl(p, m) + (1 - b) * kl(q, m)) / (b * (1 - b) if one.over_beta else 1)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: kl(q, p) if b else kl(p, q),
        "skew_kl": lambda: kl(p, a * p + (1 - a) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - a) * p + a * q),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[one.kind]()


def tempered(p: Tensor, temperature: float) -> Tensor:
    """p^(1/T), normalised over the last dimension."""
    raised = p ** (1 / temperature)
    return raised / raised.sum(-1, keepdim=True)


def _states(one: HiddenTeacher) -> tuple[Tensor, Tensor]:
    return one.hidden, one.head


def pair(logits: Tensor, teacher: Teacher, temperature: float) -> tuple[Tensor, Tensor]:
    """Tempered probabilities of teacher and student over the categories that they are compared on."""
    if isinstance(teacher, SparseTeacher):
        q = torch.softmax(logits, -1)
        known, taken = teacher.logprobs.double().exp(), q.gather(-1, teacher.ids)
        p = torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)
        return tempered(p, temperature), tempered(
            torch.cat([taken, 1 - taken.sum(-1, keepdim=True)], -1), temperature
        )
    if isinstance(teacher, MixtureTeacher):
        common = min(logits.shape[-1], *(len(one.head) for one in teacher.parts))
        each = [torch.softmax(h.double() @ w.double()[:common].T, -1) for h, w in map(_states, teacher.parts)]
        theirs = sum(w * p for w, p in zip(teacher.weights, each, strict=True)).log()  # type: ignore[union-attr]
    elif isinstance(teacher, HiddenTeacher):
        theirs = teacher.hidden.double() @ teacher.head.double().T
    else:
        assert isinstance(teacher, DenseTeacher)
        theirs = teacher.logits.double()
    common = min(logits.shape[-1], theirs.shape[-1])
    theirs, ours = theirs[:, :common], logits[:, :common]
    out = torch.isneginf(theirs) | torch.isneginf(ours)
    p, q = (torch.softmax(one.masked_fill(out, -torch.inf) / temperature, -1) for one in (theirs, ours))
    return p, q


def eager(world: dict[str, Tensor], teacher: Teacher | None, weights: LossWeights) -> Found:
    """Mean loss over the rows and its gradients."""
    hidden, weight = (world[k].double().clone().requires_grad_() for k in ("hidden", "weight"))
    logits, one = hidden @ weight.T, weights.divergence
    kd = logits.new_zeros(())
    if isinstance(teacher, SampledTeacher):
        w = teacher.logweights.double().exp()
        kd = -(w * torch.log_softmax(logits, -1).gather(-1, teacher.ids)).sum(-1).mean()
    elif teacher is not None:
        kd = value(*pair(logits, teacher, one.temperature), one).mean()
    kd = kd * (one.temperature**2 if one.t_squared else 1)
    loss = weights.kd * kd + weights.hard * cross_entropy(logits, world["labels"])
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad  # type: ignore[return-value]


def ours(
    world: dict[str, Tensor],
    teacher: Teacher | None,
    weights: LossWeights,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Found:
    """The same from the chunked op, in `dtype`."""
    hidden, weight = (world[k].to(dtype, copy=True).requires_grad_() for k in ("hidden", "weight"))
    n = len(hidden)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.full((n,), 1 / max(n, 1), dtype=exact)
    loss, _ = linear_divergence(hidden, weight, world["labels"], teacher, weights, scale, chunk)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad  # type: ignore[return-value]


def apart(left: Any, right: Any) -> float:
    """The largest difference of two tensors, relative to the largest value of the second."""
    return float((left.double() - right.double()).abs().max() / right.double().abs().max())


def draw_world(n: int, d: int, v: int, seed: int = 7) -> dict[str, Tensor]:
    """Hidden states, an output matrix and labels of a student; a teacher's logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden": draw(n, d),
        "weight": draw(v, d) * 0.5,
        "teacher": draw(n, v) * 2,
        "teacher_hidden": draw(n, 2 * d),
        "teacher_head": draw(v, 2 * d) * 0.3,
        "labels": torch.randint(0, v, (n,), generator=generator),
    }


def top(logits: Tensor, k: int) -> SparseTeacher:
    """The k likeliest tokens."""
    kept = torch.log_softmax(logits.double(), -1).topk(k)
    return SparseTeacher(kept.indices, kept.values.to(logits.dtype))
