"""The fused kernel of the chunked op, on a machine without a GPU: in triton's interpreter, and through its
compiler. `fused_world` runs in processes of its own; tests/gpu has the device's tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from distill_jobs.training.divergence import HiddenTeacher, SampledTeacher, SparseTeacher
from distill_jobs.training.divergence.formulas import Kind
from distill_jobs.training.divergence.fused import fusible
from tests.unit.fused_world import cases

pytest.importorskip("triton")


def _world(part: str, **env: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.fused_world", part],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """All differences, found in one process."""
    return _world("interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", [name for name, _ in cases()])
def test_the_kernel_equals_the_torch_path(interpreted: dict[str, Any], case: str) -> None:
    """Divergence, cross entropy and weighted gradient of every divergence and teacher are the torch path's in
    float64, over several blocks, the last of them not full."""
    found = interpreted["rows"][case]
    assert set(found) == {"divergence", "cross entropy", "gradient"}
    for name, apart in found.items():
        assert apart <= 1e-5, name


def test_the_whole_op_through_the_kernel_equals_float64_autograd(interpreted: dict[str, Any]) -> None:
    """From hidden states of both sides to loss and both gradients, in chunks that share their buffers."""
    assert set(interpreted["op"]) == {"loss", "hidden", "weight"}
    assert max(interpreted["op"].values()) <= 1e-5


def test_a_gradient_of_the_products_precision_leaves_the_logits_alone(interpreted: dict[str, Any]) -> None:
    """bf16 products get a bf16 gradient without a copy of it: the fp32 one, rounded once."""
    assert interpreted["corners"]["bf16"] <= 2**-8
    assert interpreted["corners"]["logits kept"]


def test_labels_outside_the_vocabulary_are_loud(interpreted: dict[str, Any]) -> None:
    """-100 or V read no neighbour's memory: the cross entropy is NaN."""
    assert interpreted["corners"]["outside"] == [True, True]


def test_the_cuda_compiler_takes_the_kernel_as_it_is_called() -> None:
    """Every divergence becomes machine code for an H100, without a GPU; triton is imported only for that."""
    found = _world("compile")
    assert found["imported late"]
    assert set(found["bytes"]) == {"none", *get_args(Kind)}
    assert min(found["bytes"].values()) > 0


def test_only_fp32_logits_on_cuda_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs, float64, teachers of k tokens or draws, and machines without triton keep the torch path."""
    few = torch.zeros(1, 2)
    on_cuda: Any = SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.float32)
    assert fusible(on_cuda, None)
    assert fusible(on_cuda, HiddenTeacher(few, few))
    assert not fusible(few, None)
    assert not fusible(SimpleNamespace(device=on_cuda.device, dtype=torch.float64), None)  # type: ignore[arg-type]
    assert not fusible(on_cuda, SparseTeacher(few, few))
    assert not fusible(on_cuda, SampledTeacher(few, few))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert not fusible(on_cuda, None)
