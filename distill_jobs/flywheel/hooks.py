"""The command that a route wants run after a student was published. At least once: it may come again after a
crash, and a rollout that is started twice is refused the second time.

Knows nothing about what the command does.
"""

from __future__ import annotations

import logging
import subprocess
import time

from distill_jobs.flywheel.config import FlywheelConfig
from distill_jobs.flywheel.job import filled
from distill_jobs.flywheel.processes import folder_of
from distill_jobs.flywheel.store import Run, Store

log = logging.getLogger("stillhouse.flywheel")


class Hooks:
    """Hooks that are due or at work; never waited for."""

    def __init__(self, config: FlywheelConfig, store: Store) -> None:
        self._config = config
        self._store = store
        self._at_work: dict[int, tuple[subprocess.Popen[bytes], float]] = {}

    def check(self) -> None:
        """Begin what is due, and store how what has ended has ended."""
        for run in self._store.with_hook():
            route = self._config.routes.get(run.route)
            if route is None or not route.on_published or run.ref is None:
                self._store.note(run, hook="nothing to run: no command, or the run names no student")
            elif run.id not in self._at_work:
                self._begin(run, route.on_published)
            else:
                self._follow(run, route.on_published_timeout_s)

    def end(self) -> None:
        """The daemon leaves; what has not ended comes again."""
        for child, _ in self._at_work.values():
            child.terminate()
            child.wait()

    def _begin(self, run: Run, words: tuple[str, ...]) -> None:
        argv = filled(words, route=run.route, ref=run.ref or "", run=run.name)
        folder = folder_of(run.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with (folder / "hook.log").open("ab") as out:
                child = subprocess.Popen(argv, cwd=run.cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        except OSError as err:
            log.error("run %s: on_published: %s", run.name, err)
            self._store.note(run, hook=f"could not be started: {err}")
            return
        self._at_work[run.id] = (child, time.monotonic())
        self._store.note(run, hook="running")

    def _follow(self, run: Run, timeout_s: float) -> None:
        child, began = self._at_work[run.id]
        code = child.poll()
        if code is None and time.monotonic() - began < timeout_s:
            return
        if code is None:
            child.kill()
            child.wait()
        del self._at_work[run.id]
        end = (
            "done" if code == 0 else "took too long" if code is None else f"exit status {code}, see hook.log"
        )
        (log.info if code == 0 else log.error)("run %s: on_published: %s", run.name, end)
        self._store.note(run, hook=end)
