"""Tracks a job while it runs, in a thread of its own: what MLflow does or fails to do never reaches the job.

Knows when to look; what is sent is sync.py's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from contracts.errors import GateError
from distill_jobs.config import DistillConfig
from distill_jobs.tracking.sync import FAILED, FINISHED, KILLED, RUNNING, sync

_LONGEST_WAIT_S = 300.0


@contextmanager
def tracked(
    config: DistillConfig,
    say: Callable[[str], None] = print,
    send: Callable[[DistillConfig, str], str] = sync,
) -> Iterator[None]:
    """Track the job that runs inside. Failures are told once and tried again, ever more seldom; when the job
    ends, at most `tracking.flush_s` are waited.
    """
    if not config.tracking.enabled:
        yield
        return
    tracker = _Tracker(config, say, send)
    tracker.start()
    try:
        yield
    except KeyboardInterrupt:
        tracker.end(KILLED)
        raise
    except GateError:
        tracker.end(FINISHED)  # the job did its work; the gates' file says that the student was refused
        raise
    except BaseException:
        tracker.end(FAILED)
        raise
    tracker.end(FINISHED)


class _Tracker:
    """The thread, and what is known of its troubles."""

    def __init__(
        self, config: DistillConfig, say: Callable[[str], None], send: Callable[[DistillConfig, str], str]
    ) -> None:
        self._config = config
        self._say = say
        self._send = send
        self._done = threading.Event()
        self._status = RUNNING
        self._trouble = ""
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)
        self._began = time.monotonic()

    def start(self) -> None:
        """Begin to follow the workdir."""
        self._thread.start()

    def end(self, status: str) -> None:
        """Send the rest, within the time allowed. A job that failed at once leaves nothing to wait for."""
        at_once = time.monotonic() - self._began < self._config.tracking.every_s
        self._status = status
        self._done.set()
        if status in (FAILED, KILLED) and at_once:
            return
        self._thread.join(self._config.tracking.flush_s)
        if self._thread.is_alive() or self._trouble:
            self._say(
                "tracking: MLflow does not have all of this job yet; send the rest with"
                f" `stillhouse models track {self._config.workdir}`."
            )

    def _follow(self) -> None:
        wait = self._config.tracking.every_s
        while not self._done.wait(wait):
            wait = self._config.tracking.every_s if self._try(RUNNING) else min(2 * wait, _LONGEST_WAIT_S)
        self._try(self._status)

    def _try(self, status: str) -> bool:
        try:
            self._send(self._config, status)
        except Exception as err:  # noqa: BLE001 (whatever a server or its client does, the job goes on)
            trouble = f"{type(err).__name__}: {err}".splitlines()[0]
            if trouble != self._trouble:
                self._say(f"tracking: {trouble} (the job goes on; what is missing is sent later)")
            self._trouble = trouble
            return False
        self._trouble = ""
        return True
