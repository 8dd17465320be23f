"""Progress of a job, for the terminal and for others: `<workdir>/progress.json` is always a whole, recent
file.

Knows nothing about what a stage does; a unit is whatever the stage counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from contracts.config import write_atomic

_WRITE_EVERY_S = 0.5


@dataclass(frozen=True)
class Event:
    """Where a stage is. `eta_s` is None until something was done; state: running, skipped, done, stopped or
    failed.
    """

    stage: str
    state: str
    done: int
    total: int
    unit: str
    note: str
    """`done`, `total` and `unit` for a person."""
    eta_s: float | None
    seconds: float
    pid: int
    updated_at: float


Listener = Callable[[Event], None]


class Progress:
    """Writes progress.json (at most twice a second) and tells one listener."""

    def __init__(self, file: Path, listener: Listener | None = None) -> None:
        self._file = file
        self._listener = listener
        self._stage = ""
        self._started, self._written, self._since = time.time(), 0.0, 0.0
        self._first: int | None = None
        self._unit = ""

    def begin(self, stage: str) -> None:
        """A stage starts to work."""
        self._stage, self._started, self._first = stage, time.time(), None
        self._tell("running", 0, 0, "", force=True)

    def update(self, done: int, total: int, unit: str = "") -> None:
        """`done` of `total` units; units finished by an earlier run don't count for the estimate, nor does
        the time that other units took.
        """
        if self._first is None or unit != self._unit:
            self._since = 0.0 if self._first is None else time.time() - self._started
            self._first, self._unit = done, unit
        self._tell("running", done, total, unit, force=done >= total)

    def end(self, state: str, stage: str | None = None) -> None:
        """A stage is over: done, skipped, stopped or failed."""
        if stage is not None and stage != self._stage:
            self._stage, self._started = stage, time.time()
        self._tell(state, 1, 1, "", force=True)

    def _tell(self, state: str, done: int, total: int, unit: str, force: bool) -> None:
        now = time.time()
        if not force and now - self._written < _WRITE_EVERY_S:
            return
        self._written = now
        seconds = now - self._started
        fresh = done - (self._first or 0)
        eta = (
            round((seconds - self._since) / fresh * (total - done), 1)
            if state == "running" and fresh > 0
            else None
        )
        note = f"{done}/{total} {unit}" if total and unit else state
        event = Event(self._stage, state, done, total, unit, note, eta, round(seconds, 1), os.getpid(), now)
        write_atomic(self._file, json.dumps(asdict(event)) + "\n")
        if self._listener is not None:
            self._listener(event)
