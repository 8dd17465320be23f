"""The flywheel as people run it: a daemon in a process of its own, killed, steered and under pressure.

Its runs are a script with steps (flywheel_world.py); the pipeline itself is killed in test_pipeline_real.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill_jobs.flywheel.admit import State
from distill_jobs.flywheel.store import Run, Store
from tests.integration.flywheel_world import write_flywheel
from tests.integration.pipeline_world import write_logs

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0


class Flywheel:
    """A world and the daemon that works in it."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.root = root
        self.file = write_flywheel(root, **changes)
        self.store = Store(root / "flywheel")
        self.daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """`stillhouse flywheel run`."""
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "cli.main", "flywheel", "run", str(self.file)]
        with (self.root / "daemon.log").open("ab") as log:
            self.daemon = subprocess.Popen(command, cwd=self.root, env=env, stdout=log, stderr=log)
        return self.daemon

    def kill(self) -> None:
        """SIGKILL to the daemon alone."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def until(self, what: str, happened: Callable[[], object]) -> None:
        """Wait for something, with the daemon's log in hand when it does not happen."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < deadline, f"{what} did not happen:\n{self.said()}"
            time.sleep(0.02)

    def until_state(self, *states: State) -> Run:
        """Wait until the latest run is in one of the states."""
        self.until(f"state {states}", lambda: (run := self.run()) is not None and run.state in states)
        run = self.run()
        assert run is not None
        return run

    def run(self) -> Run | None:
        """The latest run."""
        return next(iter(self.store.latest(1)), None)

    def work(self, pattern: str) -> list[Path]:
        """Files in the run's workdir."""
        run = self.run()
        return [] if run is None else sorted(Path(run.workdir).glob(pattern))

    def at_work(self, steps: int) -> Run:
        """Wait until a run has done some steps; its launcher's process is known by then."""
        self.until(f"{steps} steps", lambda: len(self.work("step-*")) >= steps)
        self.until("its pid", lambda: (run := self.run()) is not None and run.pid is not None)
        return self.until_state(State.RUNNING)

    def let_end(self) -> None:
        """Runs that have done their steps may end."""
        (self.root / "hold").unlink()

    def said(self) -> str:
        """The end of the daemon's log."""
        return (self.root / "daemon.log").read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """End everything that was started."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.terminate()
            self.daemon.wait(timeout=PATIENCE_S)
        run = self.run()
        if run is not None and run.pid is not None and psutil.pid_exists(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
        self.store.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Flywheel]]:
    """Flywheels that are ended after the test."""
    made: list[Flywheel] = []

    def one(**changes: Any) -> Flywheel:
        made.append(Flywheel(tmp_path / f"w{len(made)}", **changes))
        return made[-1]

    yield one
    for flywheel in made:
        flywheel.close()


def test_a_log_that_grows_becomes_students_by_itself(make: Callable[..., Flywheel]) -> None:
    """Enough rows: a run, a published student, the hook. Its rows are old then; new ones make a second run in
    a workdir of its own. SIGTERM ends the daemon.
    """
    flywheel = make()
    daemon = flywheel.start()
    first = flywheel.until_state(State.PUBLISHED)
    assert (first.trigger, first.reason) == ("rows", "60 usable rows since the last run (bound 50)")
    assert first.ref == "support-student:1"
    resolved = json.loads((Path(first.workdir) / "flywheel" / "distill.json").read_text())
    assert (resolved["workdir"], resolved["collect"]["route"]) == (first.workdir, "support")
    flywheel.until("the hook", lambda: (flywheel.root / "hooked").exists())
    write_logs(flywheel.root / "more", 55, seed=2)
    (flywheel.root / "more" / "requests-00000.jsonl").rename(flywheel.root / "logs" / "requests-90000.jsonl")
    flywheel.until("a second run", lambda: len(flywheel.store.latest(5)) == 2)
    second = flywheel.until_state(State.PUBLISHED)
    assert (second.reason, second.workdir != first.workdir) == (
        "55 usable rows since the last run (bound 50)",
        True,
    )
    daemon.terminate()
    assert daemon.wait(timeout=PATIENCE_S) == 0
    text = (flywheel.root / "flywheel" / "flywheel.prom").read_text()
    assert 'stillhouse_flywheel_runs{route="support",state="published"} 2.0' in text
    assert len(flywheel.store.latest(5)) == 2


def test_a_daemon_that_was_killed_finds_its_run_at_work(make: Callable[..., Flywheel]) -> None:
    """The run goes on without it, and the next daemon adopts the same process: begun once, published once. A
    second daemon meanwhile is refused.
    """
    flywheel = make(steps=10, hold=True)
    flywheel.start()
    before = flywheel.at_work(steps=5)
    flywheel.kill()
    assert before.pid is not None
    assert psutil.pid_exists(before.pid)
    flywheel.start()
    flywheel.until("adoption", lambda: "adopted" in flywheel.said())
    second = subprocess.run(
        [sys.executable, "-m", "cli.main", "flywheel", "run", str(flywheel.file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert second.returncode == 1
    assert "Another flywheel (process" in second.stderr
    flywheel.let_end()
    done = flywheel.until_state(State.PUBLISHED)
    assert (done.id, done.attempt) == (before.id, 1)
    assert [len(f.read_text().split()) for f in flywheel.work("begun")] == [1]
    assert flywheel.work("overlap") == []


def test_a_run_that_was_killed_with_its_daemon_goes_on_where_it_was(make: Callable[..., Flywheel]) -> None:
    """The machine died: the next daemon starts the same run in the same workdir, and no finished step is done
    again.
    """
    flywheel = make(steps=10, hold=True)
    flywheel.start()
    run = flywheel.at_work(steps=5)
    flywheel.kill()
    assert run.pid is not None
    os.killpg(run.pid, signal.SIGKILL)
    (Path(run.workdir) / "working").rmdir()
    flywheel.let_end()
    flywheel.start()
    done = flywheel.until_state(State.PUBLISHED)
    assert (done.id, done.attempt, done.failures) == (run.id, 2, 1)
    assert "ended without a word" in " ".join(why for _, _, _, why in flywheel.store.events(done))
    steps = flywheel.work("step-*")
    assert len(steps) == 10
    assert all(len(step.read_text().split()) == 1 for step in steps)


def test_cancel_ends_the_run_and_keeps_its_state(make: Callable[..., Flywheel]) -> None:
    """All of its processes are gone, its workdir is not; the pipeline was told with SIGTERM."""
    flywheel = make(steps=10, hold=True)
    flywheel.start()
    run = flywheel.at_work(steps=3)
    assert run.pid is not None
    flywheel.store.cancel(run, "ann")
    done = flywheel.until_state(State.CANCELLED)
    assert (done.why, done.exit_code) == ("cancelled by ann", 130)
    assert not psutil.pid_exists(run.pid) or psutil.Process(run.pid).status() == psutil.STATUS_ZOMBIE
    assert len(flywheel.work("step-*")) >= 3


def test_failures_are_tried_again_and_a_refusal_is_not(make: Callable[..., Flywheel]) -> None:
    """Two retries in one workdir, then failed; a gate's refusal (exit status 3) is an answer."""
    failing = make(route={"retries": 2, "cooldown_h": 100})
    (failing.root / "exit").write_text("1")
    refusing = make(route={"retries": 2, "cooldown_h": 100})
    (refusing.root / "exit").write_text("3")
    failing.start()
    refusing.start()
    failed = failing.until_state(State.FAILED)
    assert (failed.attempt, failed.failures, failed.exit_code) == (3, 3, 1)
    assert failing.store.route("support").failures == 1
    refused = refusing.until_state(State.REFUSED)
    assert (refused.attempt, refused.exit_code) == (1, 3)
    assert refusing.store.route("support").failures == 0


class Router(BaseHTTPRequestHandler):
    """A router's metrics, as busy as a test wants it."""

    in_flight = 0.0

    def do_GET(self) -> None:
        """Prometheus text."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(
            f"# TYPE stillhouse_in_flight gauge\nstillhouse_in_flight {self.in_flight}\n".encode()
        )

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def router() -> Iterator[tuple[type[Router], str]]:
    """The handler, to make it busy, and its URL."""

    class Own(Router):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Own, f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


def test_serving_that_needs_the_machine_gets_it(
    make: Callable[..., Flywheel], router: tuple[type[Router], str]
) -> None:
    """A busy router stops the run (SIGSTOP), a calm one lets it go on; one that stays busy has it ended, and
    it goes on later in the same workdir.
    """
    handler, url = router
    pressure = {"metrics_url": url, "queue": 10, "looks": 1, "calm_s": 0, "yield_after_s": 1.5}
    flywheel = make(steps=10, hold=True, pressure=pressure)
    flywheel.start()
    run = flywheel.at_work(steps=3)
    assert run.pid is not None
    handler.in_flight = 11
    flywheel.until_state(State.STOPPED)
    group = psutil.Process(run.pid)
    flywheel.until("a stop", lambda: group.status() == psutil.STATUS_STOPPED)
    child = next(p for p in group.children() if "pipeline.sh" in " ".join(p.cmdline()))
    assert child.status() == psutil.STATUS_STOPPED
    handler.in_flight = 10
    flywheel.until_state(State.RUNNING)
    flywheel.until("going on", lambda: child.status() != psutil.STATUS_STOPPED)
    handler.in_flight = 11
    waiting = flywheel.until_state(State.QUEUED)
    assert not child.is_running()
    assert waiting.failures == 0
    flywheel.let_end()
    handler.in_flight = 0
    assert flywheel.until_state(State.PUBLISHED).attempt == 2
    assert all(len(step.read_text().split()) == 1 for step in flywheel.work("step-*"))


def test_a_daemon_that_is_asked_to_leave_takes_its_run_with_it(make: Callable[..., Flywheel]) -> None:
    """Nobody works on without somebody who looks after serving; the next daemon goes on with it."""
    flywheel = make(steps=10, hold=True)
    daemon = flywheel.start()
    run = flywheel.at_work(steps=3)
    daemon.terminate()
    assert daemon.wait(timeout=PATIENCE_S) == 0
    left = flywheel.until_state(State.QUEUED)
    assert (left.id, left.why) == (run.id, "the flywheel was stopped")
    flywheel.let_end()
    flywheel.start()
    assert flywheel.until_state(State.PUBLISHED).attempt == 2
