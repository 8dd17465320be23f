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


def _on_cuda(
    world: dict[str, Tensor], teacher: Any, weights: LossWeights, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    hidden, weight = (world[k].to("cuda", dtype, copy=True).requires_grad_() for k in ("hidden", "weight"))
    there = type(teacher)(*(getattr(teacher, f.name).to("cuda") for f in fields(teacher)))
    even = torch.full((ROWS,), 1 / ROWS, device="cuda")
    loss, _ = linear_divergence(hidden, weight, world["labels"].to("cuda"), there, weights, even, 128)
    loss.backward()  # type: ignore[no-untyped-call]
    return tuple(one.detach().cpu() for one in (loss, hidden.grad, weight.grad) if one is not None)


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
