"""The pipeline with nothing faked (Ray Data, Ray Train, llm-compressor, vLLM, MLflow) on random models.

The first job is killed with SIGKILL in stage after stage and started again each time, so one run shows both
that it ends well and that nothing but the last unit of work is repeated.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from contracts.dataset import Manifest
from registry.digest import digest_folder
from registry.mlflow_store import MlflowRegistry
from tests.integration.pipeline_world import write_world

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
STAGE_TIMEOUT_S = 400.0


@dataclass
class Job:
    """A job on disk and the process that works on it."""

    root: Path
    facts: dict[str, Any] = field(default_factory=dict)
    """What the fixture saw between the kills."""

    @property
    def workdir(self) -> Path:
        """Its folder."""
        return self.root / "job"

    def start(self) -> subprocess.Popen[bytes]:
        """`stillhouse distill` in a process of its own."""
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "distill_jobs.cli", str(self.root / "distill.yaml")]
        with (self.root / "distill.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def kill_when(self, what: str, happened: Any) -> None:
        """Start, wait until something is on disk, SIGKILL that one process; its workers must follow it."""
        process = self.start()
        deadline = time.monotonic() + STAGE_TIMEOUT_S
        try:
            while not happened():
                assert process.poll() is None, f"ended before {what}:\n{self.log()}"
                assert time.monotonic() < deadline, f"{what} did not happen:\n{self.log()}"
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def log(self) -> str:
        """The end of its output."""
        return (self.root / "distill.log").read_text(errors="replace")[-4000:]

    def folder(self, stage: str) -> Path | None:
        """A stage's folder, when there is one."""
        return next(self.workdir.glob(f"{stage}-*"), None)

    def manifests(self) -> dict[str, Manifest]:
        """Manifests of the finished stages."""
        found = [Manifest.model_validate_json(p.read_text()) for p in self.workdir.glob("*/manifest.json")]
        return {m.stage: m for m in found}

    def has(self, stage: str, pattern: str) -> bool:
        """True when a stage's folder holds something of that name."""
        folder = self.folder(stage)
        return folder is not None and any(folder.glob(pattern))


def processes_naming(text: str) -> list[int]:
    """Living processes whose command line names a path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it ended while we looked
            if text.encode() in command:
                found.append(int(entry.name))
    return found


def wait_gone(text: str, timeout_s: float = 20.0) -> list[int]:
    """Processes that still name a path after a while."""
    deadline = time.monotonic() + timeout_s
    while (left := processes_naming(text)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The job after it was killed in teach, train, quantize and evaluate, and then left to finish."""
    root = tmp_path_factory.mktemp("pipeline")
    write_world(root)
    made = Job(root)
    facts = made.facts

    made.kill_when("the first teacher shard", lambda: made.has("teach", "train/part-00000.parquet"))
    facts["parts"] = _times(made, "teach", "train/part-*.parquet")
    facts["collect"] = _times(made, "collect", "**/*.parquet")
    made.kill_when("a training checkpoint", lambda: made.has("train", "student.run/*/checkpoint*"))
    facts["parts_after"] = _times(made, "teach", "train/part-*.parquet")
    facts["train_steps"] = _steps(made)
    made.kill_when("quantization", lambda: made.has("quantize", "compress.stdout"))
    facts["left_of_quantize"] = wait_gone(str(root / "job" / "quantize"))
    made.kill_when("the student's evaluation", lambda: made.has("evaluate", "student/answers.jsonl"))
    facts["left_of_evaluate"] = wait_gone(str(root / "job" / "evaluate"))
    (teacher,) = (root / "cache").glob("teacher-evaluation-*/done.json")
    facts["teacher"] = teacher.stat().st_mtime_ns
    last = made.start()
    facts["exit"] = last.wait(STAGE_TIMEOUT_S)
    facts["teacher_after"] = teacher.stat().st_mtime_ns
    facts["collect_after"] = _times(made, "collect", "**/*.parquet")
    facts["train_steps_after"] = _steps(made)
    return made


def _times(job: Job, stage: str, pattern: str) -> dict[str, int]:
    folder = job.folder(stage)
    assert folder is not None
    return {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob(pattern))}


def _steps(job: Job) -> list[int]:
    """Steps in the trainer's progress file, in the order they were made."""
    folder = job.folder("train")
    assert folder is not None
    files = list(folder.glob("student.run/*/progress.jsonl"))
    return [int(json.loads(line)["step"]) for f in files for line in f.read_text().splitlines()]


def test_a_job_killed_in_four_stages_ends_published(job: Job) -> None:
    """The last start finishes, and the version it published is the artifact on disk, whole."""
    assert job.facts["exit"] == 0, job.log()
    registry = MlflowRegistry(f"sqlite:///{job.root / 'registry.db'}")
    record = registry.get("support-student@challenger")
    assert record.version == 1
    assert digest_folder(registry.download("support-student:1")) == record.artifact.digest
    assert record.lineage.manifests == {s: m.key for s, m in job.manifests().items() if s != "publish"}
    assert set(record.lineage.manifests) == {"collect", "teach", "train", "quantize", "evaluate"}


def test_only_the_last_unit_is_repeated(job: Job) -> None:
    """Teacher shards, collected files and the teacher's evaluation from before a kill are the same files
    after.
    """
    facts = job.facts
    assert facts["parts"].items() <= facts["parts_after"].items()
    assert facts["collect"] == facts["collect_after"]
    assert facts["teacher"] == facts["teacher_after"]


def test_training_goes_on_from_its_checkpoint(job: Job) -> None:
    """Steps up to the last recorded checkpoint are made once. Checkpoints come every 3 steps; Ray records
    them a moment later, and this model's steps take milliseconds, so the one under way may be lost too.
    """
    before, after = job.facts["train_steps"], job.facts["train_steps_after"]
    repeated = len(after) - len(set(after))
    assert sorted(set(after)) == list(range(1, max(after) + 1))
    assert len(before) <= len(after)
    assert repeated <= 6


def test_killed_workers_leave_nothing_running(job: Job) -> None:
    """SIGKILL of the pipeline takes llm-compressor and every process of vLLM with it."""
    assert job.facts["left_of_quantize"] == []
    assert job.facts["left_of_evaluate"] == []
    assert wait_gone(str(job.workdir), 1.0) == []


def test_everything_is_measured_through_vllm(job: Job) -> None:
    """All promised metrics are numbers, of the three models, in plausible ranges for random weights."""
    evaluated = job.manifests()["evaluate"]
    metrics = evaluated.metrics
    for name in ("teacher", "student", "quantized"):
        for metric in ("accuracy", "perplexity", "ece", "tokens_per_s", "ttft_s", "peak_rss_bytes", "params"):
            assert metrics[f"{name}.{metric}"] is not None, f"{name}.{metric}"
        low, high = evaluated.intervals[f"{name}.perplexity"]
        assert low <= (metrics[f"{name}.perplexity"] or 0) <= high
    assert evaluated.notes["engine"].startswith("vllm")
    assert 0 <= (metrics["quantized.kl_to_teacher"] or 0) < 10
    ratio = (metrics["quantized.perplexity"] or 0) / (metrics["student.perplexity"] or 1)
    assert ratio == pytest.approx(1.0, abs=0.25)
    offline = metrics["quantized.offline_perplexity"] or 0
    assert metrics["quantized.perplexity"] == pytest.approx(offline, rel=0.01)
    assert metrics["quantized.params"] == metrics["student.params"]
    assert (metrics["quantized.bytes"] or 0) < 0.6 * (metrics["student.bytes"] or 0)


def test_vllm_and_the_cache_agree_about_the_teacher(job: Job) -> None:
    """The trainer's cached log-probabilities (Hugging Face) and the engine's differ only by bf16 noise."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoModelForCausalLM

    (cache,) = (job.root / "cache").glob("teacher-evaluation-*")
    scored = pq.read_table(cache / "scores.parquet").to_pylist()[0]
    row = json.loads((cache / "rows.jsonl").read_text().splitlines()[0])
    model = AutoModelForCausalLM.from_pretrained(job.root / "teacher", dtype=torch.float32)
    ids = row["ids"] + row["completion"]
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(row["ids"]) - 1, len(ids) - 1)
    expected = [float(logprobs[p, ids[p + 1]]) for p in places]
    assert np.array(scored["actual"]) == pytest.approx(np.array(expected), abs=0.15)
