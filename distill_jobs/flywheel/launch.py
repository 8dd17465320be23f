"""The process between the flywheel and a run: it holds the run's lock, and writes down how the run ended.

Started as `python -m distill_jobs.flywheel.launch FOLDER` in a session of its own, with FOLDER/launch.json
saying what to run. A daemon that was killed finds the run again by the lock (which the run's process
inherits, so it is held as long as either lives), and learns how it ended from exit-<attempt>.json. Two
launchers of one run never run it twice. Imports next to nothing: it lives as long as the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from distill_jobs.locks import is_locked, take
from distill_jobs.priority import lower

LOCK, LAUNCH, PID = "lock", "launch.json", "pid.json"
TAKEN = 75
"""Exit status of a launcher that came second (EX_TEMPFAIL)."""
_WAIT_S = 3.0


def exit_file(folder: Path, attempt: int) -> Path:
    """Where the end of an attempt is written."""
    return folder / f"exit-{attempt}.json"


def held(folder: Path) -> bool:
    """True while a run's launcher, or the run itself, lives."""
    return is_locked(folder / LOCK)


def main(folder: Path) -> int:
    """Run what launch.json says, unless it runs or has run already."""
    spec = json.loads((folder / LAUNCH).read_text(encoding="utf-8"))
    lock = (folder / LOCK).open("a+", encoding="utf-8")  # closed by the end of this process
    if not take(lock, _WAIT_S):  # a daemon that asks `held` has it for an instant
        return TAKEN
    ended = exit_file(folder, spec["attempt"])
    if ended.exists():
        return TAKEN
    # A handler, not SIG_IGN, which the run would inherit: the group's SIGTERM is for the run.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    lower(spec["nice"])
    if spec["cpus"]:
        os.sched_setaffinity(0, spec["cpus"])
    _write(folder / PID, {"pid": os.getpid(), "attempt": spec["attempt"], "boot": boot_id()})
    code = _run(spec, folder, lock)
    _write(ended, {"code": code, "at": time.time()})
    return 0


def boot_id() -> str:
    """Differs after every start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _run(spec: dict[str, Any], folder: Path, lock: IO[str]) -> int:
    with (folder / "run.log").open("ab") as log:
        try:
            child = subprocess.Popen(
                spec["argv"],
                cwd=spec["cwd"],
                env={**os.environ, **spec["env"]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(),),
            )
        except OSError as err:
            log.write(f"{spec['argv'][0]} could not be started: {err}\n".encode())
            return 127
        return child.wait()


def _write(path: Path, value: dict[str, Any]) -> None:
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with tmp.open("w", encoding="utf-8") as out:
        out.write(json.dumps(value))
        out.flush()
        os.fsync(out.fileno())
    tmp.replace(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
