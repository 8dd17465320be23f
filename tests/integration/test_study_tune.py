"""A study with nothing faked (Ray Tune over Ray Train) on random models: Ctrl-C, and on again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.pipeline_world import config_of, write_logs, write_model

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs, two small checkpoints, the job's file and the study's."""
    root = tmp_path_factory.mktemp("study")
    write_logs(root / "logs", 120)
    write_model(root / "teacher", hidden=32, layers=1, seed=0)
    write_model(root / "student", hidden=32, layers=1, seed=1)
    job = config_of(root)
    job["collect"]["executor"] = "local"
    job["train"] |= {"max_steps": 2, "batch_rows": 8, "dtype": "float32"}
    (root / "distill.yaml").write_text(json.dumps(job))
    study = {
        "folder": str(root / "study"),
        "distill": str(root / "distill.yaml"),
        "data": {"shares": [0.25, 0.5, 0.75, 1.0], "worth": 0.5},
        "seeds": [0],
        "parallel": 1,
    }
    (root / "study.yaml").write_text(json.dumps(study))
    return root


def start(root: Path) -> subprocess.Popen[bytes]:
    """`stillhouse study` in a process group of its own."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (root / "study.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "cli.main", "study", str(root / "study.yaml")],
            cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def log_of(root: Path) -> str:
    """The end of what it said."""
    return (root / "study.log").read_text(errors="replace")[-4000:]


def test_a_study_stopped_with_ctrl_c_goes_on(world: Path) -> None:
    """Ctrl-C after the first trial ends every process and says so (130); the same command finishes the others
    without repeating the first, and writes the report.
    """
    trials = world / "study" / "trials"
    process = start(world)
    deadline = time.monotonic() + TIMEOUT_S
    while not list(trials.glob("*/result.json")):
        assert process.poll() is None, log_of(world)
        assert time.monotonic() < deadline, log_of(world)
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130, log_of(world)
    assert "Run the same command again" in log_of(world)
    assert psutil.wait_procs(children, timeout=20)[1] == []
    before = {p: p.stat().st_mtime_ns for p in trials.glob("*/result.json")}
    assert 1 <= len(before) < 4

    assert start(world).wait(TIMEOUT_S) == 0, log_of(world)
    results = list(trials.glob("*/result.json"))
    assert len(results) == 4
    assert before.items() <= {p: p.stat().st_mtime_ns for p in results}.items()
    rows = sorted(json.loads(p.read_text())["rows"] for p in results)
    assert rows[0] == pytest.approx(rows[3] / 4, abs=1)
    report = (world / "study" / "report.md").read_text()
    assert "More data may be worth it" in report, "one seed of four shares has no interval"
    assert (world / "study" / "data-size.png").stat().st_size > 10_000
