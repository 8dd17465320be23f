"""teach by the window: what it writes and asks does not depend on how many samples it holds at a time."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_jobs import teach
from distill_jobs.config import EngineConfig
from distill_jobs.progress import Progress
from distill_jobs.stage import Result
from distill_jobs.teaching import local
from distill_jobs.teaching.config import TeachConfig
from distill_jobs.teaching.rowfile import sort_rows
from distill_jobs.teaching.rows import CARRIED, Row
from tests.integration.pipeline_world import write_model
from tests.unit.offline_engine import Killed, OfflineEngine
from tests.unit.teaching_world import run, sample

WORDS = ("refund", "parcel", "invoice", "cancel the plan", "reset my password")


def _made(n: int) -> dict[str, Any]:
    """The n-th sample: some have no answer, some weigh more, some only the second teacher wants."""
    text = f"{WORDS[n % 5]} {n * n}" + " please" * (n % 3)
    made = sample(text, None if n % 4 == 1 else f"answer {n}" * (n % 2 + 1))
    return made | {"weight": 2.0 if n == 21 else None}


SAMPLES = [_made(n) for n in range(24)]
SAMPLES += [dict(SAMPLES[2]), sample("nobody wants this one", "x")]  # a copy, as balance makes them


def answered(dies_after: int | None = None) -> OfflineEngine:
    """An engine that says something else to every prompt."""
    return OfflineEngine(lambda prompt: f"said {prompt['id'][-3:]}", dies_after)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def outputs(result: Result) -> dict[str, dict[str, bytes]]:
    """The files of every split."""
    return {name: tree(Path(output.path)) for name, output in result.outputs.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random teachers of one vocabulary."""
    made = []
    for name, seed in (("one", 0), ("two", 9)):
        made.append(tmp_path_factory.mktemp(name))
        write_model(made[-1], hidden=32, layers=1, seed=seed)
    return made[0], made[1]


def two_teachers(other: Path, window: int, **more: Any) -> TeachConfig:
    """The job's own, and another that is averaged in for some and alone for others; demonstrations."""
    wanted = [
        {"name": "own", "weight": 3, "when": {"pattern": "refund|parcel|invoice"}},
        {"name": "other", "model": str(other), "when": {"pattern": "invoice|cancel|reset|v"}},
    ]
    return TeachConfig(
        k=4, dtype="float32", shard_rows=5, answer_tokens=16, window=window, teachers=wanted,
        combine="average", demonstrations={"k": 1, "pool": 6, "max_tokens": 300}, **more,
    )  # fmt: skip


def text_alone(other: Path, window: int, **more: Any) -> TeachConfig:
    """Every sample answered by the teacher."""
    config = {"scheme": "text", "shard_rows": 7, "answer_tokens": 16, "answers": {"which": "all"}}
    return TeachConfig(**config, window=window, **more)


@pytest.mark.parametrize("config_of", [two_teachers, text_alone])
def test_a_window_changes_nothing(
    tmp_path: Path, models: tuple[Path, Path], config_of: Callable[..., TeachConfig]
) -> None:
    """Windows of 1, of 4 and of everything: the same parts byte for byte, manifests and counts; and the same
    questions in one session of the engine a teacher.
    """
    found = {}
    for window in (1, 4, 1000):
        engine = answered()
        at = tmp_path / str(window)
        result = run(at, models[0], SAMPLES, config_of(models[1], window), engine, at / "cache")
        found[window] = (outputs(result), result.counts, engine.asked, engine.sessions)
        assert sorted(p.name for p in (at / "teach").iterdir()) == ["answers", "train", "validation"]
    assert found[1] == found[4] == found[1000]
    parts, counts, asked, sessions = found[4]
    if config_of is two_teachers:
        assert (sessions, counts["no_teacher"], counts["train"]) == (2, 1, 25)
        assert (counts["teacher_own"], counts["teacher_other"]) == (16, 16)  # both: the six invoices
        assert (len(asked), counts["answered_offline"]) == (6, 6)
        assert len([name for name in parts["train"] if name.startswith("part-")]) == 5
    else:
        assert (sessions, len(asked), counts["answered_offline"], counts["train"]) == (1, 27, 27, 26)


def test_killed_in_every_phase_it_asks_once_and_keeps_what_is_done(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while answers come, between windows of tokens, and between parts of scores; each time started
    anew with another window: no question is asked twice, no engine started for nothing, no part scored
    twice, and the end is that of an undisturbed run.
    """
    whole = run(tmp_path / "whole", models[0], SAMPLES, two_teachers(models[1], 4), answered())
    at = tmp_path / "killed"
    dying = answered(dies_after=2)
    with pytest.raises(Killed):
        run(at, models[0], SAMPLES, two_teachers(models[1], 4), dying)
    engine = answered()
    plain = teach.tokenise
    calls = Counter[str]()

    def tokenise(*args: Any) -> Any:
        calls["tokenise"] += 1
        if calls["tokenise"] == 3:
            raise Killed
        return plain(*args)

    monkeypatch.setattr(teach, "tokenise", tokenise)
    with pytest.raises(Killed):
        run(at, models[0], SAMPLES, two_teachers(models[1], 3), engine)
    scored: list[str] = []
    score = local.LocalScorer.score

    def counted(self: local.LocalScorer, rows: list[Any]) -> Any:
        if len(scored) >= 10 and not calls["scored"]:
            calls["scored"] += 1
            raise Killed
        scored.extend(r.key for r in rows)
        return score(self, rows)

    monkeypatch.setattr(local.LocalScorer, "score", counted)
    with pytest.raises(Killed):
        run(at, models[0], SAMPLES, two_teachers(models[1], 7), engine)
    assert engine.sessions == 2
    result = run(at, models[0], SAMPLES, two_teachers(models[1], 1), engine)
    assert (outputs(result), result.counts) == (outputs(whole), whole.counts)
    assert engine.sessions == 2
    assert Counter([*dying.asked, *engine.asked]).most_common(1)[0][1] == 1
    assert len(dying.asked) + len(engine.asked) == 6
    by_teacher = result.counts["teacher_own"] + result.counts["teacher_other"]
    assert len(scored) == by_teacher


def test_an_answer_is_kept_for_other_jobs_window_by_window(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """Texts of every window are shared; another job asks nothing and starts no engine."""
    first, second = answered(), answered()
    config = two_teachers(models[1], 3)
    one = run(tmp_path / "a", models[0], SAMPLES, config, first, tmp_path / "cache")
    two = run(tmp_path / "b", models[0], SAMPLES, config, second, tmp_path / "cache")
    assert (first.sessions, second.sessions) == (2, 0)
    assert two.counts["answers_cached"] == one.counts["answered_offline"] == 6
    assert outputs(two) == outputs(one)


def padded(n: int) -> dict[str, Any]:
    """A sample of few tokens whose request is 30 kB."""
    body = {"model": "support", "messages": [{"role": "user", "content": str(n)}], "user": "lorem ip" * 3750}
    return sample(str(n), "yes") | {"request": json.dumps(body)}


def test_memory_is_that_of_a_window(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """200 samples of 30 kB, 10 at a time, all answered anew: Python holds less than a third of their requests
    at any time (all 200 in one window take three times of all).
    """
    collected = {"train": tmp_path / "train.parquet", "validation": tmp_path / "validation.parquet"}
    pq.write_table(pa.Table.from_pylist([padded(n) for n in range(200)]), collected["train"])
    pq.write_table(pa.Table.from_pylist([padded(0)]), collected["validation"])
    config = {"scheme": "text", "answer_tokens": 16, "answers": {"which": "all"}, "shard_rows": 10}
    engine, settings = EngineConfig(max_model_len=512), TeachConfig(**config, window=10)
    run(tmp_path / "imports", models[0], [sample("x", "y")], settings, answered())
    (tmp_path / "teach").mkdir()
    tracemalloc.start()
    try:
        result = teach.run(
            settings, engine, models[0], "d", collected, tmp_path / "teach",
            Progress(tmp_path / "progress.json"), str, answered(),
        )  # fmt: skip
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (result.counts["train"], result.counts["answered_offline"]) == (200, 201)
    assert peak < 200 * 30_000 / 3


def test_rows_are_sorted_in_the_memory_of_a_window(tmp_path: Path) -> None:
    """2,000 rows of 2 kB of token ids, 50 at a time, sorted and read twice: less than a fifth of them in
    memory at any time, and every figure about them is known before.
    """

    def windows() -> Iterator[tuple[list[Row], set[str]]]:
        for start in range(0, 2000, 50):
            ids = [np.full(500 - (n * 7919) % 97, n, np.int32) for n in range(start, start + 50)]
            names = ["a+b" if n % 2 else "a" for n in range(start, start + 50)]
            rows = [
                Row(f"{i[0]:05d}", i, len(i) - 3, i, name, dict(CARRIED))
                for i, name in zip(ids, names, strict=True)
            ]
            yield rows, {"weight"} if start == 300 else set()

    tracemalloc.start()
    try:
        made = sort_rows(windows(), tmp_path / "rows", 50)
        order = [(len(r.input_ids), int(r.input_ids[0])) for r in made]
        own = [int(r.input_ids[0]) for r in made.of("b")]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert order == sorted((500 - (n * 7919) % 97, n) for n in range(2000))
    assert own == [n for _, n in order if n % 2]
    assert (len(made), len(made.of("b")), made.most_teachers) == (2000, 1000, 2)
    assert (made.positions, made.scored) == (6000, 9000)
    assert next(iter(made)).carried == {"weight": 1.0}
    assert peak < 2000 * 2000 / 5
