"""The tools of stages that hold a window only: samples by the window, sorted files, indexed lines."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.errors import DataError
from distill_jobs import engine, samples
from distill_jobs.keys import sha256_of, sha256_of_each
from distill_jobs.lines import LineIndex, open_to_append, stream_lines, write_stream
from distill_jobs.sorting import DictForm, sort_windows


def folder_of(folder: Path, sizes: list[int], row_group: int = 3) -> Path:
    """Parts of so many samples, numbered through."""
    folder.mkdir()
    start = 0
    for number, size in enumerate(sizes):
        rows = [{"n": n, "text": f"t{n}"} for n in range(start, start + size)]
        table = pa.Table.from_pylist(rows, schema=pa.schema([("n", pa.int64()), ("text", pa.string())]))
        pq.write_table(table, folder / f"part-{number:05d}.parquet", row_group_size=row_group)
        start += size
    return folder


@pytest.mark.parametrize("size", [1, 2, 5, 17, 100])
def test_windows_are_whole_over_parts_and_row_groups(tmp_path: Path, size: int) -> None:
    """Every window but the last has `size` samples, and all come once, in the order of the parts' names."""
    folder = folder_of(tmp_path / "train", [7, 0, 1, 9])
    found = list(samples.windows(folder, size))
    assert [s["n"] for window in found for s in window] == list(range(17))
    assert {len(window) for window in found[:-1]} <= {size}
    assert len(found) == -(-17 // size)
    assert samples.count(folder) == 17
    assert next(samples.windows(folder, 2, ("text", "class"))) == [{"text": "t0"}, {"text": "t1"}]
    assert list(samples.each(folder / "part-00002.parquet")) == [{"n": 7, "text": "t7"}]


def test_a_folder_without_parts_is_named(tmp_path: Path) -> None:
    """Rather than teaching nothing."""
    with pytest.raises(DataError, match="holds no part"):
        samples.count(tmp_path)


@pytest.mark.parametrize("window", [1, 3, 64, 10_000])
def test_a_sorted_file_is_what_sorting_in_memory_gives(tmp_path: Path, window: int) -> None:
    """Equal keys keep their order, over several levels of merging (400 runs of one, 16 at a time); nothing
    but the result is left on disk; it can be read twice.
    """
    rng = random.Random(window)
    things = [{"key": rng.randrange(40), "came": n} for n in range(400)]
    form = DictForm(pa.schema([("key", pa.int64()), ("came", pa.int64())]))
    parts = (things[at : at + window] for at in range(0, len(things), window))
    made = sort_windows(parts, lambda t: t["key"], form, tmp_path / "rows", window)
    assert list(made) == list(made) == sorted(things, key=lambda t: t["key"])
    assert len(made) == 400
    assert [tmp_path / "rows" / f.name for f in (tmp_path / "rows").iterdir()] == list(made.files)


def test_nothing_sorted_is_nothing(tmp_path: Path) -> None:
    """No windows, or empty ones; what an earlier run left in the folder is gone."""
    form = DictForm(pa.schema([("key", pa.int64())]))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "0-000000.arrow").write_bytes(b"torn")
    nothing: list[list[dict[str, Any]]] = [[], []]
    for windows in (nothing, nothing[:0]):
        made = sort_windows(windows, lambda t: t["key"], form, tmp_path / "rows", 5)
        assert (list(made), len(made), made.files) == ([], 0, ())


def test_lines_are_found_by_a_field_the_last_one_counts(tmp_path: Path) -> None:
    """Over files, whatever the characters; a torn tail is as if it were not there."""
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert write_stream(one, ({"id": i, "n": n} for i, n in (("ü\u2028", 1), ("b", 2), (3, 3)))) == 3
    two.write_text(json.dumps({"id": "b", "n": 4}) + "\n" + '{"id": "c", "n')
    index = LineIndex([one, two], "id")
    assert [index.find(i) for i in ("ü\u2028", "b", 3, "3", "c")] == [
        {"id": "ü\u2028", "n": 1}, {"id": "b", "n": 4}, {"id": 3, "n": 3}, None, None,
    ]  # fmt: skip
    assert (len(index), "b" in index, "c" in index) == (3, True, False)
    assert [row["n"] for row in index] == [1, 3, 4]
    assert (len(LineIndex([], "id")), LineIndex([], "id").find("a")) == (0, None)


@pytest.mark.parametrize("left", ["", '{"n": 1}\n', '{"n": 1}', '{"n": 1}\n{"n', '{"n": 1}\n\xff'])
def test_appending_goes_on_after_the_last_whole_line(tmp_path: Path, left: str) -> None:
    """However a killed writer left the file: torn in a line, or before its end."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(left.encode("latin-1"))
    with open_to_append(path) as sink:
        sink.write('{"n": 2}\n')
    assert [row["n"] for row in stream_lines(path)] == ([1, 2] if left else [2])


@pytest.mark.parametrize("values", [[], [1], [["a", "ü"], ["b", None]], [{"z": 1, "a": [2]}, "x"]])
def test_a_digest_of_each_is_the_digest_of_the_list(values: list[Any]) -> None:
    """Manifests say the same digest, whether the rows were in memory or not."""
    assert sha256_of_each(iter(values)) == sha256_of(values)


def test_an_engine_answers_what_is_left_chunk_by_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 300 prompts two were answered before a kill: 298 are generated, 128 at a time, in order; progress
    counts the earlier ones, and the torn line is gone.
    """
    chunks: list[list[int]] = []

    def draw(llm: Any, prompts: list[dict[str, Any]], job: dict[str, Any]) -> list[Any]:
        chunks.append([p["id"] for p in prompts])
        said = SimpleNamespace(token_ids=[1], text="said", finish_reason="stop", logprobs=None)
        return [SimpleNamespace(outputs=[said]) for _ in prompts]

    monkeypatch.setattr(engine, "_draw", draw)
    write_stream(tmp_path / "prompts.jsonl", ({"id": n, "ids": [n]} for n in range(300)))
    (tmp_path / "answers.jsonl").write_text(
        '{"id": 7, "text": "old"}\n{"id": 0, "text": "old"}\n{"id": 1, "te'
    )
    engine._answer(None, {"prompts": str(tmp_path / "prompts.jsonl")}, tmp_path)  # type: ignore[arg-type]
    assert [len(chunk) for chunk in chunks] == [128, 128, 42]
    assert [n for chunk in chunks for n in chunk] == [n for n in range(300) if n not in (0, 7)]
    rows = list(stream_lines(tmp_path / "answers.jsonl"))
    assert [row["text"] for row in rows] == ["old", "old"] + ["said"] * 298
    assert capsys.readouterr().out.splitlines() == [
        f"PROGRESS {done} 300 answers" for done in (130, 258, 300)
    ]
