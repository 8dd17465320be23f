"""The chunked op on a CUDA device. Skipped on a laptop; fails where STILLHOUSE_GPU=1 promised a device."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from distill_jobs.training.divergence import (
    DenseTeacher,
    Divergence,
    HiddenTeacher,
    LossWeights,
    SampledTeacher,
    linear_divergence,
)
from distill_jobs.training.divergence.formulas import Kind
from distill_jobs.training.divergence.fused import fused_losses, fusible
from distill_jobs.training.divergence.rows import row_losses
from tests.unit.losses_oracle import apart, draw_world, eager, top

pytestmark = pytest.mark.gpu

ROWS, WIDTH, VOCABULARY, K = 300, 64, 1000, 16


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    if torch.cuda.is_available():
        return
    if os.environ.get("STILLHOUSE_GPU") == "1":
        pytest.fail("STILLHOUSE_GPU=1 promises a CUDA device and there is none")
    pytest.skip("no CUDA device, and none was promised (STILLHOUSE_GPU=1)")


def _teacher(world: dict[str, Tensor], name: str) -> Any:
    if name == "sparse":
        return top(world["teacher"], K)
    if name == "sampled":
        ids = torch.multinomial(torch.softmax(world["teacher"].float(), -1), 4)
        return SampledTeacher(ids, torch.full((ROWS, 4), 0.25).log())
    if name == "dense":
        return DenseTeacher(world["teacher"])
    return HiddenTeacher(world["teacher_hidden"], world["teacher_head"])


def _there(teacher: Any) -> Any:
    """A teacher on the device."""
    return teacher and type(teacher)(*(getattr(teacher, f.name).to("cuda") for f in fields(teacher)))


def _on_cuda(
    world: dict[str, Tensor], teacher: Any, weights: LossWeights, dtype: torch.dtype, fused: bool = True
) -> tuple[Tensor, ...]:
    hidden, weight = (world[k].to("cuda", dtype, copy=True).requires_grad_() for k in ("hidden", "weight"))
    labels, even = world["labels"].to("cuda"), torch.full((ROWS,), 1 / ROWS, device="cuda")
    loss, _ = linear_divergence(hidden, weight, labels, _there(teacher), weights, even, 128, fused)
    loss.backward()  # type: ignore[no-untyped-call]
    return tuple(one.detach().cpu() for one in (loss, hidden.grad, weight.grad) if one is not None)


def _wide(seed: int) -> Tensor:
    """Logits of a few rows over many full blocks of the kernel and one that is not."""
    return torch.randn(5, 50_257, generator=torch.Generator().manual_seed(seed)) * 3


def _awkward(logits: Tensor, every: int) -> Tensor:
    return logits.masked_fill(torch.arange(logits.shape[1]) % every == 3, -torch.inf)


@pytest.mark.parametrize("name", ["sparse", "dense", "hidden"])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_cuda_loss_and_gradients_equal_float64_autograd(kind: Kind, name: str) -> None:
    """Every divergence from every kind of teacher, fp32 on the device."""
    world = draw_world(ROWS, WIDTH, VOCABULARY)
    world["weight"] = world["weight"] / 4
    teacher, weights = _teacher(world, name), LossWeights(1.0, 0.5, Divergence(kind, temperature=2.0))
    found = _on_cuda(world, teacher, weights, torch.float32)
    for got, want in zip(found, eager(world, teacher, weights), strict=True):
        assert apart(got, want) <= 1e-5


@pytest.mark.parametrize("name", ["sparse", "sampled", "hidden"])
def test_cuda_bf16_loses_only_its_own_precision(name: str) -> None:
    """bf16 products with fp32 sums: the loss is that of the rounded inputs, the gradients are rounded."""
    names = ("hidden", "weight", "teacher_hidden", "teacher_head")
    drawn = draw_world(ROWS, WIDTH, VOCABULARY)
    drawn["weight"] = drawn["weight"] / 4
    world = {k: v.bfloat16() if k in names else v for k, v in drawn.items()}
    teacher, weights = _teacher(world, name), LossWeights(1.0, 0.5)
    loss, grad_hidden, grad_weight = _on_cuda(world, teacher, weights, torch.bfloat16)
    wanted = eager(world, teacher, weights)
    assert apart(loss, wanted[0]) <= 1e-5
    assert apart(grad_hidden, wanted[1]) <= 0.01
    assert apart(grad_weight, wanted[2]) <= 0.01


@pytest.mark.parametrize("name", ["dense", "hidden", "none"])
def test_the_fused_path_equals_the_torch_path(name: str) -> None:
    """The same loss and gradients with and without the kernel, in fp32, and it is the kernel that ran."""
    world = draw_world(ROWS, WIDTH, VOCABULARY)
    world["weight"] = world["weight"] / 4
    teacher = None if name == "none" else _teacher(world, name)
    assert fusible(torch.empty(0, device="cuda"), teacher)
    weights = LossWeights(0.7, 0.4, Divergence("jsd", 0.3, temperature=2.0))
    found, wanted = (_on_cuda(world, teacher, weights, torch.float32, fused) for fused in (True, False))
    for got, want in zip(found, wanted, strict=True):
        assert apart(got, want) <= 1e-5


@pytest.mark.parametrize("vocabulary", [50_257, 50_256, 1000])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_kernel_equals_the_torch_path_on_long_rows(kind: Kind, vocabulary: int) -> None:
    """Full and ragged blocks, rows aligned and not, vocabularies of different length, tokens that one side
    cannot take: losses and gradient are the torch path's in float64."""
    student, theirs = _awkward(_wide(1), 11)[:, :vocabulary], _awkward(_wide(2), 7)
    labels, scale = torch.tensor([0, 1, 5, 998, 999]), torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])
    weights = LossWeights(0.7, 0.4, Divergence(kind, 0.3, 0.2, 2.0))
    grad, wanted = student.to("cuda").contiguous(), student.double()
    losses = fused_losses(
        grad, labels.to("cuda"), DenseTeacher(theirs.to("cuda")), weights, scale.to("cuda"), grad
    )
    exact = row_losses(wanted, labels, DenseTeacher(theirs), weights)
    assert apart(losses[:, 0].cpu(), exact[:, 0]) <= 1e-5
    assert apart(losses[:, 1].cpu(), exact[:, 1]) <= 1e-5
    assert apart(grad.cpu(), wanted * scale[:, None]) <= 1e-5


def test_the_fused_path_needs_no_memory_beside_the_chunks() -> None:
    """Between the products nothing of a chunk's size is made: the peak is both sides' buffers and the
    gradient, over several chunks."""
    world, rows = draw_world(ROWS, WIDTH, VOCABULARY), 100
    one = {k: v.to("cuda") for k, v in world.items()}
    hidden, weight = one["hidden"], one["weight"].requires_grad_()
    weights = LossWeights(1.0, 0.5, Divergence("jsd", temperature=2.0))
    teacher, even = HiddenTeacher(one["teacher_hidden"], one["teacher_head"]), torch.ones(ROWS, device="cuda")
    peaks = []
    for _ in range(2):  # the first brings cuBLAS's workspace and the kernel
        weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        loss, _ = linear_divergence(hidden, weight, one["labels"], teacher, weights, even, rows)
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - held)
    assert peaks[-1] <= 2.5 * 4 * rows * VOCABULARY + 4 * VOCABULARY * WIDTH
