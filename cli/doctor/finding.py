"""What a check says, and running checks so that none can hang the doctor. Knows no check."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from contracts.config import Record
from contracts.errors import StillhouseError
from contracts.masking import mask
from serve.config import ServeConfig
from serve.stack.record import StackRecord


class Level(StrEnum):
    """How bad it is. Only FAIL makes the exit status 1."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Finding(Record):
    """One line of the doctor's."""

    check: str
    level: Level
    what: str
    fix: str = ""
    """What to do; empty when nothing is to be done."""


@dataclass(frozen=True)
class Patient:
    """What is looked at."""

    config: ServeConfig
    record: StackRecord | None
    """Of the stack that runs on this configuration, or of one that crashed."""

    @property
    def runs(self) -> bool:
        """True while a supervisor of ours lives."""
        return self.record is not None and self.record.supervised


Check = Callable[[Any], Iterable[Finding]]
"""Takes a Patient; checks of the machine alone take None too."""


def ok(check: str, what: str) -> Finding:
    """All is well."""
    return Finding(check=check, level=Level.OK, what=what)


def warn(check: str, what: str, fix: str) -> Finding:
    """It works, or may not for long."""
    return Finding(check=check, level=Level.WARN, what=what, fix=fix)


def fail(check: str, what: str, fix: str) -> Finding:
    """It does not work."""
    return Finding(check=check, level=Level.FAIL, what=what, fix=fix)


def skip(check: str, what: str) -> Finding:
    """It could not be looked at, or there is nothing to look at."""
    return Finding(check=check, level=Level.SKIP, what=what)


def examine(patient: Patient | None, checks: Sequence[tuple[str, Check]], limit_s: float) -> list[Finding]:
    """Run all checks at once, each in a thread of its own that is left behind when it takes too long.

    Args:
        limit_s: seconds for all of them together; a check that is not done by then is a FAIL of its own.
    """
    done: queue.SimpleQueue[tuple[str, list[Finding]]] = queue.SimpleQueue()
    for name, check in checks:
        threading.Thread(target=_run, args=(name, check, patient, done), name=name, daemon=True).start()
    found: dict[str, list[Finding]] = {}
    until = time.monotonic() + limit_s
    while len(found) < len(checks):
        try:
            name, findings = done.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            break
        found[name] = findings
    late = f"no answer within {limit_s:g} s"
    fix = "something that it asks does not answer; --timeout S waits longer."
    return [f for name, _ in checks for f in found.get(name, [fail(name, late, fix)])]


def _run(
    name: str, check: Check, patient: Patient | None, done: queue.SimpleQueue[tuple[str, list[Finding]]]
) -> None:
    try:
        findings = list(check(patient))
    except StillhouseError as err:
        findings = [fail(name, mask(str(err)), "do what the message says.")]
    except Exception as err:  # noqa: BLE001 - a check that breaks is a finding, not the end of the doctor
        findings = [fail(name, f"could not look: {type(err).__name__}: {mask(str(err))[:300]}", "see above.")]
    done.put((name, findings))
