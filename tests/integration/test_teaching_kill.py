"""A teach job killed with SIGKILL: what it leaves is believed only where it is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from distill_jobs.teaching.config import TeachConfig
from tests.integration.pipeline_world import write_model
from tests.unit.teaching_world import run, sample

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]

SETTINGS = TeachConfig(scheme="sampled", shard_rows=2, batch_tokens=64)
SAMPLES = [sample(f"request {n}", "answer " * (n % 7 + 1)) for n in range(60)]

_JOB = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from tests.integration.test_teaching_kill import SAMPLES, SETTINGS
    from tests.unit.teaching_world import run
    run(Path(sys.argv[1]), Path(sys.argv[2]), SAMPLES, SETTINGS)
    """
)


def test_a_job_killed_in_the_middle_ends_with_the_same_parts(tmp_path: Path) -> None:
    """SIGKILL after some parts: no torn file is believed, finished parts stay as they are, and all equal an
    uninterrupted run's byte for byte.
    """
    teacher = tmp_path / "teacher"
    write_model(teacher, hidden=64, layers=2, seed=0)
    whole = Path(run(tmp_path / "whole", teacher, SAMPLES, SETTINGS).outputs["train"].path)
    parts = tmp_path / "killed" / "teach" / "train"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", _JOB, str(tmp_path / "killed"), str(teacher)]
    job = subprocess.Popen(argv, env=env, cwd=ROOT)
    while len(list(parts.glob("part-*.parquet"))) < 4 and job.poll() is None:
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    left = {p.name: p.stat().st_mtime_ns for p in parts.glob("part-*.parquet")}
    assert 4 <= len(left) < 30
    assert not (parts / "manifest.json").exists()
    (parts / ".part-00029.parquet.1.tmp").write_bytes(b"torn")
    run(tmp_path / "killed", teacher, SAMPLES, SETTINGS)
    files = sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in parts.iterdir()) == files
    for name in files:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert {name: (parts / name).stat().st_mtime_ns for name in left} == left
