"""Two real gloo workers: gradients summed by hand ("ddp") and FSDP2, against one worker in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill_jobs.training.config import OptimizerConfig
from distill_jobs.training.parallel import Workers
from tests.integration.training_pair import INDICES, RUNS, gradient, trainer
from tests.integration.training_rig import ROOT, base_model
from tests.unit.test_training_loop import write_rows

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pair") / "rows", extra=True)


@pytest.fixture(scope="module")
def pair(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the two workers computed, and the folder of what they wrote."""
    out = tmp_path_factory.mktemp("out")
    base = base_model(out / "base")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.training_pair", str(rank), data, out, base],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        said = process.communicate(timeout=240)[0]
        assert process.returncode == 0, said[-4000:]
    return torch.load(out / "results.pt", weights_only=True), out


def alone(data: Path, **changes: Any) -> tuple[dict[str, Tensor], list[list[float]]]:
    """The same run of one worker."""
    one = trainer(data, Workers(), **{**changes, "parallel": "ddp"})
    history = [[m["kd"], m["ce"], m["grad_norm"]] for m in one.run()]
    return one.weights(), history


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_workers_have_the_gradient_of_one(
    data: Path, pair: tuple[dict[str, Any], Path], parallel: str
) -> None:
    """Accumulated over unequal numbers of micro-batches and summed by gloo, the gradient of a step of 11
    weighted rows is that of one big padded batch within 1e-5 (fp32)."""
    expected = gradient(data, Workers(), packing=False)
    assert len(INDICES) % 2, "an odd number, so that the workers' shares are unequal"
    apart = (pair[0][f"gradient {parallel}"] - expected).norm() / expected.norm()
    assert float(apart) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_two_workers_end_in_the_weights_of_one(
    data: Path, pair: tuple[dict[str, Any], Path], name: str
) -> None:
    """Six steps of each kind of run: the losses, the gradient norms (over all shards) and the weights are
    those of one worker. Muon orthogonalises in bf16, so shards round differently."""
    weights, history = alone(data, **RUNS[name])
    found, loose = pair[0][name], name == "fsdp2-muon"
    torch.testing.assert_close(
        torch.tensor(found["history"]), torch.tensor(history), rtol=0.01 if loose else 1e-4, atol=1e-6
    )
    for key, tensor in weights.items():
        apart = (found["weights"][key] - tensor).norm() / tensor.norm()
        assert float(apart) < (0.02 if loose else 1e-4), key


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_bf16_gradients_are_those_of_fp32_within_rounding(
    data: Path, pair: tuple[dict[str, Any], Path], parallel: str
) -> None:
    """Computed in bf16, accumulated and summed in fp32: within 2 % of fp32, and not equal to it."""
    expected = gradient(data, Workers())
    apart = (pair[0][f"gradient {parallel} bf16"] - expected).norm() / expected.norm()
    assert 1e-4 < float(apart) < 0.02


def test_fsdp2_shards_and_saves_whole(data: Path, pair: tuple[dict[str, Any], Path]) -> None:
    """A worker holds half of the masters; the checkpoint of step 3 is whole: one unsharded worker continues
    from it to the same weights, and the export is a plain model."""
    results, out = pair
    one = trainer(data, Workers())
    assert results["held"] == pytest.approx(sum(p.numel() for p in one.model.parameters()) / 2, rel=0.1)
    one.load(out / "state")
    assert [m["step"] for m in one.run()] == [4, 5, 6]
    for key, tensor in one.weights().items():
        torch.testing.assert_close(tensor, results["fsdp2"]["weights"][key], rtol=1e-3, atol=1e-5)
    assert json.loads((out / "model" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    exported = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    for key, tensor in one.weights().items():
        torch.testing.assert_close(exported[key].float(), tensor, rtol=0.01, atol=1e-3)


def test_muon_is_not_adamw(data: Path) -> None:
    """The comparison above can tell optimizers apart."""
    adam, _ = alone(data)
    muon, _ = alone(data, optimizer=OptimizerConfig(kind="muon", lr=1e-2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((adam[name] - muon[name]).norm() / adam[name].norm()) > 0.01
