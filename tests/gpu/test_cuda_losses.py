"""The chunked op on a CUDA device. Skipped on a laptop; fails where STILLHOUSE_GPU=1 promised a device."""

from __future__ import annotations

import os

import pytest
import torch

from distill_jobs.training.divergence import (
    DenseTeacher,
    Divergence,
    LossWeights,
    SparseTeacher,
    linear_divergence,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    if torch.cuda.is_available():
        return
    if os.environ.get("STILLHOUSE_GPU") == "1":
        pytest.fail("STILLHOUSE_GPU=1 promises a CUDA device and there is none")
    pytest.skip("no CUDA device, and none was promised (STILLHOUSE_GPU=1)")


@pytest.mark.parametrize("sparse", [True, False], ids=["top-k teacher", "dense teacher"])
def test_cuda_loss_and_gradients_equal_the_cpu_ones(sparse: bool) -> None:
    """The same rows give the same loss and gradients on both devices."""
    generator = torch.Generator().manual_seed(0)
    rows, width, vocab, k = 300, 64, 1000, 16
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) / 8
    labels = torch.randint(vocab, (rows,), generator=generator)
    logits = torch.randn(rows, vocab, generator=generator)
    top = torch.log_softmax(logits, -1).topk(k)
    teacher = SparseTeacher(top.indices, top.values) if sparse else DenseTeacher(logits)
    results = []
    weights = LossWeights(1.0, 0.5, Divergence(temperature=2.0))
    for device in ("cpu", "cuda"):
        h, w = (x.to(device, torch.float32).requires_grad_() for x in (hidden, weight))
        there = type(teacher)(*(getattr(teacher, f).to(device) for f in teacher.__dataclass_fields__))
        uniform = torch.full((rows,), 1 / rows, device=device)
        loss, _ = linear_divergence(h, w, labels.to(device), there, weights, uniform, chunk=128)
        loss.backward()
        results.append([x.detach().cpu() for x in (loss, h.grad, w.grad)])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=2e-4, atol=1e-6)
