"""Background work is lower than serving among sessions, too, where the kernel shares by session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = Path("/proc/self/autogroup")

WORKER = """
import sys, time
def group(): return open("/proc/self/autogroup").read().split()[-1]
until = time.monotonic() + 60
while group() != "7" and time.monotonic() < until: time.sleep(0.01)  # told right after its start
open(sys.argv[1], "w").write(group())
"""
RUN = f"""
import os, sys
from pathlib import Path
from contracts.errors import EngineError
from distill_jobs.priority import lower
from distill_jobs.worker_process import run_worker
lower(7)
result = Path(sys.argv[1])
worker = [sys.executable, "-c", {WORKER!r}, str(result)]
run_worker(worker, result, result.with_suffix(".log"), {{}}, 90, EngineError)
print(os.nice(0), Path("/proc/self/autogroup").read_text().split()[-1], result.read_text())
"""


@pytest.mark.skipif(not OURS.exists(), reason="this kernel has no autogroups")
def test_a_run_and_its_workers_lower_their_sessions(tmp_path: Path) -> None:
    """A run in a session of its own gives the session its nice level, and so do workers in theirs; the
    session that started it keeps its own."""
    before = OURS.read_text()
    command = [sys.executable, "-c", RUN, str(tmp_path / "result")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, start_new_session=True, timeout=180
    )
    assert done.stdout.split() == ["7", "7", "7"], done.stderr
    assert OURS.read_text() == before
