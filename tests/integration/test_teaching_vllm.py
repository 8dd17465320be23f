"""A teacher behind a real vLLM server against the same teacher in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from contracts.errors import EngineError
from distill_jobs.engine import read_lines
from distill_jobs.teaching.ask import ApiVoice, Question, Sampling
from distill_jobs.teaching.config import EndpointConfig, TeachConfig
from serve.engine.config import EngineOptions
from serve.engine.process import VllmProcess
from tests.integration.pipeline_world import write_model
from tests.unit.teaching_world import rows_of, run, sample

pytestmark = pytest.mark.integration
SAMPLES = [sample(f"where is parcel {n}", "on its way to you " * (n % 5 + 1)) for n in range(12)]
BF16 = 0.05
"""Of a log-probability, between two orders of additions in bfloat16 through two layers."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher of two layers."""
    folder = tmp_path_factory.mktemp("teacher")
    write_model(folder, hidden=128, layers=2, seed=0)
    return folder


@pytest.fixture(scope="module")
def server(teacher: Path) -> Iterator[VllmProcess]:
    """vLLM as a user would start it for a teacher, with vLLM's own limit of 20 log-probabilities."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # vLLM would compile itself at every start
    options = EngineOptions(
        dtype="bfloat16", max_model_len=256, kv_cache_bytes=2**26, enforce_eager=True, max_num_seqs=4
    )
    engine = VllmProcess(str(teacher), "teacher", options, "127.0.0.1", teacher / "engine.log")
    try:
        engine.start()
        engine.wait_ready()
        yield engine
    finally:
        engine.stop()


def test_a_served_teacher_thinks_what_the_local_one_does(
    tmp_path: Path, teacher: Path, server: VllmProcess
) -> None:
    """Same rows, same order of columns; log-probabilities of tokens in both top 20 differ by bf16 noise, and
    what only one has is at the edge of the other's.
    """
    endpoint = EndpointConfig(url=server.url, model="teacher")
    served = rows_of(run(tmp_path / "s", teacher, SAMPLES, TeachConfig(source="vllm", endpoint=endpoint)))
    local = rows_of(run(tmp_path / "l", teacher, SAMPLES, TeachConfig()))
    assert set(served) == set(local)
    assert {d: r["input_ids"] for d, r in served.items()} == {d: r["input_ids"] for d, r in local.items()}
    common = 0
    for digest, row in served.items():
        pairs = zip(_places(row), _places(local[digest]), strict=True)
        for got, expected in pairs:
            assert len(got) == len(expected) == 20
            both = got.keys() & expected.keys()
            assert max(abs(got[t] - expected[t]) for t in both) < BF16
            edge = min(expected.values()) + 2 * BF16
            assert all(got[t] < edge for t in got.keys() - both)
            common += len(both)
    assert common >= 0.9 * 20 * sum(len(list(_places(r))) for r in served.values())


def test_more_than_the_server_gives_says_what_to_set(
    tmp_path: Path, teacher: Path, server: VllmProcess
) -> None:
    """vLLM's own words about its limit are understood."""
    endpoint = EndpointConfig(url=server.url, model="teacher")
    with pytest.raises(EngineError, match=r"at most 20 .*--max-logprobs 30"):
        run(tmp_path, teacher, SAMPLES, TeachConfig(k=30, source="vllm", endpoint=endpoint))


def test_a_served_teacher_answers_with_several_draws(tmp_path: Path, server: VllmProcess) -> None:
    """As many as were asked for, drawn the same again, and other than each other."""
    messages = [{"role": "user", "content": "where is parcel 1"}]
    endpoint = EndpointConfig(url=server.url, model="teacher")
    drawn = []
    for name in ("one", "two"):
        voice = ApiVoice(endpoint, "teach.endpoint", tmp_path / "spent.json")
        voice.ask(
            [Question("q", messages, {"messages": messages})], Sampling(16, 1.0, 1.0, 4), tmp_path / name
        )
        drawn.append(read_lines(tmp_path / name / "answers.jsonl")[0]["choices"])
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 4
    assert len({choice["text"] for choice in drawn[0]}) > 1


def _places(row: dict[str, list[float]]) -> Iterator[dict[float, float]]:
    """Log-probabilities by token id, of each completion position."""
    ids = np.array(row["topk_ids"]).reshape(-1, 20)
    values = np.array(row["topk_logprobs"], dtype=np.float32).reshape(-1, 20)
    for i, v in zip(ids, values, strict=True):
        yield dict(zip(i.tolist(), v.tolist(), strict=True))
