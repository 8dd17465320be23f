"""`stillhouse quantize` with nothing faked, on an engine that is known to serve wrongly without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.compression.corpus import calibration_rows, scored_rows
from distill_jobs.config import EngineConfig
from distill_jobs.quantizing.candidates import parse_candidate
from distill_jobs.quantizing.compare import Comparison, compare
from distill_jobs.quantizing.config import QuantizeConfig

pytestmark = pytest.mark.integration

MODEL = Path(__file__).resolve().parents[2] / "demo" / "models" / "student-base"


def test_an_int8_kv_cache_is_found_out_and_refused(tmp_path: Path) -> None:
    """vLLM on CPU accepts kv_cache_dtype int8_per_token_head and serves nonsense with it (measured:
    perplexity 154 instead of 31). The trained model's own perplexity through that engine is held against its
    file's, and the artifact is refused with the setting named; the artifact itself, as AutoGPTQ's format, is
    what it should be.
    """
    config = QuantizeConfig(samples=8, max_tokens=128)
    job = Comparison(
        model=MODEL,
        out=tmp_path / "out",
        candidates=(parse_candidate("rtn-w4a16-g128-as-gptq", config),),
        rows=scored_rows(MODEL, 16),
        calibration=calibration_rows(MODEL, 8),
        engine=EngineConfig(
            max_model_len=256, kv_cache_bytes=64 << 20, kv_cache_dtype="int8_per_token_head", max_num_seqs=16
        ),
        topk=4,
        batch=2,
        tokens=2,
    )
    said: list[str] = []
    _, (found,) = compare(job, said.append)
    assert found.refused is not None
    assert "int8_per_token_head" in found.refused
    assert any("refused" in line for line in said)
    offline = tmp_path / "out" / found.name / "offline"
    loss = _nats(offline / "artifact.json") - _nats(offline / "reference.json")
    assert 0 < abs(loss) < 0.05


def _nats(file: Path) -> float:
    values = [v for row in json.loads(file.read_text()).values() for v in row]
    return -sum(values) / len(values)
