"""The benchmark of the best student: what its bars are made of, and that what was answered is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.compression import best
from benchmarks.recipes import data
from contracts.errors import QuantizationError
from distill_jobs.quantizing.candidates import Measured
from distill_jobs.quantizing.checkpoints import weight_bytes

SPEEDS = {
    "teacher": {"1": [10.0, 10.0, 10.0], "32": [100.0, 200.0, 100.0]},
    "w8a8": {"1": [90.0, 90.0, 90.0], "32": [600.0, 800.0, 700.0]},
}


def test_the_bars_are_ratios_of_what_was_served() -> None:
    """Accuracy over the teacher's with its interval, bytes, and the median of the turns' ratios at the
    clients that the bar names (6, 4 and 7 times)."""
    teacher, right = [1.0] * 99 + [0.0], [1.0] * 97 + [0.0] * 3
    rows = [{"accuracy": 0.99, "bytes": 3300}, {"accuracy": 0.97, "bytes": 200}]
    accuracy, size, speed = best.bars(rows[0], rows[1], teacher, right, SPEEDS, "w8a8")
    assert (accuracy.value, accuracy.ok) == (pytest.approx(0.97 / 0.99), False)
    assert (size.value, size.ok) == (16.5, True)
    assert (speed.value, speed.ok) == (6.0, True)
    assert "32 in flight" in speed.what
    low, high = rows[1]["of_teacher_interval"]  # type: ignore[misc]
    assert 0.9 < low < 0.97 / 0.99 < high <= 1.02


def test_the_width_leaves_room_for_eight_bits() -> None:
    """The constant's figures: 704 neurons are within a sixteenth of the teacher's file, 768 are not."""
    from transformers import AutoConfig

    from distill_jobs.search.space import Frame, Shape, file_bytes

    frame = Frame.of(AutoConfig.from_pretrained(data.STUDENT))
    budget = weight_bytes(Path(data.TEACHER)) // best.FEWER
    sizes = [file_bytes(frame, Shape(2, 256, width, 4, 2), "w8a8") for width in (704, 768)]
    assert best.WIDTH.intermediate == 704
    assert sizes == [2_540_040, 2_638_856]
    assert sizes[0] <= budget < sizes[1]


def test_rows_are_read_as_prompts_and_answers(tmp_path: Path) -> None:
    """Split where the prompt ends."""
    table = {"input_ids": [[5, 6, 7, 8], [9, 3]], "prompt_len": [3, 1]}
    pq.write_table(pa.table(table), tmp_path / "part-00000.parquet")
    assert best.answered_rows(tmp_path) == [
        {"ids": [5, 6, 7], "completion": [8]}, {"ids": [9], "completion": [3]}
    ]  # fmt: skip


def test_answers_that_are_kept_are_graded_without_an_engine(tmp_path: Path) -> None:
    """A finished folder is read: the right call is right, anything else is not."""
    asked = data.requests("evaluation", best.FIRST_TESTED, 2)
    lines = [{"id": 0, "text": json.dumps(asked[0].answer)}, {"id": 1, "text": "?"}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (tmp_path / "done.json").write_text("{}")
    assert best.graded(tmp_path, asked, tmp_path, 1) == [1.0, 0.0]


def test_when_no_candidate_is_good_enough_each_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes, loss or refusal of every one are in the error."""
    found = [
        Measured(name="a", artifact="", bytes=10**8, perplexity=1.0, loss=0.0, tokens_per_s=1.0),
        Measured(name="b", artifact="", refused="damaged"),
    ]
    monkeypatch.setattr(best, "compare", lambda job, say: (found[0], found))
    monkeypatch.setattr(best, "answered_rows", lambda _: [{"ids": [1], "completion": [2]}])
    with pytest.raises(QuantizationError, match=r"a: 100000000 bytes.*b: .*damaged"):
        best.quantized(Path(data.STUDENT), tmp_path, tmp_path / "out", 1, False)


def test_the_parts_rows_and_bars_come_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, engines and timing aside: a row for the teacher, the bf16 student, the chosen artifact and
    each candidate, the accuracy's interval and tokens/s by clients in it; three bars of the chosen one."""
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    (artifact / "model.safetensors").write_bytes(bytes(2_500_000))
    chosen = Measured(name="w8a8", artifact=str(artifact), bytes=2_500_000, perplexity=1.0, loss=0.0)
    right = {"teacher": [1.0] * 32, "student": [1.0] * 31 + [0.0], "w8a8": [1.0] * 31 + [0.0]}
    monkeypatch.setattr(best, "rows_folder", lambda folder, job: folder)
    monkeypatch.setattr(best, "trained", lambda *_: Path(data.STUDENT))
    monkeypatch.setattr(best, "quantized", lambda *_: (chosen, [chosen]))
    monkeypatch.setattr(best, "graded", lambda model, asked, out, threads: right[out.name])
    monkeypatch.setattr(best, "measure", lambda *_: SPEEDS | {"student": SPEEDS["w8a8"]})
    rows, bars = best.run(1, tmp_path, True)
    assert [row["name"] for row in rows] == ["teacher", "student", "w8a8", "candidate w8a8"]
    assert {row["part"] for row in rows} == {"best"}
    assert rows[0]["tokens_per_s_32"] == 100.0
    assert rows[2]["accuracy"] == pytest.approx(31 / 32)
    assert rows[2]["accuracy_interval"][0] < 31 / 32
    assert [bar.ok for bar in bars] == [False, True, True]
    assert bars[1].value == pytest.approx(weight_bytes(Path(data.TEACHER)) / 2_500_000)
    json.dumps(rows)
