"""Ray Train runs of two workers: a worker, the driver or a node is killed; each time the run goes on and ends
in the same model."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_jobs.training.attention import register
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from tests.integration.training_driver import config
from tests.integration.training_rig import ROOT, base_model
from tests.unit.test_training_loop import write_rows

pytestmark = pytest.mark.integration


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_model(tmp_path / "base")


def _driver(data: Path, base: Path, out: Path, kind: str = "local") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.training_driver", kind, data, base, out],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _progress(storage: Path) -> list[dict[str, float]]:
    files = list(storage.glob("*/progress.jsonl"))
    return [json.loads(line) for line in files[0].read_text().splitlines()] if files else []


def _steps(storage: Path) -> list[int]:
    return [int(line["step"]) for line in _progress(storage)]


def _wait(what: str, driver: subprocess.Popen[str], ready: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert driver.poll() is None, f"the driver ended before {what}:\n{driver.stdout.read()[-3000:]}"  # type: ignore[union-attr]
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.05)


def _train_workers(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL the driver, then what is left of its local Ray (a real machine would have lost it, too)."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    for child in children:
        if child.is_running():
            child.kill()


def _straight(data: Path, base: Path, **changes: object) -> dict[str, torch.Tensor]:
    """The same run in this process: one worker, never interrupted."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.set_attn_implementation(register())
    trainer = Trainer(model, Rows(data, 1024, True), config(workers=1, **changes))
    for _ in trainer.run():
        pass
    return dict(trainer.model.state_dict())


def test_a_run_survives_a_killed_worker_and_a_killed_driver(tmp_path: Path, base: Path) -> None:
    """SIGKILL of a worker and later of the driver: both times it continues from the last checkpoint,
    repeating at most the steps since, and the two-worker result is that of one undisturbed worker."""
    data, out = write_rows(tmp_path / "rows"), tmp_path / "student"
    storage = tmp_path / "student.run"
    first = _driver(data, base, out)
    try:
        _wait("step 45", first, lambda: max(_steps(storage), default=0) >= 45)
        _train_workers(first)[0].send_signal(signal.SIGKILL)
        killed_at = len(_steps(storage))
        _wait("the run to go on", first, lambda: len(_steps(storage)) > killed_at + 30)
        _wait("step 130", first, lambda: _steps(storage)[-1] >= 130)
    finally:
        _kill_tree(first)
    before = _steps(storage)
    resumed = [step for last, step in itertools.pairwise(before) if step <= last]
    assert len(resumed) == 1
    assert resumed[0] % 20 == 1
    assert resumed[0] >= 21

    second = _driver(data, base, out)
    output, _ = second.communicate(timeout=240)
    assert "FINISHED 240" in output, output[-3000:]
    after = _steps(storage)[len(before) :]
    assert after[0] % 20 == 1
    assert after[0] > 100
    assert after == list(range(after[0], 241))

    assert len(AutoTokenizer.from_pretrained(out)) == 40
    _same(out, _straight(data, base))


def _same(out: Path, expected: dict[str, torch.Tensor]) -> None:
    student = AutoModelForCausalLM.from_pretrained(out)
    assert student.dtype == torch.bfloat16
    for name, tensor in expected.items():
        # The order of summing differs by worker; 240 Adam steps amplify it a little in the smallest entries.
        apart = (student.state_dict()[name].float() - tensor).norm() / tensor.norm()
        assert float(apart) < 0.01, name


def test_a_run_survives_the_loss_of_a_node(tmp_path: Path, base: Path) -> None:
    """The raylet of one of two nodes is killed with its worker and stays away: the run goes on from its last
    checkpoint with the one worker that is left (min_workers), and ends in the same model."""
    data, out = write_rows(tmp_path / "rows"), tmp_path / "student"
    driver = _driver(data, base, out, "nodes")
    try:
        output, _ = driver.communicate(timeout=300)
    finally:
        if driver.poll() is None:
            _kill_tree(driver)
    assert "FINISHED 180" in output, output[-3000:]
    lines = _progress(tmp_path / "student.run")
    resumed = next(i for i in range(1, len(lines)) if lines[i]["step"] <= lines[i - 1]["step"])
    assert lines[resumed]["step"] % 20 == 1
    assert lines[resumed]["step"] >= 21
    assert [line["workers"] for line in lines] == [2] * resumed + [1] * (len(lines) - resumed)
    assert [line["step"] for line in lines[resumed:]] == list(range(int(lines[resumed]["step"]), 181))
    _same(out, _straight(data, base, epochs=60))
