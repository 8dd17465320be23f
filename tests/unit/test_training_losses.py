"""The chunked linear-plus-divergence op against plain float64 autograd, and its normalisation against
splitting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill_jobs.training.divergence import (
    DenseTeacher,
    Divergence,
    LossWeights,
    SparseTeacher,
    Teacher,
    linear_divergence,
)

N, H, V, K = 37, 16, 50, 6


@pytest.fixture
def world() -> dict[str, Tensor]:
    """Hidden states, a head, labels, and a teacher's logits, in float64."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": draw(N, H),
        "weight": draw(V, H) * 0.5,
        "teacher": draw(N, V) * 2,
        "labels": torch.randint(0, V, (N,), generator=generator),
    }


def _sparse(logits: Tensor, k: int) -> SparseTeacher:
    logprobs, ids = torch.log_softmax(logits, -1).topk(k)
    return SparseTeacher(ids, logprobs)


def _eager(
    world: dict[str, Tensor], teacher: Teacher | None, weights: LossWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """The same loss written the plain way, all logits at once, gradients by autograd."""
    hidden, weight = world["hidden"].clone().requires_grad_(), world["weight"].clone().requires_grad_()
    logits = hidden @ weight.T
    t = weights.divergence.temperature
    kd = logits.new_zeros(())
    if isinstance(teacher, DenseTeacher):
        common = min(V, teacher.logits.shape[1])
        p = torch.log_softmax(teacher.logits[:, :common] / t, -1)
        kd = t**2 * (p.exp() * (p - torch.log_softmax(logits[:, :common] / t, -1))).sum(-1).mean()
    elif teacher is not None:
        q = torch.log_softmax(logits, -1)
        tail = (1 - teacher.logprobs.exp().sum(-1, keepdim=True)).log()
        p = torch.log_softmax(torch.cat([teacher.logprobs, tail], -1) / t, -1)
        q_known = q.gather(-1, teacher.ids)
        q_tail = (1 - q_known.exp().sum(-1, keepdim=True)).log()
        kd = (
            t**2
            * (p.exp() * (p - torch.log_softmax(torch.cat([q_known, q_tail], -1) / t, -1))).sum(-1).mean()
        )
    loss = weights.kd * kd + weights.hard * torch.nn.functional.cross_entropy(logits, world["labels"])
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def _ours(
    world: dict[str, Tensor], teacher: Teacher | None, weights: LossWeights, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = world["hidden"].clone().requires_grad_(), world["weight"].clone().requires_grad_()
    scale = torch.full((N,), 1 / N, dtype=torch.float64)
    loss, _ = linear_divergence(hidden, weight, world["labels"], teacher, weights, scale, chunk)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("kind", ["none", "sparse", "dense", "dense_padded", "dense_short"])
def test_loss_and_gradients_equal_eager_autograd(
    world: dict[str, Tensor], kind: str, chunk: int, temperature: float
) -> None:
    """T^2 * KL + CE and both gradients are those of the textbook formula, whatever the chunk and the
    teacher's form."""
    teacher: Teacher | None = None
    if kind == "sparse":
        teacher = _sparse(world["teacher"], K)
    elif kind.startswith("dense"):
        logits = world["teacher"]
        if kind == "dense_padded":  # the teacher's vocabulary is padded further than the student's
            logits = torch.cat([logits, torch.randn(N, 9, dtype=torch.float64)], -1)
        teacher = DenseTeacher(logits[:, : V - 4] if kind == "dense_short" else logits)
    weights = LossWeights(kd=0.7, hard=0.4, divergence=Divergence(temperature=temperature))
    for ours, eager in zip(
        _ours(world, teacher, weights, chunk), _eager(world, teacher, weights), strict=True
    ):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-12)


def test_all_tokens_kept_equals_the_dense_divergence(world: dict[str, Tensor]) -> None:
    """With k = V there is no tail, and the sparse divergence is the exact one, gradients included."""
    weights = LossWeights(kd=1.0, hard=0.0, divergence=Divergence(temperature=2.0))
    sparse = _ours(world, _sparse(world["teacher"], V), weights, 8)
    dense = _ours(world, DenseTeacher(world["teacher"]), weights, 8)
    for left, right in zip(sparse, dense, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-9)


def test_a_student_equal_to_its_teacher_has_no_divergence(world: dict[str, Tensor]) -> None:
    """KL(p || p) is zero and pushes nowhere, tail included."""
    logits = world["hidden"] @ world["weight"].T
    loss, grad_hidden, _ = _ours(
        world, _sparse(logits, K), LossWeights(kd=1.0, hard=0.0, divergence=Divergence(temperature=2.0)), 8
    )
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert float(grad_hidden.abs().max()) < 1e-9


def test_rounded_teacher_probabilities_stay_finite(world: dict[str, Tensor]) -> None:
    """float16 rounding may make the kept mass exceed one; the loss must not become NaN."""
    sure = torch.full((N, V), -30.0, dtype=torch.float64)
    sure[:, 3] = 30.0
    teacher = _sparse(sure, K)
    teacher = SparseTeacher(teacher.ids, (teacher.logprobs.half() + 0.001).to(torch.float64))
    loss, grad_hidden, grad_weight = _ours(world, teacher, LossWeights(), 8)
    assert all(torch.isfinite(one).all() for one in (loss, grad_hidden, grad_weight))


def test_the_sum_over_parts_is_the_global_mean(world: dict[str, Tensor]) -> None:
    """Unequal micro-batches, each divided by the global count, add up to the loss and gradient of the
    whole."""
    weights, teacher = (
        LossWeights(kd=1.0, hard=1.0, divergence=Divergence(temperature=2.0)),
        _sparse(world["teacher"], K),
    )
    whole, _, whole_grad = _ours(world, teacher, weights, 1000)
    weight, total = world["weight"].clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    for part in order.split([3, 20, 1, 13]):
        scale = torch.full((len(part),), 1 / N, dtype=torch.float64)
        loss, _ = linear_divergence(
            world["hidden"][part],
            weight,
            world["labels"][part],
            SparseTeacher(teacher.ids[part], teacher.logprobs[part]),
            weights,
            scale,
            4,
        )
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=0)
    torch.testing.assert_close(weight.grad, whole_grad, rtol=1e-8, atol=1e-12)
