"""Reading a route's log: every row once, whatever happens to the files, and what the samples then say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from contracts.config import parse_config
from distill_jobs.collecting.window import place
from distill_jobs.config import CollectConfig
from distill_jobs.flywheel.config import RouteConfig
from distill_jobs.flywheel.due import Observation
from distill_jobs.flywheel.store import Store, Watch
from distill_jobs.flywheel.watch import Watcher
from tests.integration.pipeline_world import WORDS, log_row

OTHER_WORDS = ["solar", "wind", "turbine", "panel", "grid", "meter", "tariff", "inverter", "heat", "pump"]


def row(number: int, words: list[str] = WORDS, **changes: Any) -> dict[str, Any]:
    """A logged request of random words, by its number."""
    text = " ".join(random.Random(number).choices(words, k=8))
    return log_row(number, {"model": "support", "messages": [{"role": "user", "content": text}]}, **changes)


def feedback(number: int, good: bool | None = None, **changes: Any) -> dict[str, Any]:
    """A judgement of request `number`."""
    said = {"id": f"f{number}", "request_id": f"r{number:05d}", "ts": 1.0, "good": good, "route": "support"}
    return said | {"arm": "stable", "split_version": 1, "log_mode": "full"} | changes


class Log:
    """A folder of logs and the watcher over it."""

    def __init__(self, root: Path, triggers: dict[str, Any], **route: Any) -> None:
        self.folder = root / "logs"
        self.folder.mkdir()
        self.store = Store(root / "flywheel")
        self.store.know_routes(["support"], 0.0)
        self.config = parse_config({"distill": "d.yaml", "triggers": triggers} | route, RouteConfig)
        self.collect: dict[str, Any] = CollectConfig(
            log_dir=self.folder, route="support", upstreams=("teacher",)
        ).model_dump(mode="json")
        self.watcher = self.again()

    def again(self) -> Watcher:
        """The watcher of a daemon that was started anew."""
        return Watcher(self.store, "support", self.config, place(str(self.folder)), self.collect)

    def write(self, name: str, rows: list[dict[str, Any]], tail: str = "") -> Path:
        """Append rows to a file."""
        file = self.folder / name
        with file.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps(r) + "\n" for r in rows) + tail)
        return file

    def read(self, limit: int = 1 << 30) -> Watch:
        """Read what is new."""
        return self.watcher.read(limit)

    def look(self) -> Observation:
        """Read and look."""
        self.read()
        return self.watcher.look()

    def train(self, trained: bool = True) -> None:
        """A run that sees everything logged so far, and ends in a student (or a refusal)."""
        with self.store.transaction() as db:
            mark = self.watcher.pin(db, None)
        with self.store.transaction() as db:
            self.watcher.answered(db, mark, trained)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Looks at drift after 100 conversations, at feedback after ten judgements."""
    triggers = {
        "drift": {"units": 200, "min_units": 100},
        "feedback": {"bad_share": 0.2, "min_judgements": 10},
    }
    return Log(tmp_path, triggers)


def test_rows_are_counted_by_what_collect_would_keep(log: Log) -> None:
    """Another route's, a student's, a failed and a shadow's row are no training data; malformed lines
    nothing.
    """
    rows = [row(n) for n in range(10)]
    rows += [row(10, route="other"), row(11, upstream="student"), row(12, outcome="timeout")]
    rows += [row(13, arm="shadow", reason="shadow")]
    log.write("requests-1.jsonl", rows, tail='{"not": "a row"}\n\xff\n')
    now = log.read().now
    assert (now.usable, now.seen) == (10, 12)


def test_every_row_is_counted_once_while_a_segment_grows_and_is_closed(log: Log) -> None:
    """An unfinished line waits for its end; the rename of an open segment changes nothing; a new daemon goes
    on where the old one was.
    """
    whole = json.dumps(row(2))
    file = log.write("requests-1.open.jsonl", [row(0), row(1)], tail=whole[:40])
    assert log.read().now.usable == 2
    assert log.read().now.usable == 2
    log.write("requests-1.open.jsonl", [], tail=whole[40:] + "\n")
    log.watcher = log.again()
    assert log.read().now.usable == 3
    file.rename(log.folder / "requests-1.jsonl")
    assert log.read().now.usable == 3
    log.write("requests-2.jsonl", [row(3)])
    assert log.read().now.usable == 4


def test_an_erasure_counts_nothing_again_and_a_vanished_segment_breaks_nothing(log: Log) -> None:
    """A segment that was rewritten shorter was read already; one that expired is gone."""
    file = log.write("requests-1.jsonl", [row(n) for n in range(5)])
    log.write("requests-2.jsonl", [row(9)])
    assert log.read().now.usable == 6
    file.write_text("".join(json.dumps(row(n)) + "\n" for n in (0, 4)))
    assert log.read().now.usable == 6
    file.unlink()
    assert log.read().now.usable == 6


def test_a_long_log_is_caught_up_with_in_pieces(log: Log) -> None:
    """Nothing is decided before everything is read; a line longer than a piece is read whole."""
    log.write("requests-1.jsonl", [row(n) for n in range(50)])
    looks = 0
    while not (watch := log.read(limit=4000)).caught_up:
        looks += 1
    assert looks > 5
    assert watch.now.usable == 50
    big = row(50)
    big["request"]["messages"][0]["content"] = "x " * 10_000
    log.write("requests-2.jsonl", [big])
    log.read(limit=500)
    assert log.read(limit=500).now.usable == 51


def test_a_log_that_is_a_url_is_read_the_same_way(log: Log) -> None:
    """Routers upload closed segments; fsspec's memory stands in for a bucket."""
    import fsspec

    fs = fsspec.filesystem("memory")
    lines = "".join(json.dumps(row(n)) + "\n" for n in range(7))
    fs.pipe("/flywheel-watch/requests-1.jsonl", lines.encode())
    try:
        watcher = Watcher(log.store, "support", log.config, place("memory://flywheel-watch"), log.collect)
        assert watcher.read(1 << 20).now.usable == 7
        assert watcher.read(1 << 20).now.usable == 7
    finally:
        fs.rm("/flywheel-watch", recursive=True)


def test_a_run_that_ended_well_makes_its_rows_old_and_later_ones_new(log: Log) -> None:
    """Rows that came while it worked are new still."""
    log.write("requests-1.jsonl", [row(n) for n in range(30)])
    assert log.look().rows == 30
    with log.store.transaction() as db:
        mark = log.watcher.pin(db, None)
    log.write("requests-2.jsonl", [row(n) for n in range(30, 34)])
    log.read()
    with log.store.transaction() as db:
        log.watcher.answered(db, mark, trained=True)
    assert log.look().rows == 4


def test_new_topics_are_drift_and_the_next_student_answers_it(log: Log) -> None:
    """Against the last training window; once a run has seen the new topics, they are the reference. Before
    the first run there is nothing to drift from.
    """
    log.write("requests-1.jsonl", [row(n) for n in range(300)])
    assert log.look().looks == ()
    log.train()
    log.write("requests-2.jsonl", [row(n) for n in range(300, 450)])
    assert log.look().looks == ()
    log.write("requests-3.jsonl", [row(n, OTHER_WORDS) for n in range(450, 700)])
    (found,) = log.look().looks
    assert (found.kind, found.fired) == ("words", True)
    assert log.look().looks == (found,), "it stays until a run answers it"
    log.train(trained=False)
    assert log.look().looks == (), "a refusal answers it"
    log.write("requests-4.jsonl", [row(n, OTHER_WORDS) for n in range(700, 800)])
    assert log.look().looks[0].fired, "but the window of a student that was refused is nobody's"
    log.train()
    assert log.look().looks == ()
    stored = log.store.route("support").watch
    assert stored.looks == {}


def test_a_conversation_is_one_observation(log: Log) -> None:
    """One person's thousand turns are no drift: they are one unit."""
    log.write("requests-1.jsonl", [row(n) for n in range(300)])
    log.read()
    log.train()
    same = {"unit_kind": "header", "unit_hash": "a" * 16}
    log.write("requests-2.jsonl", [row(n, OTHER_WORDS, **same) for n in range(300, 1300)])
    assert log.look().looks == ()
    assert log.read().now.units - log.read().base.units == 1


def test_samples_keep_no_text_and_stay_small(log: Log, tmp_path: Path) -> None:
    """Hashes of words only, however long the log is."""
    log.write("requests-1.jsonl", [row(n) for n in range(1000)])
    log.read()
    held = log.store.query("SELECT role, count(*) FROM units GROUP BY role ORDER BY role", ())
    assert [tuple(r) for r in held] == [("recent", 200), ("window", 200)]
    log.store.query("PRAGMA wal_checkpoint(TRUNCATE)", ())
    assert b"password" not in (tmp_path / "flywheel" / "flywheel.db").read_bytes()


def test_a_students_grades_that_fall_are_found(log: Log) -> None:
    """Its first grades are the reference; the teacher's own answers don't count, and another student's grades
    are another's.
    """

    def graded(n: int, score: float, digest: str | None = "s1") -> dict[str, Any]:
        return row(n, digest=digest, scores={"grade": score})

    log.write("requests-1.jsonl", [graded(n, 1.0) for n in range(400)])
    assert log.look().looks == ()
    log.write("requests-2.jsonl", [graded(n, 0.0, None) for n in range(400, 600)])
    assert log.look().looks == ()
    log.write("requests-3.jsonl", [graded(n, float(n % 2)) for n in range(600, 900)])
    (found,) = log.look().looks
    assert (found.kind, found.fired) == ("grades", True)
    assert found.value == pytest.approx(0.5, abs=0.05)


def test_bad_feedback_is_judged_by_its_lower_bound_and_each_judgement_once(log: Log) -> None:
    """Three bad of ten are 10.8 % at least at 97.5 %: not over 20 %; ten more bad ones are. A judgement that
    is sent again, or changed, counts once.
    """
    log.write("requests-1.jsonl", [row(n) for n in range(50)])
    log.write("feedback-1.jsonl", [feedback(n, good=n >= 3) for n in range(10)])
    log.write("feedback-1.jsonl", [feedback(n, good=n >= 3) for n in range(10)])
    seen = log.look()
    assert (seen.judged, seen.bad, seen.looks) == (10, 3, ())
    (look,) = log.store.route("support").watch.last
    assert look.value == pytest.approx(0.1078, abs=1e-3)
    log.write("feedback-2.jsonl", [feedback(n, good=False) for n in range(10, 20)])
    log.write("feedback-2.jsonl", [feedback(20, score=0.2), feedback(21, good=False, route="other")])
    seen = log.look()
    assert (seen.judged, seen.bad) == (21, 14)
    assert [found.kind for found in seen.looks] == ["feedback"]
    log.train()
    assert (log.look().judged, log.look().looks) == (0, ())
