"""The request log: whole rows, atomic segments, nothing lost on a clean stop and little on a kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contracts.grading import FunctionGrader
from contracts.traffic import Arm, LogMode, Outcome, Reason, RequestRow, UnitKind
from serve.grading.graders import NamedGrader
from serve.request_log import RequestLog, SegmentWriter, recover


def row(number: int, text: str | None = "answer", outcome: Outcome = Outcome.OK) -> RequestRow:
    return RequestRow(
        request_id=f"r{number}", ts=1.0, route="support", endpoint="/v1/chat/completions", arm=Arm.STABLE,
        served_arm=Arm.STABLE, reason=Reason.RANDOM, unit_kind=UnitKind.HEADER, unit_hash="0" * 16,
        split_version=1, upstream="teacher", model="big", stream=False, status=200, outcome=outcome,
        e2e_s=0.1, overhead_s=0.0, request={"n": number}, response_text=text,
    )  # fmt: skip


class Drafted:
    def __init__(self, made: RequestRow, mode: LogMode = LogMode.FULL) -> None:
        self.made = made
        self.mode = mode

    def build(self) -> RequestRow:
        return self.made

    def log_mode(self) -> LogMode:
        return self.mode

    def size(self) -> int:
        return len(self.made.model_dump_json())


class Hooks:
    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def graded(self, draft: Any, grader: str, score: float) -> None:
        self.seen[f"{grader} {score:g}"] += 1

    def ungraded(self, grader: str, reason: str) -> None:
        self.seen[f"{grader} {reason}"] += 1

    def answered(self, draft: Any, row: RequestRow) -> None:
        self.seen["answered"] += 1

    def written(self, rows: int) -> None:
        self.seen["written"] += rows

    def dropped(self, rows: int) -> None:
        self.seen["dropped"] += rows

    def unredacted(self) -> None:
        self.seen["unredacted"] += 1


def by(score: Callable[[dict[str, Any], str], Any], name: str = "grade", **fields: Any) -> NamedGrader:
    """A grader of any function."""
    spec = FunctionGrader.model_validate({"kind": "function", "function": "any:thing", **fields})
    return NamedGrader(name, spec, score)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    lines = [line for f in sorted(folder.glob("*.jsonl")) for line in f.read_bytes().splitlines()]
    return [json.loads(line) for line in lines]


def opened(folder: Path, rotate_bytes: int = 10**9, **options: Any) -> tuple[RequestLog, Hooks]:
    hooks = Hooks()
    log = RequestLog(
        SegmentWriter(folder, "h-1-ab", rotate_bytes, 3600), hooks, options.pop("bound", 1000), **options
    )
    log.start()
    return log, hooks


def test_a_clean_stop_writes_everything(tmp_path: Path) -> None:
    """Every accepted row is in a final segment after close, in order, and no open segment is left."""
    log, hooks = opened(tmp_path)
    assert all(log.submit(Drafted(row(i))) for i in range(500))
    assert log.close()
    assert [r["request"]["n"] for r in rows_in(tmp_path)] == list(range(500))
    assert not list(tmp_path.glob("*.open.jsonl"))
    assert hooks.seen["written"] == 500


async def test_small_rows_are_built_on_the_event_loop(tmp_path: Path) -> None:
    """A thread would fight the loop for the interpreter; redacted and large ones are still the thread's."""
    built: list[tuple[str, int]] = []

    class Watched(Drafted):
        def build(self) -> RequestRow:
            built.append((threading.current_thread().name, self.made.request["n"]))
            return self.made

    big = row(2).model_copy(update={"request": {"n": 2, "text": "x" * 70_000}})
    log = RequestLog(SegmentWriter(tmp_path, "h-1-ab", 10**9, 3600), Hooks(), 1000)
    log.start(asyncio.get_running_loop())
    for draft in (Watched(row(1)), Watched(big), Watched(row(3), LogMode.REDACTED), Watched(row(4))):
        log.submit(draft)
    while len(built) < 4:
        await asyncio.sleep(0.01)
    assert await asyncio.to_thread(log.close)
    here, thread = threading.current_thread().name, "request-log-build"
    assert sorted(built, key=lambda one: one[1]) == [(here, 1), (thread, 2), (thread, 3), (here, 4)]
    assert sorted(r["request"]["n"] for r in rows_in(tmp_path)) == [1, 2, 3, 4]


async def test_stopping_builds_what_the_event_loop_did_not(tmp_path: Path) -> None:
    """Nothing is lost between the loop that stops building and the thread that takes over."""
    hooks = Hooks()
    log = RequestLog(SegmentWriter(tmp_path, "h-1-ab", 10**9, 3600), hooks, 100_000)
    log.start(asyncio.get_running_loop())
    for number in range(3000):
        log.submit(Drafted(row(number)))
    await asyncio.sleep(0.06)
    assert await asyncio.to_thread(log.close)
    assert sorted(r["request"]["n"] for r in rows_in(tmp_path)) == list(range(3000))
    assert hooks.seen["written"] == 3000


def test_integers_of_any_size_are_logged(tmp_path: Path) -> None:
    """The fast writer refuses more than 64 bits; the row is written all the same."""
    log, _ = opened(tmp_path)
    log.submit(Drafted(row(0).model_copy(update={"request": {"n": 0, "seed": 2**80}})))
    assert log.close()
    assert rows_in(tmp_path)[0]["request"] == {"n": 0, "seed": 2**80}


def test_segments_rotate_by_size(tmp_path: Path) -> None:
    """Large logs become many final segments, each of whole rows."""
    log, _ = opened(tmp_path, rotate_bytes=2000)
    for i in range(30):
        log.submit(Drafted(row(i)))
        if i % 10 == 9:
            time.sleep(0.15)
    assert log.close()
    assert len(list(tmp_path.glob("requests-*.jsonl"))) >= 2
    assert sorted(r["request"]["n"] for r in rows_in(tmp_path)) == list(range(30))


def test_segments_rotate_by_age(tmp_path: Path) -> None:
    """A quiet log still hands its rows over: an old segment is closed without another row coming."""
    writer = SegmentWriter(tmp_path, "h-1-ab", 10**9, rotate_s=0.01)
    writer.append([b"{}\n"])
    time.sleep(0.02)
    writer.tick()
    assert [f.name.endswith("h-1-ab.jsonl") for f in tmp_path.iterdir()] == [True]


def test_a_full_queue_drops_and_counts_and_never_waits(tmp_path: Path) -> None:
    """A log that cannot keep up costs rows, not replies."""
    gate = threading.Event()
    log, hooks = opened(tmp_path, bound=10, graders=[by(lambda _request, _text: float(gate.wait(10)))])
    accepted = sum(log.submit(Drafted(row(i))) for i in range(50))
    gate.set()
    assert log.close()
    assert 10 <= accepted <= 11
    assert hooks.seen["dropped"] == 50 - accepted
    assert len(rows_in(tmp_path)) == accepted


def test_grades_are_logged_and_failures_of_the_grader_counted(tmp_path: Path) -> None:
    """A grader may score, abstain or crash; the row is written in every case, the other graders still run."""

    def grader(request: dict[str, Any], text: str) -> float | None:
        return {0: 1.0, 1: 0.25, 2: None}[request["n"]]

    log, hooks = opened(tmp_path, graders=[by(grader), by(lambda _request, _text: 0.0, "form")])
    for i in range(4):
        log.submit(Drafted(row(i)))
    log.submit(Drafted(row(0, text=None)))
    log.submit(Drafted(row(0, outcome=Outcome.UPSTREAM_ERROR)))
    assert log.close()
    form = {"form": 0.0}
    assert [r["scores"] for r in rows_in(tmp_path)] == [
        {"grade": 1.0, **form}, {"grade": 0.25, **form}, form, form, {}, {},
    ]  # fmt: skip
    assert hooks.seen == {
        "grade 1": 1, "grade 0.25": 1, "grade abstained": 1, "grade error": 1, "form 0": 4, "written": 6,
    }  # fmt: skip


def test_a_grader_sees_its_routes_and_its_sample(tmp_path: Path) -> None:
    """One for another route is never called; a share is a share of the requests, the same at every run."""

    def never(request: dict[str, Any], text: str) -> float:
        raise AssertionError("called")

    half = by(lambda _request, _text: 1.0, "half", sample=0.5)
    graded = []
    for name in ("a", "b"):
        log, hooks = opened(tmp_path / name, graders=[by(never, routes=("other",)), half])
        for i in range(400):
            log.submit(Drafted(row(i)))
        assert log.close()
        graded.append([r["request_id"] for r in rows_in(tmp_path / name) if r["scores"]])
        assert hooks.seen == {"written": 400, "half 1": len(graded[-1])}
    assert graded[0] == graded[1]
    assert 150 < len(graded[0]) < 250


def test_who_wants_answers_is_shown_them_whatever_is_logged(tmp_path: Path) -> None:
    """A judge needs the text of a request that is not logged; failures have none."""
    log, hooks = opened(tmp_path, wants_answers=True)
    log.submit(Drafted(row(1), LogMode.OFF))
    log.submit(Drafted(row(2), LogMode.METADATA))
    log.submit(Drafted(row(3, text=None)))
    assert log.close()
    assert hooks.seen == {"answered": 2, "written": 2}


def test_a_draft_that_cannot_be_built_costs_itself_only(tmp_path: Path) -> None:
    """One odd request must not end the log."""

    class Odd:
        def build(self) -> RequestRow:
            raise ValueError("odd")

        def log_mode(self) -> LogMode:
            return LogMode.FULL

    log, hooks = opened(tmp_path)
    log.submit(Odd())
    log.submit(Drafted(row(1)))
    assert log.close()
    assert [r["request"]["n"] for r in rows_in(tmp_path)] == [1]
    assert hooks.seen["dropped"] == 1


def test_an_unwritable_folder_is_counted_not_raised(tmp_path: Path) -> None:
    """A disk that refuses costs rows and says so; the router lives on."""
    (tmp_path / "file").write_text("not a folder")
    log, hooks = opened(tmp_path / "file" / "log")
    assert log.submit(Drafted(row(1)))
    assert log.close()
    assert hooks.seen["dropped"] == 1


_CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests/unit")
from tests.unit.test_request_log import Drafted, Hooks, row
from serve.request_log import RequestLog, SegmentWriter
import os
log = RequestLog(SegmentWriter(Path(sys.argv[1]), f"host-{os.getpid()}-ab", 10**9, 3600), Hooks(), 10**6)
log.start()
for i in range(10**6):
    log.submit(Drafted(row(i, text="x" * (i % 300))))
    if i % 20 == 0:
        print(i, time.time(), flush=True)
        time.sleep(0.002)
"""


def test_sigkill_loses_at_most_a_second_and_tears_no_row(tmp_path: Path) -> None:
    """A killed process leaves whole rows, all but its last second, and the next one recovers them."""
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    submitted: list[tuple[int, float]] = []
    for line in child.stdout:
        number, at = line.split()
        submitted.append((int(number), float(at)))
        if number == "3000":
            break
    os.kill(child.pid, signal.SIGKILL)
    killed_at = time.time()
    child.stdout.close()
    child.wait(10)
    (orphan,) = tmp_path.glob("*.open.jsonl")
    with orphan.open("ab") as file:
        file.write(b'{"request_id": "torn by a power cut')
    assert [f.name for f in recover(tmp_path, "host")] == [orphan.name.replace(".open", "")]
    numbers = [r["request"]["n"] for r in rows_in(tmp_path)]
    assert numbers == list(range(len(numbers)))
    safe = max((n for n, at in submitted if at < killed_at - 1.0), default=0)
    assert numbers[-1] >= safe
    assert recover(tmp_path, "host") == []


def test_recovery_leaves_the_living_and_other_hosts_alone(tmp_path: Path) -> None:
    """Segments of running processes, and of other machines on the same folder, are not ours to close."""
    names = [
        f"requests-20260101T000000.0Z-{h}-{p}-ab.open.jsonl"
        for h, p in (("host", os.getpid()), ("other", 1 << 22))
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"{}\n")
    (tmp_path / f"requests-20260101T000000.0Z-host-{(1 << 22) + 1}-ab.open.jsonl").write_bytes(b"torn")
    assert recover(tmp_path, "host") == []
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(names)
