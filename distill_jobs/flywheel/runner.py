"""Does what was decided to runs, and notices how they end. Every step may be its last and is made good later.

The order is always: store the transition, then act; acting again is harmless. Knows nothing about triggers.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable
from datetime import datetime
from zoneinfo import ZoneInfo

from contracts.errors import StillhouseError
from distill_jobs.flywheel import job, processes
from distill_jobs.flywheel.admit import Act, Do, State
from distill_jobs.flywheel.config import FlywheelConfig
from distill_jobs.flywheel.due import Decision
from distill_jobs.flywheel.launch import TAKEN
from distill_jobs.flywheel.store import Run, Store
from distill_jobs.flywheel.watch import Watcher, window_start

log = logging.getLogger("stillhouse.flywheel")

_PUBLISHED, _REFUSED = 0, 3
_NO_WORD = "ended without a word (killed, or the machine was started anew)"


class Runner:
    """Runs of all routes."""

    def __init__(self, config: FlywheelConfig, store: Store, watchers: dict[str, Watcher]) -> None:
        self._config = config
        self._store = store
        self._watchers = watchers
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        """Launchers that this daemon began; adopted ones are others' children."""

    def queue(self, route: str, decision: Decision, now: float) -> Run:
        """A run that is due."""
        date = datetime.fromtimestamp(now, ZoneInfo(self._config.timezone)).strftime("%Y%m%d")
        run = self._store.queue(
            route,
            decision.trigger or "",
            decision.reason,
            self._config.dir.resolve(),
            date,
            os.getcwd(),
            now,
        )
        log.info("run %s queued: %s: %s", run.name, run.trigger, run.reason)
        return run

    def adopt(self, now: float) -> None:
        """After a start of the daemon: runs that are at work are found again and put into their stored
        state.
        """
        for run in self._store.active():
            if not run.state.at_work:
                continue
            log.info(
                "run %s is %s; %s", run.name, run.state.value, "adopted" if self._alive(run) else "not alive"
            )
            run = self._learn_pid(run)
            if self._alive(run):
                self._enforce(run)

    def act(self, act: Act, now: float) -> None:
        """Do one thing that was decided."""
        run = self._store.run(act.run)
        doing: dict[Do, Callable[[], object]] = {
            Do.START: lambda: self._start(run, now),
            Do.STOP: lambda: self._stop(run, act.why, now),
            Do.GO_ON: lambda: self._go_on(run, act.why, now),
            Do.YIELD: lambda: self._end(run, State.QUEUED, act.why, now),
            Do.CANCEL: lambda: self._end(run, State.CANCELLED, act.why, now),
            Do.FAIL: lambda: self._end(run, State.FAILED, act.why, now),
        }
        log.info("run %s: %s (%s)", run.name, act.do.value, act.why)
        doing[act.do]()

    def check(self, now: float) -> None:
        """Count working time, and notice what has ended."""
        for run in self._store.active():
            if not run.state.at_work:
                continue
            known, run = run.pid, self._learn_pid(run)
            if known is None and run.state is not State.RUNNING and self._alive(run):
                self._enforce(run)  # it was told before anybody knew its pid
            self._store.worked(run, now, counts=run.state is not State.STOPPED)
            tokens = job.teacher_tokens(run.workdir)
            if tokens != run.tokens:
                run = self._store.note(run, tokens=tokens)
            if not self._alive(run):
                self._ended(run, now)
            elif (
                run.state is State.ENDING
                and run.pid is not None
                and now - (run.term_at or now) > self._config.grace_s
            ):
                log.warning("run %s did not end within %g s: killed", run.name, self._config.grace_s)
                processes.kill(run.pid)

    def end_all(self, why: str, now: float) -> bool:
        """Ask every run to yield; True when none is at work any more."""
        for run in self._store.active():
            if run.state in (State.RUNNING, State.STOPPED):
                self._end(run, State.QUEUED, why, now)
        return not any(run.state.at_work for run in self._store.active())

    def group(self, run: Run) -> int | None:
        """The process group of a run that is alive."""
        return run.pid if run.state.at_work and self._alive(run) else None

    def _start(self, run: Run, now: float) -> None:
        route = self._config.routes[run.route]
        since = window_start(route, now)
        try:
            job.write_resolved(run.route, route, run.workdir, since)
        except StillhouseError as err:
            self._finish(run, State.FAILED, str(err), now)
            return
        fields: dict[str, object] = {"attempt": run.attempt + 1, "seen_at": now, "pid": None, "becomes": None}
        if run.started_at is None:
            fields["started_at"] = now
        with self._store.transaction() as db:
            if run.mark is None:
                fields["mark"] = self._watchers[run.route].pin(db, since).model_dump_json()
            self._store.move_in(
                db, run, State.RUNNING, "started" if run.mark is None else "goes on", now, **fields
            )
        self._begin(self._store.run(run.id))

    def _begin(self, run: Run) -> None:
        """Start the launcher of the run's attempt; one that runs already is left alone by the launcher."""
        budget = self._config.budget
        self._children[run.id] = processes.begin(
            run.workdir,
            run.attempt,
            job.command(run.route, self._config.routes[run.route], run.workdir, run.name),
            run.cwd,
            budget.nice,
            budget.cpus,
            {"CUDA_VISIBLE_DEVICES": budget.gpus},
        )

    def _stop(self, run: Run, why: str, now: float) -> None:
        self._enforce(self._store.move(self._learn_pid(run), State.STOPPED, why, now, stopped_at=now))

    def _go_on(self, run: Run, why: str, now: float) -> None:
        self._enforce(self._store.move(run, State.RUNNING, why, now, stopped_at=None))

    def _end(self, run: Run, becomes: State, why: str, now: float) -> None:
        if run.state is State.QUEUED:
            self._finish(run, becomes, why, now)
            return
        fields = {"term_at": now, "becomes": becomes, "stopped_at": None}
        self._enforce(self._store.move(self._learn_pid(run), State.ENDING, why, now, **fields))

    def _alive(self, run: Run) -> bool:
        child = self._children.get(run.id)
        if child is not None and child.poll() is None:
            return True  # it may not have taken the lock yet
        return processes.is_held(run.workdir)

    def _learn_pid(self, run: Run) -> Run:
        """The launcher's pid, from what it wrote: the daemon may have died before it could store it."""
        found = processes.launched(run.workdir)
        if found is None or found.attempt != run.attempt or found.pid == run.pid or not found.this_boot:
            return run
        return self._store.note(run, pid=found.pid, pid_started=processes.started_at(found.pid))

    def _enforce(self, run: Run) -> None:
        """Put a run's processes into its stored state."""
        if run.pid is None:
            return
        if run.state is State.STOPPED:
            processes.stop(run.pid)
        elif run.state is State.RUNNING:
            processes.go_on(run.pid)
        else:
            processes.end(run.pid)

    def _ended(self, run: Run, now: float) -> None:
        """Its processes are gone: what has become of it?"""
        child = self._children.pop(run.id, None)
        code = processes.exit_code(run.workdir, run.attempt)
        found = processes.launched(run.workdir)
        if code is None and (found is None or found.attempt != run.attempt) and run.state is State.RUNNING:
            second = child is not None and child.returncode == TAKEN
            log.info("run %s: attempt %d had not begun", run.name, run.attempt)
            if child is None or second:
                self._begin(run)
                return
        self._store.note(run, exit_code=code, pid=None, pid_started=None)
        if code == _PUBLISHED:
            self._publish(run, now)
        elif code == _REFUSED:
            self._finish(run, State.REFUSED, processes.log_tail(run.workdir), now)
        elif run.state is State.ENDING and run.becomes is not None:
            self._settle(run, run.becomes, run.why, now)
        else:
            rebooted = code is None and found is not None and not found.this_boot
            self._failed(run, code, counts=not rebooted, now=now)

    def _publish(self, run: Run, now: float) -> None:
        route = self._config.routes.get(run.route)
        hook = "pending" if route is not None and route.on_published else None
        ref = job.published_ref(run.workdir)
        self._finish(run, State.PUBLISHED, f"published {ref or 'a student'}", now, ref=ref, hook=hook)

    def _failed(self, run: Run, code: int | None, counts: bool, now: float) -> None:
        """Once more in the same workdir, or the end."""
        tail = processes.log_tail(run.workdir)
        why = f"{_NO_WORD if code is None else f'exit status {code}'}\n{tail}".strip()
        failures = run.failures + int(counts)
        route = self._config.routes.get(run.route)
        if route is not None and failures <= route.retries:
            log.warning("run %s: %s; it goes on from where it was", run.name, why)
            self._store.move(run, State.QUEUED, why, now, failures=failures, stopped_at=None)
            return
        run = self._store.note(run, failures=failures)
        self._finish(run, State.FAILED, why, now)

    def _settle(self, run: Run, becomes: State, why: str, now: float) -> None:
        if becomes is State.QUEUED:
            self._store.move(run, State.QUEUED, why, now, becomes=None, term_at=None)
        else:
            self._finish(run, becomes, why, now)

    def _finish(self, run: Run, state: State, why: str, now: float, **fields: object) -> None:
        """The end of a run, and what it means for its route, in one transaction."""
        # Also a person's no is an answer: without it the same evidence would queue the same run again.
        answers = state is not State.FAILED
        watcher = self._watchers.get(run.route)
        with self._store.transaction() as db:
            self._store.move_in(db, run, state, why, now, ended_at=now, **fields)
            if answers and watcher is not None:
                watcher.answered(db, run.mark or watcher.pin(db, None), state is State.PUBLISHED)
            failures = "0" if answers else "failures + 1"
            db.execute(
                f"UPDATE routes SET last_ended_at = ?, failures = {failures} WHERE route = ?",
                (now, run.route),
            )
        log.info("run %s: %s: %s", run.name, state.value, why.splitlines()[-1] if why else "")
