"""Run a heavy worker (vLLM, llm-compressor) in a process group of its own that never outlives the job.

A worker prints `PROGRESS done total unit` lines, writes a result file last, and watches its parent: when the
job is killed with SIGKILL the worker's whole group goes with it. Knows nothing about what workers compute.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from contracts.errors import StillhouseError
from distill_jobs.priority import follow

OnProgress = Callable[[int, int, str], None]

_GRACE_S = 20.0
_TAIL_LINES = 15


def run_worker(
    argv: list[str],
    result: Path,
    log: Path,
    env: dict[str, str],
    timeout_s: float,
    error: type[StillhouseError],
    on_progress: OnProgress | None = None,
) -> None:
    """Run `argv` until `result` exists and the worker is gone; its stderr goes to `log`.

    The exit code is not believed: vLLM on CPU aborts at exit now and then, after its results are written.
    Raises: `error` with the end of the log when no result was written in time.
    """
    result.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stderr:
        worker = subprocess.Popen(
            argv,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        follow(worker.pid)
        reader = threading.Thread(target=_read, args=(worker, on_progress, log), daemon=True)
        reader.start()
        try:
            late = _wait(worker, result, time.monotonic() + timeout_s)
        finally:
            _end_group(worker)
    reader.join(timeout=5)
    if not result.is_file():
        what = (
            f"gave no result within {timeout_s:.0f} s"
            if late
            else f"ended with code {worker.returncode} and no result"
        )
        raise error(
            f"{Path(argv[-2]).name if len(argv) > 1 else argv[0]} {what}. End of {log}:\n{_tail(log)}"
        )


def _wait(worker: subprocess.Popen[str], result: Path, deadline: float) -> bool:
    """Until the worker is gone, or its result is there and it had time to leave; True when it was late."""
    written: float | None = None
    while worker.poll() is None:
        now = time.monotonic()
        if written is None and result.is_file():
            written = now
        if written is not None and now > written + _GRACE_S:
            return False
        if written is None and now > deadline:
            return True
        time.sleep(0.1)
    return False


def _end_group(worker: subprocess.Popen[str]) -> None:
    """SIGKILL what is left of the worker's group (it is the group's leader, so the group is ours alone)."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # everybody has left: what was wanted
    worker.wait()


def _read(worker: subprocess.Popen[str], on_progress: OnProgress | None, log: Path) -> None:
    assert worker.stdout is not None
    with log.with_suffix(".stdout").open("w", encoding="utf-8") as copy:
        for line in worker.stdout:
            words = line.split(maxsplit=3)
            if len(words) == 4 and words[0] == "PROGRESS" and on_progress is not None:
                on_progress(int(words[1]), int(words[2]), words[3].strip())
            else:
                copy.write(line)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


def die_with_parent() -> None:
    """In a worker: a thread that ends the whole group when the parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
