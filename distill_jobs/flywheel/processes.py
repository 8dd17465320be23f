"""A run's processes: begin them, find them again, stop them, let them go on, end them.

A run is the process group of its launcher and everything descended from it (workers and a Ray of its own have
groups of theirs). Knows nothing about why.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from contracts.config import write_atomic
from distill_jobs.flywheel.launch import LAUNCH, PID, boot_id, exit_file, held

FOLDER = "flywheel"
"""Of a workdir: what belongs to the launcher."""
_ROUNDS = 5
"""A tree is walked again while it grows: somebody may fork between two looks."""
_ROOT = Path(__file__).resolve().parents[2]


class Launched(NamedTuple):
    """What a launcher wrote when it began."""

    pid: int
    attempt: int
    boot: str

    @property
    def this_boot(self) -> bool:
        """False when the machine was started anew since."""
        return self.boot == boot_id()


def folder_of(workdir: str) -> Path:
    """The launcher's folder of a run."""
    return Path(workdir) / FOLDER


def begin(
    workdir: str,
    attempt: int,
    argv: Sequence[str],
    cwd: str,
    nice: int,
    cpus: int | None,
    env: dict[str, str],
) -> subprocess.Popen[bytes]:
    """Start a run's launcher in a session of its own. Beginning an attempt twice runs it once."""
    folder = folder_of(workdir)
    spec = {
        "attempt": attempt,
        "argv": list(argv),
        "cwd": cwd,
        "nice": nice,
        "cpus": _last_cpus(cpus),
        "env": env,
    }
    write_atomic(folder / LAUNCH, json.dumps(spec, indent=1) + "\n")
    path = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        [sys.executable, "-m", "distill_jobs.flywheel.launch", str(folder.resolve())],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def is_held(workdir: str) -> bool:
    """True while the run's launcher or its process lives."""
    return held(folder_of(workdir))


def launched(workdir: str) -> Launched | None:
    """What the last launcher wrote."""
    try:
        found = json.loads((folder_of(workdir) / PID).read_text(encoding="utf-8"))
        return Launched(int(found["pid"]), int(found["attempt"]), str(found["boot"]))
    except (OSError, ValueError, KeyError):  # not begun
        return None


def exit_code(workdir: str, attempt: int) -> int | None:
    """How an attempt ended; None when nobody could write it down."""
    try:
        found: dict[str, Any] = json.loads(exit_file(folder_of(workdir), attempt).read_text(encoding="utf-8"))
        return int(found["code"])
    except (OSError, ValueError, KeyError):  # still at work, or killed with its launcher
        return None


def log_tail(workdir: str, lines: int = 12) -> str:
    """The end of what the run said."""
    try:
        with (folder_of(workdir) / "run.log").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def started_at(pid: int) -> float | None:
    """When a process began; None when there is none. A pid alone may be somebody else's by now."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def tree(group: int) -> list[psutil.Process]:
    """Every process of a group, and what descends from them."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) != group:
                continue
            for one in (process, *process.children(recursive=True)):
                found.setdefault(one.pid, one)
        except (psutil.Error, ProcessLookupError):  # it ended meanwhile
            continue
    return list(found.values())


def memory_of(processes: Sequence[psutil.Process]) -> int:
    """Bytes that processes hold, pages that several share counted once (PSS)."""
    total = 0
    for process in processes:
        try:
            full = process.memory_full_info()
            total += int(getattr(full, "pss", 0) or full.rss)
        except psutil.Error:
            continue
    return total


def stop(group: int) -> None:
    """SIGSTOP to all of a run."""
    _signal_all(group, signal.SIGSTOP)


def go_on(group: int) -> None:
    """SIGCONT to all of a run."""
    _signal_all(group, signal.SIGCONT)


def end(group: int) -> None:
    """SIGTERM to the run's process group; stopped processes are let go on, so that they hear it."""
    try:
        os.killpg(group, signal.SIGTERM)
    except ProcessLookupError:
        return
    go_on(group)


def kill(group: int) -> None:
    """SIGKILL to all of a run."""
    _signal_all(group, signal.SIGKILL)


def _signal_all(group: int, number: signal.Signals) -> None:
    told: set[int] = set()
    for _ in range(_ROUNDS):
        new = [p for p in tree(group) if p.pid not in told]
        if not new:
            return
        for process in new:
            told.add(process.pid)
            try:
                process.send_signal(number)
            except psutil.Error:  # it ended meanwhile
                continue


def _last_cpus(count: int | None) -> list[int]:
    mine = sorted(os.sched_getaffinity(0))
    return [] if count is None or count >= len(mine) else mine[-count:]
