"""Ray Train runs: two workers, a worker killed, the driver killed; each time the run goes on and ends in the
same model."""

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
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distill_jobs.training.attention import register
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from tests.integration.training_driver import config
from tests.unit.test_training_loop import tiny_model, write_rows

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny checkpoint with a tokenizer, as any Hugging Face folder."""
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(40)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        pad_token="w0",
        eos_token="w1",
    ).save_pretrained(folder)
    return folder


def _driver(data: Path, base: Path, out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.training_driver", str(data), str(base), str(out)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _steps(storage: Path) -> list[int]:
    files = list(storage.glob("*/progress.jsonl"))
    return [json.loads(line)["step"] for line in files[0].read_text().splitlines()] if files else []


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


def _straight(data: Path, base: Path) -> dict[str, torch.Tensor]:
    """The same run in this process: one worker, never interrupted."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.set_attn_implementation(register())
    trainer = Trainer(model, Rows(data, 1024, True), config(workers=1))
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
    student = AutoModelForCausalLM.from_pretrained(out)
    assert student.dtype == torch.bfloat16
    for name, tensor in _straight(data, base).items():
        # The order of summing differs by worker; 240 Adam steps amplify it a little in the smallest entries.
        apart = (student.state_dict()[name].float() - tensor).norm() / tensor.norm()
        assert float(apart) < 0.01, name
