"""A student cut out of its teacher and packed on its training grid, in vLLM: it serves what was trained."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from distill_jobs.config import EngineConfig
from distill_jobs.engine import run_engine, write_lines
from distill_jobs.shrink.blocks import linears
from distill_jobs.shrink.config import ShrinkConfig
from distill_jobs.shrink.student import build_folder
from distill_jobs.training.fake_quant import fake_quantize
from distill_jobs.training.method_config import FakeQuantConfig
from distill_jobs.training.packed import pack_checkpoint
from tests.integration.pipeline_world import write_model
from tests.unit.teacher_world import rows_folder

pytestmark = pytest.mark.integration
GRID = FakeQuantConfig(bits=3, group_size=32, symmetric=False)
BF16 = 0.08
"""Of a log-probability, between two orders of additions in bfloat16 through one block."""


def logprobs(model: torch.nn.Module, ids: list[int], first: int) -> np.ndarray:
    """(answer,) log-probabilities of the tokens from `first` on."""
    given = torch.tensor(ids)
    with torch.no_grad():
        found = model(input_ids=given[None]).logits[0].float().log_softmax(-1)
    return found[first - 1 : -1].gather(1, given[first:, None])[:, 0].numpy()


def test_vllm_serves_the_cut_student_with_the_weights_it_trained_with(tmp_path: Path) -> None:
    """Half the width, half the heads, one block, one key head, INT3 with zero points in INT4's file: vLLM's
    log-probabilities are those of the fake-quantized student, and not those of its whole weights."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # vLLM would compile itself at every start
    write_model(tmp_path / "teacher", hidden=256, layers=2, seed=0)
    rows_folder(tmp_path / "rows")
    shape = ShrinkConfig(layers=1, hidden=128, intermediate=256, heads=2, kv_heads=1, rows=8)
    build_folder(str(tmp_path / "teacher"), shape, tmp_path / "rows", 64, tmp_path / "student")
    whole, rounded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16).eval() for _ in "ab"
    )
    with torch.no_grad():
        for model in (whole, rounded):
            for layer in linears(model).values():
                layer.weight.mul_(4)  # a random student is so nearly uniform that any weights would do
    whole.save_pretrained(tmp_path / "student")
    fake_quantize(rounded, GRID)
    pack_checkpoint(tmp_path / "student", tmp_path / "artifact", GRID)
    rng = np.random.default_rng(0)
    rows = [{"id": str(n), "ids": rng.integers(3, 250, 24).tolist()} for n in range(6)]
    rows = [{**one, "completion": rng.integers(3, 250, 24).tolist()} for one in rows]
    write_lines(tmp_path / "score.jsonl", rows)
    job = {"model": str(tmp_path / "artifact"), "out": str(tmp_path / "out")}
    score = {"rows": str(tmp_path / "score.jsonl"), "limit": 6, "topk": 4}
    run_engine(job | {"score": score}, EngineConfig(max_model_len=128, kv_cache_bytes=2**26, max_num_seqs=8))
    served = {one["id"]: one["actual"] for one in pq.read_table(tmp_path / "out/scores.parquet").to_pylist()}
    off, apart = [], []
    for one in rows:
        ids, first = one["ids"] + one["completion"], len(one["ids"])
        off.append(np.abs(np.array(served[one["id"]]) - logprobs(rounded, ids, first)))
        apart.append(np.abs(logprobs(whole, ids, first) - logprobs(rounded, ids, first)))
    assert np.max(off) < BF16
    assert np.mean(apart) > 4 * np.mean(off)
    about = json.loads((tmp_path / "artifact" / "config.json").read_text())
    assert about["num_key_value_heads"] == 1
