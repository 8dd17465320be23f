"""teach: the cache's contract with the trainer, and what a second run repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from contracts.errors import ConfigError, DataError
from distill_jobs.config import EngineConfig, TeachConfig
from distill_jobs.engine import write_lines
from distill_jobs.teaching.size import cache_size
from distill_jobs.tokens import ChatTokenizer
from distill_jobs.training.data import Rows
from tests.integration.pipeline_world import write_model, write_tokenizer
from tests.unit.teaching_world import SAMPLES, rows_of, run, sample

EOS = 2


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher of two layers."""
    folder = tmp_path_factory.mktemp("teacher")
    write_model(folder, hidden=64, layers=2, seed=0)
    return folder


def test_position_j_predicts_completion_token_j(tmp_path: Path, teacher: Path) -> None:
    """Row-major [completion, k] log-probabilities equal an unbatched forward pass, shifted by one."""
    result = run(tmp_path, teacher, SAMPLES, TeachConfig(k=5, dtype="float32"))
    row = rows_of(result)["d-a much longer request"]
    ids, first = row["input_ids"], row["prompt_len"]
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logprobs[first - 1 : len(ids) - 1].topk(5)
    assert len(row["topk_ids"]) == (len(ids) - first) * 5
    assert np.array(row["topk_ids"]).reshape(-1, 5).tolist() == expected.indices.tolist()
    got = np.array(row["topk_logprobs"], dtype=np.float32).reshape(-1, 5)
    assert got == pytest.approx(expected.values.numpy(), abs=5e-3)


def test_rows_hold_prompt_then_answer_then_end(tmp_path: Path, teacher: Path) -> None:
    """The completion is the logged answer and its end; the prompt is what a server would render."""
    row = rows_of(run(tmp_path, teacher, SAMPLES, TeachConfig(k=2)))["d-refund"]
    tokenizer = ChatTokenizer(str(teacher))
    assert row["input_ids"][: row["prompt_len"]] == tokenizer.prompt(
        {"messages": [{"role": "user", "content": "refund"}]}
    )
    assert row["input_ids"][row["prompt_len"] :] == tokenizer.answer("[1]")
    assert row["input_ids"][-1] == EOS


def test_the_trainer_reads_what_teach_writes(tmp_path: Path, teacher: Path) -> None:
    """The trainer's own reader accepts the folder; the manifest beside the parts says k, teacher,
    vocabulary, and a digest of the rows that another answer changes.
    """
    result = run(tmp_path, teacher, SAMPLES, TeachConfig(k=3, shard_rows=2))
    folder = Path(result.outputs["train"].path)
    rows = Rows(folder, max_length=128, with_teacher=True)
    assert (len(rows), rows.k) == (3, 3)
    about = json.loads((folder / "manifest.json").read_text())
    rows_digest = about.pop("rows_digest")
    assert about == {"k": 3, "teacher_digest": "digest", "vocab_size": 320, "scheme": "topk", "rows": 3}
    changed = run(tmp_path, teacher, [*SAMPLES[:2], sample("hi", "y")], TeachConfig(k=3, shard_rows=2))
    again = json.loads((Path(changed.outputs["train"].path) / "manifest.json").read_text())
    assert (again["rows"], again["rows_digest"] == rows_digest) == (3, False)


def test_finished_parts_are_kept_and_changed_ones_made_again(tmp_path: Path, teacher: Path) -> None:
    """A killed teach repeats the part it was in; a part whose samples changed is not believed."""
    config = TeachConfig(k=2, shard_rows=2)
    run(tmp_path, teacher, SAMPLES, config)
    first, second = sorted((tmp_path / "teach" / "train").glob("part-*.parquet"))
    second.unlink()
    before = first.stat().st_mtime_ns
    run(tmp_path, teacher, SAMPLES, config)
    assert first.stat().st_mtime_ns == before
    assert second.is_file()
    run(tmp_path, teacher, [SAMPLES[0], SAMPLES[1], sample("hi", "another answer")], config)
    assert "d-hi" in {r for p in (first, second) for r in pq.read_table(p)["sample_digest"].to_pylist()}
    assert first.stat().st_mtime_ns != before


def test_missing_answers_are_asked_of_the_teacher(tmp_path: Path, teacher: Path) -> None:
    """Requests that somebody else answered get the teacher's own text; unfinished answers are left out."""
    asked: list[dict[str, Any]] = []

    def answer(job: dict[str, Any], engine: EngineConfig) -> dict[str, Any]:
        prompts = [json.loads(line) for line in Path(job["answer"]["prompts"]).read_text().splitlines()]
        asked.extend(prompts)
        replies = [("from the teacher", "stop"), ("cut of", "length")]
        write_lines(
            Path(job["out"]) / "answers.jsonl",
            [
                {"id": p["id"], "text": t, "finish_reason": f}
                for p, (t, f) in zip(prompts, replies, strict=True)
            ],
        )
        return {}

    samples = [SAMPLES[0], sample("one", None), sample("two", None)]
    result = run(tmp_path, teacher, samples, TeachConfig(k=2, answer_tokens=32), answer)
    assert [p["id"] for p in asked] == ["d-one", "d-two"]
    assert result.counts["answered_offline"] == result.counts["no_teacher_answer"] == 1
    row = rows_of(result)["d-one"]
    assert row["input_ids"][row["prompt_len"] :] == ChatTokenizer(str(teacher)).answer("from the teacher")


def test_answers_that_leave_no_room_for_a_prompt_are_refused(tmp_path: Path, teacher: Path) -> None:
    """Rather than leaving every request unanswered."""
    with pytest.raises(ConfigError, match=r"teach\.answer_tokens"):
        run(tmp_path, teacher, [sample("one", None)], TeachConfig(k=2, answer_tokens=128), max_model_len=128)


def test_long_samples_are_counted_and_none_left_is_an_error(tmp_path: Path, teacher: Path) -> None:
    """What does not fit is dropped by number, and an empty cache never reaches the trainer."""
    result = run(tmp_path, teacher, SAMPLES, TeachConfig(k=2, max_tokens=45))
    assert (result.counts["too_many_tokens"], result.counts["train"]) == (1, 2)
    with pytest.raises(DataError, match=r"teach\.max_tokens"):
        run(tmp_path, teacher, SAMPLES, TeachConfig(k=2, max_tokens=8))


def test_the_cache_size_is_said_beforehand() -> None:
    """1,000 positions: top 20 take 4 + 2 bytes each (0.12 MB); full logits of 32,000 tokens in 16 bits 64 kB
    each.
    """
    topk, sampled = TeachConfig(k=20), TeachConfig(scheme="sampled", draws=12)
    assert cache_size(topk, 7, 1000, 32_000, 64) == (
        "teach: 7 samples, 1000 positions x top 20: the cache takes about 0.1 MB (120 bytes a position, 1/533"
        " of full logits)"
    )
    assert "12 draws: the cache takes about 0.1 MB (72 bytes" in cache_size(sampled, 7, 1000, 32_000, 64)
    assert "(128 bytes a position, 1/500" in cache_size(TeachConfig(scheme="hidden"), 7, 1000, 32_000, 64)


def test_a_cache_over_the_limit_is_refused_with_the_way_out() -> None:
    """A billion positions x 120 bytes are 120 GB: the message says the limit's name and what would fit."""
    with pytest.raises(ConfigError, match=r"120 GB .*teach\.max_cache_gb = 100.*12 draws take 72 GB"):
        cache_size(TeachConfig(k=20), 7, 10**9, 32_000, 64)


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    """Prompts are never rendered by guess."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTokenizer(str(tmp_path))
