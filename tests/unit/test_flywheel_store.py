"""The flywheel's memory and its commands: one run a route, transitions that race, and death at any line."""

from __future__ import annotations

import gc
import json
import os
import random
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from typer.testing import CliRunner

from contracts.config import load_config
from contracts.errors import ConfigError, ConflictError, NotFoundError, StateError
from distill_jobs.flywheel.admit import State
from distill_jobs.flywheel.cli import app
from distill_jobs.flywheel.config import FlywheelConfig
from distill_jobs.flywheel.daemon import Daemon
from distill_jobs.flywheel.metrics import TEXTFILE, FlywheelMetrics
from distill_jobs.flywheel.pressure import Pressure
from distill_jobs.flywheel.store import Mark, Run, Store
from tests.integration.flywheel_world import write_flywheel

ROOT = Path(__file__).resolve().parents[2]
ACTING = ("runner.py", "store.py", "watch.py", "processes.py", "hooks.py", "job.py", "daemon.py")
POINTS = int(os.environ.get("STILLHOUSE_KILL_POINTS", "8"))
"""Lines at which the daemon dies."""


class Killed(BaseException):
    """SIGKILL, as nearly as one process can have it: nothing after this line happens."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store that watches one route."""
    made = Store(tmp_path)
    made.know_routes(["support"], 1.0)
    return made


def queued(store: Store, tmp_path: Path, now: float = 1.0) -> Run:
    """A run in the queue."""
    return store.queue("support", "rows", "enough", tmp_path, "20261126", "/", now)


def test_what_alerts_need_is_exported(tmp_path: Path) -> None:
    """How old the active run is, 0 without one; the day's bounds, as far as there are any."""
    path = write_flywheel(tmp_path / "world", budget={"hours_per_day": 8.0})
    config = load_config(path, FlywheelConfig)
    config.dir.mkdir(parents=True, exist_ok=True)
    store = Store(tmp_path)
    store.know_routes(["support"], 1.0)
    metrics = FlywheelMetrics(config, store)
    metrics.write(100.0, Pressure(active=False))
    text = (config.dir / TEXTFILE).read_text()
    assert 'stillhouse_flywheel_run_age_seconds{route="support"} 0.0' in text
    assert 'stillhouse_flywheel_budget{resource="hours"} 8.0' in text
    assert 'teacher_tokens"}' not in text
    queued(store, tmp_path, now=40.0)
    metrics.write(100.0, Pressure(active=False))
    text = (config.dir / TEXTFILE).read_text()
    assert 'stillhouse_flywheel_run_age_seconds{route="support"} 60.0' in text


def test_a_route_has_one_active_run_and_the_database_says_so(store: Store, tmp_path: Path) -> None:
    """Not a habit of the daemon: a second row is refused, through the store and behind its back."""
    first = queued(store, tmp_path)
    assert (first.name, first.workdir) == ("support/20261126-1", str(tmp_path / "support/20261126-1"))
    with pytest.raises(ConflictError, match="active run"):
        queued(store, tmp_path)
    for state in ("queued", "running", "stopped", "ending"):
        with sqlite3.connect(tmp_path / "flywheel.db") as other, pytest.raises(sqlite3.IntegrityError):
            other.execute(
                "INSERT INTO runs (route, name, trigger, reason, state, workdir, cwd, queued_at)"
                f" VALUES ('support', 'x', '', '', '{state}', '', '', 0)"
            )
    store.move(first, State.CANCELLED, "no", 2.0)
    assert queued(store, tmp_path).name == "support/20261126-2"


def test_a_transition_from_a_state_that_is_over_is_refused(store: Store, tmp_path: Path) -> None:
    """Two who read the same run: the second's write changes nothing, and leaves no event."""
    run = queued(store, tmp_path)
    store.move(run, State.RUNNING, "started", 2.0, attempt=1)
    with pytest.raises(ConflictError, match="no longer queued"):
        store.move(run, State.CANCELLED, "late", 3.0)
    assert [(was, state) for _, was, state, _ in store.events(run)] == [
        (None, "queued"),
        ("queued", "running"),
    ]
    assert store.run(run.id).attempt == 1


def test_working_time_is_counted_by_the_hour_and_the_day_forgets(store: Store, tmp_path: Path) -> None:
    """Stopped time is left out; the time while no daemon looked counts; after a day it is spent no more."""
    run = store.move(queued(store, tmp_path), State.RUNNING, "", 1000.0, seen_at=1000.0)
    store.worked(run, 1600.0, counts=True)
    run = store.run(run.id)
    store.worked(run, 2600.0, counts=False)
    run = store.run(run.id)
    store.worked(run, 3000.0, counts=True)
    store.note(run, tokens=70)
    assert store.run(run.id).worked_s == 1000.0
    assert store.spent(3000.0) == (1000.0, 70)
    store.move(store.run(run.id), State.FAILED, "", 3000.0, ended_at=3000.0)
    assert store.spent(3000.0 + 26 * 3600) == (0.0, 0)


def test_requests_are_refused_when_they_make_no_sense(store: Store, tmp_path: Path) -> None:
    """An unknown route or run is answered with what there is; a second run with the one that is active."""
    with pytest.raises(NotFoundError, match="Routes: support"):
        store.request("nobody", "ann")
    run = queued(store, tmp_path)
    with pytest.raises(ConflictError, match="20261126-1 of route 'support' is queued"):
        store.request("support", "ann")
    assert store.find("support/20261126-1") == store.find("1") == run
    with pytest.raises(NotFoundError, match="no run 'x'"):
        store.find("x")
    store.move(run, State.PUBLISHED, "", 2.0)
    with pytest.raises(ConflictError, match="it is published"):
        store.cancel(run, "ann")


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    """Neither a text file nor another version's database is written to."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "flywheel.db").write_text("no database, but long enough to be looked at " * 100)
    with pytest.raises(StateError, match="cannot be used"):
        Store(tmp_path / "a")
    Store(tmp_path / "b").close()
    with sqlite3.connect(tmp_path / "b" / "flywheel.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StateError, match="schema 99"):
        Store(tmp_path / "b")


def _tick(daemon: Daemon) -> None:
    daemon.tick(time.time())


def _until_published(daemon: Daemon, tick: Callable[[Daemon], None] = _tick) -> None:
    deadline = time.monotonic() + 60
    while not any(run.state is State.PUBLISHED and run.hook == "done" for run in daemon.store.latest(5)):
        assert time.monotonic() < deadline, daemon.store.latest(5)
        tick(daemon)
        time.sleep(0.02)


def _start(file: Path) -> Daemon:
    daemon = Daemon(load_config(file, FlywheelConfig))
    daemon.store.know_routes(["support"], time.time())
    daemon._runner.adopt(time.time())
    return daemon


def _life(file: Path, die_at: tuple[str, int] | None) -> list[tuple[str, int]]:
    """Daemons until the student is published; the first one dies when it comes to the line `die_at`. Returns
    the lines of the acting part that the first one lived, each once.
    """
    lived: dict[tuple[str, int], None] = {}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.parent.name != "flywheel" or path.name not in ACTING:
            return None
        if event == "line":
            line = (path.name, frame.f_lineno)
            lived[line] = None
            if line == die_at:
                raise Killed
        return trace

    sys.settrace(trace)
    try:
        _until_published(_start(file))
    except Killed as killed:
        sys.settrace(None)
        traceback.clear_frames(killed.__traceback__)  # a dead process has no open transaction
        gc.collect()
        _until_published(_start(file))
    finally:
        sys.settrace(None)
    return list(lived)


def test_a_daemon_that_dies_at_any_line_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    """Whatever line is its last: the next daemon ends the same run, which was begun once and published once,
    and its rows are old for the next decision. (STILLHOUSE_KILL_POINTS=1000 tries every line.)
    """
    lines = _life(write_flywheel(tmp_path / "whole"), None)
    assert len(lines) > 200
    for number, line in enumerate(random.Random(5).sample(lines, min(POINTS, len(lines)))):
        root = tmp_path / str(number)
        _life(write_flywheel(root), line)
        store = Store(root / "flywheel")
        (run,) = store.latest(10)
        assert (run.state, run.ref, run.attempt) == (State.PUBLISHED, "support-student:1", 1), line
        work = Path(run.workdir)
        assert (work / "begun").read_text().splitlines() == ["1"], line
        assert not (work / "overlap").exists(), line
        watch = store.route("support").watch
        assert (watch.now.usable, watch.base.usable) == (60, 60), line
        assert set((root / "hooked").read_text().split()) == {"support", "support-student:1"}, line
        store.close()


def test_commands_leave_requests_and_status_shows_them(tmp_path: Path) -> None:
    """trigger, cancel, pause and resume reach the daemon; status tells them apart for people and machines."""
    file = write_flywheel(tmp_path, rows=10)
    daemon = _start(file)
    use = CliRunner()

    def said(*words: str) -> str:
        done = use.invoke(app, [*words, "--config", str(file)])
        assert done.exit_code == 0, done.output
        return done.output

    _tick(daemon)
    facts = json.loads(said("status", "--json"))
    assert facts["routes"][0]["says"] == "10 of 50 new rows; nothing fired"
    assert facts["runs"] == []
    assert "Paused: all routes" in said("pause")
    assert "asked for" in said("trigger", "support")
    _tick(daemon)
    (run,) = json.loads(said("status", "--json"))["runs"]
    assert (run["state"], run["trigger"], run["name"][:8]) == ("queued", "manual", "support/")
    said("cancel", run["name"])
    _tick(daemon)
    said("resume", "support")
    table = said("status")
    assert "cancelled" in table
    assert "paused" not in table
    refused = use.invoke(app, ["trigger", "nobody", "--config", str(file)])
    assert isinstance(refused.exception, NotFoundError)


def test_a_mistake_in_a_routes_distillation_is_told_at_the_start(tmp_path: Path) -> None:
    """Not at night, when the first run is due."""
    file = write_flywheel(tmp_path)
    broken = json.loads(file.read_text())
    broken["routes"]["support"]["overrides"] = {"train.epoch": 1}
    file.write_text(json.dumps(broken))
    with pytest.raises(ConfigError, match=r"routes.support.distill: (?s:.*)train.epoch"):
        Daemon(load_config(file, FlywheelConfig))


def test_importing_the_commands_loads_nothing_heavy() -> None:
    """--help answers at once."""
    import subprocess

    code = (
        "import sys, distill_jobs.flywheel.cli, distill_jobs.flywheel.config\n"
        "print([m for m in ('torch', 'ray', 'numpy', 'pyarrow', 'mlflow', 'psutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_marks_are_kept_with_their_run(store: Store, tmp_path: Path) -> None:
    """What a run has seen is read back as it was stored."""
    mark = Mark(seen=5, usable=4, units=3, judged=2)
    run = store.note(queued(store, tmp_path), mark=mark.model_dump_json())
    assert store.run(run.id).mark == mark
