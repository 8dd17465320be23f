"""augment by the window: what it writes and asks does not depend on how many samples it holds at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_jobs import augment, samples
from distill_jobs.augmenting import variants
from distill_jobs.augmenting.config import AugmentConfig
from distill_jobs.config import EngineConfig
from distill_jobs.progress import Progress
from distill_jobs.sorting import DictForm
from distill_jobs.stage import Result
from distill_jobs.teaching.ask import EngineVoice, Question, Sampling
from tests.unit.offline_engine import Killed, OfflineEngine
from tests.unit.test_augment import sample

THINGS = ("parcel", "invoice", "account", "password", "coupon")
TRAIN = [sample(f"Where is my {THINGS[n % 5]} number {n * 37}?", THINGS[n % 5]) for n in range(30)]
TRAIN += [sample("nobody answered this", None), dict(TRAIN[3])]
KINDS = {
    "paraphrase": {"per_sample": 2, "samples": 12},
    "expand": {"requests": 12, "each": 3, "shown": 2},
    "hard_negatives": {"requests": 6, "each": 2},
    "rationale": {"samples": 9},
}


def reply(text: str) -> str:
    """Lines that are new, known, kept apart, or like each other, by what was asked; steps for a rationale."""
    number = sum(text.encode()) % 23
    if "last line" in text:
        return f"It is number {number}.\nAnswer: {THINGS[number % 5]}"
    return "\n".join(
        [
            f"kindly look for the {THINGS[number % 5]} of order {number * 1013}",
            "how do I cancel my plan",  # validation
            TRAIN[number]["text"],
            f"a blue bicycle bell {number // 2}",
        ]
    )


class Words:
    """A tokenizer of sorts: a prompt's ids are the characters of its last message."""

    def prompt(self, request: Any, messages: list[dict[str, Any]]) -> list[int]:
        """The ids."""
        return [ord(c) for c in messages[-1]["content"]]


def answered(dies_after: int | None = None) -> OfflineEngine:
    """An engine that says something else to every prompt."""
    return OfflineEngine(lambda prompt: reply("".join(map(chr, prompt["ids"]))), dies_after)


def write_sides(folder: Path, train: Iterable[dict[str, Any]]) -> dict[str, Path]:
    """What collect left."""
    sides = {"train": list(train), "validation": [sample("how do I cancel my plan", "plan")]}
    paths = {name: folder / f"{name}.parquet" for name in sides}
    for name, rows in sides.items():
        pq.write_table(pa.Table.from_pylist(rows), paths[name])
    return paths


def run(folder: Path, engine: OfflineEngine, window: int, **more: Any) -> Result:
    """The stage over TRAIN."""
    (folder / "augment").mkdir(parents=True, exist_ok=True)
    held = folder / "held.txt"
    held.write_text("a blue bicycle bell 3\n")
    voice = EngineVoice(Path("teacher"), EngineConfig(max_model_len=4096), Words(), "augment", engine)  # type: ignore[arg-type]
    config = AugmentConfig(**KINDS | more, window=window)
    sides = write_sides(folder, TRAIN)
    return augment.run(config, voice, sides, [held], folder / "augment", Progress(folder / "progress.json"))


@pytest.mark.parametrize("more", [{}, {"max_new": 7}, {"near_duplicates": None}])
def test_a_window_changes_nothing(tmp_path: Path, more: dict[str, Any]) -> None:
    """Windows of 1, of 7 and of everything: the same file byte for byte, counts and questions, and one
    session of the engine for variants and one for rationales.
    """
    found = {}
    for window in (1, 7, 1000):
        engine = answered()
        result = run(tmp_path / str(window), engine, window, **more)
        data = Path(result.outputs["train"].path).read_bytes()
        found[window] = (data, result.counts, engine.asked, engine.sessions)
        left = sorted(p.name for p in (tmp_path / str(window) / "augment").iterdir())
        assert left == ["rationales", "train.parquet", "variants"]
    assert found[1] == found[7] == found[1000]
    _, counts, asked, sessions = found[7]
    assert (sessions, len(asked), counts["asked"]) == (2, 12 + 4 + 3 + 9, 19)
    drops = ("like_held_out", "like_logged", "like_each_other")
    kept = sum(counts[kind] for kind in ("paraphrase", "expansion", "hard_negative"))
    assert counts["written"] == kept + counts["over_max_new"] + sum(counts[name] for name in drops)
    assert all(counts[name] > 0 for name in drops)
    assert counts["train"] == 32 + kept + counts["rationale"]
    assert kept == 7 if more.get("max_new") else kept > 7


def test_killed_while_it_asks_it_goes_on(tmp_path: Path) -> None:
    """Between variants, between rationales, and while it writes: every question is asked once, an engine
    that has nothing to do is not started, and the end is that of an undisturbed run.
    """
    whole = run(tmp_path / "whole", answered(), 7)
    at, asked = tmp_path / "killed", []
    for answers in (5, 18):  # 19 variants and 9 rationales in all
        engine = answered(dies_after=answers)
        with pytest.raises(Killed):
            run(at, engine, 4)
        asked += engine.asked
    last = answered()
    result = run(at, last, 3)
    assert (last.sessions, len({*asked, *last.asked}), len(asked + last.asked)) == (1, 28, 28)
    again = answered()
    (at / "augment" / "train.parquet").unlink()
    assert run(at, again, 3).counts == result.counts == whole.counts
    assert again.sessions == 0
    assert (
        Path(result.outputs["train"].path).read_bytes()
        == (tmp_path / "whole/augment/train.parquet").read_bytes()
    )


class Alive(dict[str, Any]):
    """A sample that is counted while anybody holds it."""

    now = most = 0

    def __init__(self, sample: dict[str, Any]) -> None:
        super().__init__(sample)
        Alive.now += 1
        Alive.most = max(Alive.most, Alive.now)

    def __del__(self) -> None:
        Alive.now -= 1


class Echo:
    """Writes a new request for each question, and no steps."""

    def ask(self, questions: Iterable[Question], sampling: Sampling, folder: Path) -> dict[str, list[str]]:
        """One line each."""
        return {q.id: [f"number {n} is a new one {n * n}"] for n, q in enumerate(questions)}


def test_few_samples_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 samples, 20 at a time, each of them asked about twice and each given a variant: of these 2,000
    read again and again fewer than 700 are held at any time, most of them by readers of 256.
    """
    plain, unpack, made = samples.windows, DictForm.unpack, variants.new_samples

    def windows(path: Path, size: int, columns: Sequence[str] | None = None) -> Iterator[list[Any]]:
        for window in plain(path, size, columns):
            yield [Alive(s) for s in window]

    monkeypatch.setattr(samples, "windows", windows)
    monkeypatch.setattr(DictForm, "unpack", lambda self, batch: [Alive(s) for s in unpack(self, batch)])
    monkeypatch.setattr(augment, "new_samples", lambda *args: (Alive(s) for s in made(*args)))
    collected = write_sides(tmp_path, (sample(f"question {n}", "y") for n in range(1000)))
    config = AugmentConfig(paraphrase={}, rationale={}, window=20, near_duplicates=None)
    progress = Progress(tmp_path / "progress.json")
    result = augment.run(config, Echo(), collected, [], tmp_path, progress)  # type: ignore[arg-type]
    assert (result.counts["train"], result.counts["paraphrase"]) == (2000, 1000)
    assert result.counts["rationale_unreadable"] == 1000
    assert 256 <= Alive.most < 700
