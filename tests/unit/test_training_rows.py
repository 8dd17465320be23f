"""Rows on disk: what a malformed part says, what each scheme of teacher output becomes, and that rows stay on
disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from contracts.errors import DataError
from distill_jobs.training.data import Rows
from tests.unit.test_training_loop import write_rows

ROOT = Path(__file__).parents[2]


def rewrite(folder: Path, name: str, change: Callable[[list], list], kind: pa.DataType | None = None) -> None:  # type: ignore[type-arg]
    """Change a column of the first part."""
    path = folder / "part-00000.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    values = pa.array(change(table.column(name).to_pylist()), kind or table.schema.field(name).type)
    pq.write_table(table.set_column(place, name, values), path)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("prompt_len", lambda c: [0, *c[1:]], "0 < prompt_len"),
        ("prompt_len", lambda c: [1000, *c[1:]], "0 < prompt_len"),
        ("prompt_len", lambda c: [None, *c[1:]], "prompt_len has empty cells"),
        ("input_ids", lambda c: [[-1, *c[0][1:]], *c[1:]], "outside the vocabulary"),
        ("input_ids", lambda c: [[40, *c[0][1:]], *c[1:]], "outside the vocabulary of 40"),
        ("input_ids", lambda c: [[], *c[1:]], "0 < prompt_len"),
        ("topk_ids", lambda c: [ids[:-1] for ids in c], "k values"),
        ("topk_ids", lambda c: [[99, *c[0][1:]], *c[1:]], "topk_ids holds token ids outside"),
        ("topk_logprobs", lambda c: [[float("nan"), *c[0][1:]], *c[1:]], "NaN"),
        ("weight", lambda c: [-1.0, *c[1:]], "weight must not be negative"),
        ("weight", lambda c: [float("inf"), *c[1:]], "weight must be finite"),
        ("task", lambda c: ["antwort", *c[1:]], "not 'antwort'"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, name: str, change: Callable, said: str) -> None:  # type: ignore[type-arg]
    """The error names the part and the column, before anything is trained; no half-read columns stay."""
    folder = write_rows(tmp_path / "rows", extra=True)
    (folder / "manifest.json").write_text(json.dumps({"k": 4, "vocab_size": 40}))
    Rows(folder, 64, True)
    rewrite(folder, name, change)
    with pytest.raises(DataError, match=said) as raised:
        Rows(folder, 64, True)
    assert "part-00000" in str(raised.value)
    assert not list((tmp_path / "rows.columns").glob(".*"))


def test_folders_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    """No parts, no rows, no parquet, a missing column, an unknown scheme and a row above max_length."""
    with pytest.raises(DataError, match="no part-"):
        Rows(tmp_path, 64, False)
    folder = write_rows(tmp_path / "rows")
    with pytest.raises(DataError, match="max_length 8"):
        Rows(folder, 8, False)
    (folder / "manifest.json").write_text('{"scheme": "magic"}')
    with pytest.raises(DataError, match="'magic' is not one of topk"):
        Rows(folder, 64, True)
    Rows(folder, 64, False)  # without a teacher its scheme does not matter
    for part in folder.glob("part-*"):
        table = pq.read_table(part)
        pq.write_table(table.slice(0, 0), part)
    with pytest.raises(DataError, match="no rows"):
        Rows(folder, 64, False)
    pq.write_table(table.drop_columns(["prompt_len"]), part)
    with pytest.raises(DataError, match="no column prompt_len"):
        Rows(folder, 64, False)
    part.write_bytes(b"PAR?")
    with pytest.raises(DataError, match="not a parquet file"):
        Rows(folder, 64, False)


def test_weights_tasks_and_difficulty_reach_the_micro_batch(tmp_path: Path) -> None:
    """Per counted position, in the order of the labels; parts without the columns weigh 1 and answer."""
    rows = Rows(write_rows(tmp_path / "rows", extra=True), 64, True)
    table = pq.read_table(tmp_path / "rows").to_pydict()
    batch = rows.micro_batch(np.array([4, 9]), with_prompt=False)
    of = [i for i in (4, 9) for _ in range(int(rows.lengths[i] - rows.prompt_len[i]))]
    assert batch.weights.tolist() == [table["weight"][i] for i in of]
    assert batch.rationale.tolist() == [table["task"][i] == "rationale" for i in of]
    assert rows.difficulty.tolist() == table["difficulty"]
    plain = Rows(write_rows(tmp_path / "plain"), 64, True)
    assert set(plain.weights.tolist()) == {1.0}
    assert not plain.rationale.any()


def test_the_sampled_scheme_is_named_in_the_batch(tmp_path: Path) -> None:
    """Random-sampling rows use the same columns; only manifest.json says what they mean."""
    folder = write_rows(tmp_path / "rows")
    assert Rows(folder, 64, True).micro_batch(np.array([0]), False).scheme == "topk"
    (folder / "manifest.json").write_text('{"scheme": "sampled", "k": 4}')
    batch = Rows(folder, 64, True).micro_batch(np.array([0]), False)
    assert batch.scheme == "sampled"
    assert batch.topk_ids is not None
    assert batch.topk_ids.shape[1] == 4


@pytest.mark.parametrize("nested", [False, True])
def test_hidden_states_and_the_teachers_head_are_read(tmp_path: Path, nested: bool) -> None:
    """d values a completion position, as a flat list or a list of vectors; prompt positions are zeros."""
    folder, width = write_rows(tmp_path / "rows"), 6
    rng, expected = np.random.default_rng(0), []
    kind = pa.list_(pa.list_(pa.float16(), width)) if nested else pa.list_(pa.float16())
    for part in sorted(folder.glob("part-*")):
        table = pq.read_table(part)
        cells = []
        for ids, prompt in zip(table["input_ids"].to_pylist(), table["prompt_len"].to_pylist(), strict=True):
            states = rng.normal(size=(len(ids) - prompt, width)).astype(np.float16)
            expected.append(states)
            cells.append(list(states) if nested else states.reshape(-1))
        pq.write_table(table.append_column("hidden", pa.array(cells, kind)), part)
    (folder / "manifest.json").write_text('{"scheme": "hidden"}')
    rows = Rows(folder, 64, True)
    assert rows.k == width
    batch = rows.micro_batch(np.array([7, 2]), with_prompt=True)
    assert batch.teacher_hidden is not None
    assert batch.topk_ids is None
    assert np.array_equal(batch.teacher_hidden[~batch.in_prompt], np.concatenate([expected[7], expected[2]]))
    assert not batch.teacher_hidden[batch.in_prompt].any()
    with pytest.raises(DataError, match="need the teacher's head"):
        _ = rows.head
    save_file({"weight": torch.ones(40, width)}, folder / "head.safetensors")
    assert rows.head.shape == (40, width)
    save_file({"weight": torch.ones(40, width + 1)}, folder / "head.safetensors")
    with pytest.raises(DataError, match="width 6"):
        _ = Rows(folder, 64, True).head


def test_changed_parts_are_read_again(tmp_path: Path) -> None:
    """The flat columns belong to the parts' names, sizes and times: a part written anew is believed."""
    folder = write_rows(tmp_path / "rows")
    before = Rows(folder, 64, True).tokens(0).tolist()
    write_rows(folder, seed=4)
    after = Rows(folder, 64, True).tokens(0).tolist()
    assert before != after
    assert after == pq.read_table(folder)["input_ids"][0].as_py()


def test_processes_that_open_the_same_rows_at_once_agree(tmp_path: Path) -> None:
    """Four workers convert the same folder concurrently: all read it, one set of columns stays."""
    folder = write_rows(tmp_path / "rows", count=2000)
    code = (
        "import sys; from distill_jobs.training.columns import open_columns;"
        "a = open_columns(sys.argv[1], 64, True).arrays; print(len(a['lengths']), int(a['input_ids'].sum()))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = {process.communicate(timeout=60)[0] for process in started}
    table = pq.read_table(folder)
    total = sum(sum(ids) for ids in table["input_ids"].to_pylist())
    assert said == {f"2000 {total}\n"}
    assert len(list((tmp_path / "rows.columns").iterdir())) == 1
