"""Teacher outputs on disk: every scheme against a plain forward pass, shared between jobs, averaged over
teachers.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from contracts.errors import ConfigError, DataError
from distill_jobs.teaching import local
from distill_jobs.teaching.config import TeachConfig
from distill_jobs.teaching.rows import Row
from distill_jobs.teaching.store import Store
from tests.integration.pipeline_world import write_model
from tests.unit.teaching_world import SAMPLES, rows_of, run, sample


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher of two layers."""
    folder = tmp_path_factory.mktemp("teacher")
    write_model(folder, hidden=64, layers=2, seed=0)
    return folder


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Samples that a local model was run on, in order."""
    seen: list[str] = []
    plain = local.LocalScorer.score

    def score(self: local.LocalScorer, rows: list[Row]) -> Any:
        seen.extend(r.sample_digest for r in rows)
        return plain(self, rows)

    monkeypatch.setattr(local.LocalScorer, "score", score)
    return seen


def probabilities(teacher: Path, row: dict[str, Any]) -> np.ndarray:
    """(completion, V) of an unbatched float32 forward pass."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
    values: np.ndarray = logits[row["prompt_len"] - 1 : -1].softmax(-1).numpy()
    return values


def test_sampled_rows_estimate_the_teacher(tmp_path: Path, teacher: Path) -> None:
    """Weights sum to 1 a position, no id twice; with 4,000 draws the estimate is within 5 standard errors."""
    config = TeachConfig(scheme="sampled", draws=4000, dtype="float32", shard_rows=2)
    result = run(tmp_path, teacher, SAMPLES, config)
    row = rows_of(result)["d-refund"]
    p = probabilities(teacher, row)
    ids = np.array(row["topk_ids"]).reshape(len(p), 4000)
    weights = np.exp(np.array(row["topk_logprobs"], dtype=np.float64)).reshape(len(p), 4000)
    assert weights.sum(axis=1) == pytest.approx(1.0, abs=2e-3)
    for place, kept in zip(ids, weights > 0, strict=True):
        assert len(set(place[kept])) == kept.sum()
    estimate = np.zeros_like(p)
    np.add.at(estimate, (np.arange(len(p))[:, None], ids), weights)
    assert (np.abs(estimate - p) < 5 * np.sqrt(p * (1 - p) / 4000) + 1e-3).all()
    about = json.loads((Path(result.outputs["train"].path) / "manifest.json").read_text())
    assert (about["scheme"], about["k"]) == ("sampled", 4000)


def test_sampled_rows_do_not_depend_on_the_batch(tmp_path: Path, teacher: Path) -> None:
    """The draws come of the sample's digest and tokens: other batches and parts give the same."""
    small = TeachConfig(scheme="sampled", dtype="float32", shard_rows=1, batch_tokens=16)
    (tmp_path / "b").mkdir()
    one = rows_of(run(tmp_path, teacher, SAMPLES, TeachConfig(scheme="sampled", dtype="float32")))
    two = rows_of(run(tmp_path / "b", teacher, SAMPLES, small))
    assert one == two
    assert len(one["d-refund"]["topk_ids"]) == 50 * 4


def test_hidden_states_and_the_head_rebuild_the_logits(tmp_path: Path, teacher: Path) -> None:
    """`hidden` is what the head reads: head x hidden gives the teacher's distribution."""
    result = run(tmp_path, teacher, SAMPLES, TeachConfig(scheme="hidden", dtype="float32"))
    folder = Path(result.outputs["train"].path)
    head = load_file(folder / "head.safetensors")["weight"].float().numpy()
    row = rows_of(result)["d-a much longer request"]
    hidden = np.array(row["hidden"], dtype=np.float32).reshape(-1, 64)
    logits = hidden @ head.T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert p / p.sum(axis=1, keepdims=True) == pytest.approx(probabilities(teacher, row), abs=1e-4)
    about = json.loads((folder / "manifest.json").read_text())
    assert (about["scheme"], about["k"], about["vocab_size"]) == ("hidden", 64, 320)


def test_a_teacher_that_changes_its_logits_is_refused(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled or capped logits cannot be rebuilt from hidden states and head: said, rather than taught."""
    load = AutoModelForCausalLM.from_pretrained

    def scaled(*args: Any, **more: Any) -> Any:
        model = load(*args, **more)
        plain = model.forward

        def forward(*args: Any, **more: Any) -> Any:
            out = plain(*args, **more)
            out.logits = 30 * torch.tanh(out.logits / 0.3)
            return out

        model.forward = forward
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", scaled)
    with pytest.raises(DataError, match="scaled or capped"):
        run(tmp_path, teacher, SAMPLES, TeachConfig(scheme="hidden", dtype="float32"))


def test_text_alone_loads_no_model(tmp_path: Path, teacher: Path, scored: list[str]) -> None:
    """Rows of token ids without a distribution, for hard labels."""
    row = rows_of(run(tmp_path, teacher, SAMPLES, TeachConfig(scheme="text")))["d-refund"]
    assert scored == []
    assert set(row) == {"sample_digest", "token_digest", "row_key", "input_ids", "prompt_len"}


def test_another_job_finds_what_was_scored(tmp_path: Path, teacher: Path, scored: list[str]) -> None:
    """Rows are found by sample and tokens, in other parts and beside new ones; only the new are scored."""
    config, cache = TeachConfig(k=3, shard_rows=2, dtype="float32"), tmp_path / "cache"
    first = rows_of(run(tmp_path / "a", teacher, SAMPLES, config, cache_dir=cache))
    scored.clear()
    more = [*SAMPLES, sample("new one", "1"), sample("refund again", "2")]
    result = run(tmp_path / "b", teacher, more, config, cache_dir=cache)
    assert sorted(scored) == ["d-new one", "d-refund again"]
    assert result.counts["cached"] == 4
    second = rows_of(result)
    assert {d: second[d] for d in first} == first


def test_other_tokens_or_settings_miss_the_cache(tmp_path: Path, teacher: Path, scored: list[str]) -> None:
    """The same sample with another answer, k, scheme or teacher is another output."""
    cache = tmp_path / "cache"
    run(tmp_path / "a", teacher, SAMPLES, TeachConfig(k=3), cache_dir=cache)
    scored.clear()
    run(tmp_path / "b", teacher, [sample("refund", "[2]")], TeachConfig(k=3), cache_dir=cache)
    run(tmp_path / "c", teacher, SAMPLES[:1], TeachConfig(k=2), cache_dir=cache)
    run(tmp_path / "d", teacher, SAMPLES[:1], TeachConfig(scheme="sampled"), cache_dir=cache)
    run(tmp_path / "e", teacher, SAMPLES[:1], TeachConfig(k=3), cache_dir=cache, digest="other")
    assert [d for d in scored if d != "d-v"] == ["d-refund"] * 4


def test_a_damaged_file_in_the_cache_costs_time_only(
    tmp_path: Path, teacher: Path, scored: list[str]
) -> None:
    """What cannot be read is scored again, and the outputs are right."""
    config, cache = TeachConfig(k=3, dtype="float32"), tmp_path / "cache"
    first = rows_of(run(tmp_path / "a", teacher, SAMPLES, config, cache_dir=cache))
    for file in cache.rglob("*.parquet"):
        damaged = file.read_bytes()[:-50]
        file.unlink()  # a hard link to a job's part: never write into it
        file.write_bytes(damaged)
    scored.clear()
    assert rows_of(run(tmp_path / "b", teacher, SAMPLES, config, cache_dir=cache)) == first
    assert len(scored) == 4


def test_jobs_that_end_at_once_share_without_a_lock(tmp_path: Path, teacher: Path) -> None:
    """Eight hand over the same part and others at the same time: all are found, none is torn, nothing is
    left.
    """
    config = TeachConfig(k=3, dtype="float32", shard_rows=1)
    folder = Path(run(tmp_path, teacher, SAMPLES, config).outputs["train"].path)
    parts = sorted(folder.glob("part-*.parquet"))
    shared = tmp_path / "shared"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Store(shared, "topk").adopt, [*parts * 20]))
    assert len(list(shared.iterdir())) == len(parts) == 3
    assert all(p.samefile(q) for p, q in zip(parts, _by_key(parts, shared), strict=True))


def _by_key(parts: list[Path], shared: Path) -> list[Path]:
    """The shared files in the order of the parts, by their rows."""
    found = {pq.read_table(f)["row_key"][0].as_py(): f for f in shared.glob("*.parquet")}
    return [found[pq.read_table(p)["row_key"][0].as_py()] for p in parts]


def test_a_sample_keeps_its_weight_task_and_difficulty(tmp_path: Path, teacher: Path) -> None:
    """Columns that some samples have are there for all, with their defaults."""
    heavy = SAMPLES[0] | {"weight": 2.5, "task": "rationale"}
    rows = rows_of(run(tmp_path, teacher, [heavy, *SAMPLES[1:]], TeachConfig(scheme="text")))
    assert (rows["d-refund"]["weight"], rows["d-refund"]["task"]) == (2.5, "rationale")
    assert (rows["d-hi"]["weight"], rows["d-hi"]["task"]) == (1.0, "answer")
    assert "difficulty" not in rows["d-hi"]


def teachers(*weights: float, scheme: str = "topk", **more: Any) -> TeachConfig:
    """Teachers a (the job's) and b at those weights."""
    each = [{"name": n, "weight": w} for n, w in zip("abc", weights, strict=False)]
    for one in each:
        one |= more.get(str(one["name"]), {})
    config = {"scheme": scheme, "k": 320, "draws": 6, "dtype": "float32", "teachers": each, "shard_rows": 2}
    return TeachConfig(**config, combine=more.get("combine", "average"))


def test_an_average_of_two_teachers_is_that_of_their_distributions(
    tmp_path: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With k = V: 3/4 of one softmax and 1/4 of the other, at every position."""
    other = tmp_path_factory.mktemp("other")
    write_model(other, hidden=32, layers=1, seed=9)
    result = run(tmp_path, teacher, SAMPLES, teachers(3, 1, b={"model": str(other)}))
    row = rows_of(result)["d-refund"]
    expected = 0.75 * probabilities(teacher, row) + 0.25 * probabilities(other, row)
    got = np.zeros_like(expected)
    ids = np.array(row["topk_ids"]).reshape(-1, 320)
    np.add.at(
        got,
        (np.arange(len(got))[:, None], ids),
        np.exp(np.array(row["topk_logprobs"], dtype=np.float64)).reshape(-1, 320),
    )
    assert got == pytest.approx(expected, rel=1e-2)
    assert not (tmp_path / "teach" / "by").exists()


def test_samples_go_to_the_teacher_that_wants_them(
    tmp_path: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The first whose `when` holds; what nobody wants is dropped and counted."""
    other = tmp_path_factory.mktemp("other")
    write_model(other, hidden=32, layers=1, seed=9)
    config = teachers(
        1,
        1,
        a={"when": {"pattern": "^refund"}},
        b={"when": {"pattern": "hi|refund|v"}, "model": str(other)},
        combine="first",
    )
    result = run(tmp_path, teacher, SAMPLES, config)
    rows = rows_of(result)
    assert set(rows) == {"d-refund", "d-hi"}
    assert (result.counts["teacher_a"], result.counts["teacher_b"], result.counts["no_teacher"]) == (1, 2, 1)
    for digest, folder in (("d-refund", teacher), ("d-hi", other)):
        top = np.array(rows[digest]["topk_ids"]).reshape(-1, 320)[:, 0]
        assert top.tolist() == probabilities(folder, rows[digest]).argmax(axis=1).tolist()


def test_sampled_averages_are_padded_to_one_width(tmp_path: Path, teacher: Path) -> None:
    """Rows of one teacher and of two lie in one file: twice the draws everywhere, the manifest says so, and
    two teachers of the same weights draw differently.
    """
    config = teachers(1, 1, scheme="sampled", b={"when": {"pattern": "^refund"}})
    result = run(tmp_path, teacher, SAMPLES, config)
    rows = rows_of(result)
    shapes = {d: len(r["topk_ids"]) / (len(r["input_ids"]) - r["prompt_len"]) for d, r in rows.items()}
    assert set(shapes.values()) == {12.0}
    weights = np.exp(np.array(rows["d-hi"]["topk_logprobs"], np.float64)).reshape(-1, 12)
    assert weights.sum(axis=1) == pytest.approx(1.0, abs=2e-3)
    assert (weights[:, 6:] == 0).all()
    about = json.loads((Path(result.outputs["train"].path) / "manifest.json").read_text())
    assert about["k"] == 12


def test_teachers_of_two_vocabularies_are_refused(
    tmp_path: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Their token ids mean different texts."""
    other = tmp_path_factory.mktemp("other")
    write_model(other, hidden=32, layers=1, seed=9)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"\\u0001\\u0001"'))
    with pytest.raises(ConfigError, match="'b' has another vocabulary than 'a'"):
        run(tmp_path, teacher, SAMPLES, teachers(1, 1, b={"model": str(other)}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"source": "api", "endpoint": {"url": "http://x", "model": "m"}}, "set scheme: text"),
        (
            {"source": "vllm", "endpoint": {"url": "http://x", "model": "m"}, "scheme": "sampled"},
            "whole distribution",
        ),
        ({"source": "vllm"}, "endpoint goes with"),
        ({"scheme": "hidden", "teachers": [{"name": "a"}]}, "scheme: hidden"),
        ({"teachers": [{"name": "a"}, {"name": "a"}]}, "same name"),
        ({"answers": {"n": 4}}, "temperature above 0"),
        ({"teachers": [{"name": "a", "when": {"pattern": "("}}]}, "regular expression"),
    ],
)
def test_impossible_configurations_say_what_to_set(fields: dict[str, Any], words: str) -> None:
    """Before anything runs."""
    with pytest.raises(ValueError, match=words):
        TeachConfig(**fields)
