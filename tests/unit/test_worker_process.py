"""Workers in process groups: believed by their result, and never left behind; signals survive Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contracts.errors import EngineError
from distill_jobs.ray_session import _own_signals
from distill_jobs.worker_process import run_worker

ROOT = Path(__file__).resolve().parents[2]

CHILD = "import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"


def run(
    tmp: Path, code: str, timeout_s: float = 30.0, seen: list[tuple[int, int, str]] | None = None
) -> None:
    """Run Python code as a worker whose result file is tmp/result."""
    told = seen if seen is not None else []
    run_worker(
        [sys.executable, "-c", code, str(tmp)],
        tmp / "result",
        tmp / "log",
        {"PYTHONPATH": str(ROOT)},
        timeout_s,
        EngineError,
        lambda done, total, unit: told.append((done, total, unit)),
    )


def alive(pid: int) -> bool:
    """True while a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, timeout_s: float = 10.0) -> bool:
    """True when a process has ended within the time."""
    deadline = time.monotonic() + timeout_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_a_result_is_enough(tmp_path: Path) -> None:
    """Progress lines arrive, other output goes to a file, and an abort after the result is no failure."""
    seen: list[tuple[int, int, str]] = []
    code = (
        "import os, sys; print('PROGRESS 1 2 rows of it', flush=True); print('noise', flush=True)\n"
        "open(sys.argv[1] + '/result', 'w').write('x'); os.abort()"
    )
    run(tmp_path, code, seen=seen)
    assert seen == [(1, 2, "rows of it")]
    assert (tmp_path / "log.stdout").read_text() == "noise\n"


def test_no_result_is_a_failure_with_the_log(tmp_path: Path) -> None:
    """Even with exit code 0; a result of an earlier run does not count."""
    (tmp_path / "result").write_text("old")
    with pytest.raises(EngineError, match="weights are torn"):
        run(tmp_path, "import sys; print('weights are torn', file=sys.stderr)")


def test_a_worker_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """The time limit holds, and grandchildren go too."""
    code = CHILD + "open(sys.argv[1] + '/pid', 'w').write(str(c.pid)); c.wait()"
    with pytest.raises(EngineError, match="within 3 s"):
        run(tmp_path, code, timeout_s=3.0)
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_killed_pipeline_takes_its_workers_along(tmp_path: Path) -> None:
    """SIGKILL of the parent cannot be caught; the worker's own watch ends its whole group."""
    worker = (
        "from distill_jobs.worker_process import die_with_parent; die_with_parent();"
        + CHILD
        + "open(sys.argv[1] + '/pids', 'w').write(f'{__import__(\"os\").getpid()} {c.pid}'); c.wait()"
    )
    parent = (
        "import sys; from pathlib import Path; from contracts.errors import EngineError\n"
        "from distill_jobs.worker_process import run_worker\n"
        "t = Path(sys.argv[1])\n"
        f"argv = [sys.executable, '-c', {worker!r}, str(t)]\n"
        "run_worker(argv, t / 'result', t / 'log', {}, 60, EngineError)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", parent, str(tmp_path)], env=env, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    for pid in (tmp_path / "pids").read_text().split():
        assert gone(int(pid)), "a worker outlived the pipeline"


def _interrupted_under_ray_train() -> None:
    with _own_signals():
        signal.signal(signal.SIGINT, lambda number, frame: sys.exit(0))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_ctrl_c_stays_an_interrupt_under_ray_train() -> None:
    """Ray Train turns Ctrl-C into sys.exit(0) and keeps its handler: a stopped job must not look finished."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _interrupted_under_ray_train()
    assert signal.getsignal(signal.SIGINT) is before
