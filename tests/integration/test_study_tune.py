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
TIMEOUT_S = 600.0


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
        "knobs": {"train.optimizer.lr": [0.05]},
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
    """Ctrl-C after the first trial ends every process and says so (130); the same command finishes the other
    without repeating the first, and writes the report.
    """
    trials = world / "study" / "trials"
    process = start(world)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not list(trials.glob("*/result.json")):
            assert process.poll() is None, log_of(world)
            assert time.monotonic() < deadline, log_of(world)
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(TIMEOUT_S)
    assert code == 130, log_of(world)
    assert "Run the same command again" in log_of(world)
    assert psutil.wait_procs(children, timeout=60)[1] == []
    (first,) = trials.glob("*/result.json")
    written = first.stat().st_mtime_ns

    assert start(world).wait(TIMEOUT_S) == 0, log_of(world)
    results = list(trials.glob("*/result.json"))
    assert len(results) == 2
    assert first.stat().st_mtime_ns == written
    losses = [json.loads(p.read_text())["validation.kl"] for p in results]
    assert losses[0] != losses[1], "another rate, another student"
    report = (world / "study" / "report.md").read_text()
    assert "With one seed nobody can say whether a value of train.optimizer.lr is better" in report
    assert (world / "study" / "knob-train.optimizer.lr.png").stat().st_size > 10_000
