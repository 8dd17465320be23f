"""One trial, from its rows to its metrics: `result.json` in the trial's folder, written last.

Run again it goes on from the training's checkpoints; finished, it is not run. Knows nothing about other
trials or what schedules them.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.config import parse_config, write_atomic
from distill_jobs import evaluate, quantize, train
from distill_jobs.config import DistillConfig
from distill_jobs.progress import Progress
from distill_jobs.studies.subsets import write_subset
from distill_jobs.studies.validation import validation_losses

RESULT = "result.json"


@dataclass(frozen=True)
class TrialJob:
    """All that a worker on another node needs to know, as plain values."""

    folder: str
    config: dict[str, Any]
    """A DistillConfig as JSON values."""
    share: float
    seed: int
    rows: dict[str, str]
    """Folders of the teach stage's splits."""
    evaluate: bool = False
    collected: dict[str, str] | None = None
    """Files of the collect stage's splits, for quantization."""
    dataset: str = ""
    dataset_digest: str = ""
    teacher_digest: str = ""
    keep_models: bool = False

    @property
    def result(self) -> Path:
        """The trial's metrics, once it is finished."""
        return Path(self.folder) / RESULT


def run_trial(job: TrialJob, trainer: train.Trainer | None = None) -> dict[str, float | None]:
    """Train and measure; `trainer` replaces Ray Train's in tests."""
    if job.result.is_file():
        found: dict[str, float | None] = json.loads(job.result.read_text(encoding="utf-8"))
        return found
    config = parse_config(job.config, DistillConfig)
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder / "progress.json")
    progress.begin("train")
    rows = write_subset(Path(job.rows["train"]), job.share, job.seed, folder / "rows")
    began = time.monotonic()
    made = train.run(config.train, rows, config.student, folder, progress, config.ray, trainer)
    metrics: dict[str, float | None] = {
        "rows": float(json.loads((rows / "manifest.json").read_text(encoding="utf-8"))["rows"]),
        "train.seconds": round(time.monotonic() - began, 3),
        "train.steps": made.metrics.get("step"),
    }
    student = Path(made.outputs["student"].path)
    metrics |= validation_losses(student, Path(job.rows["validation"]))
    if job.evaluate:
        metrics |= _evaluated(job, config, student, folder, progress)
    write_atomic(job.result, json.dumps(metrics, indent=1) + "\n")
    progress.end("done")
    if not job.keep_models:
        _remove_models(folder, student)
    return metrics


def _evaluated(
    job: TrialJob, config: DistillConfig, student: Path, folder: Path, progress: Progress
) -> dict[str, float | None]:
    """The stages quantize and evaluate on the trial's student."""
    quantized, measured = folder / "quantize", folder / "evaluate"
    for one in (quantized, measured):
        one.mkdir(exist_ok=True)
    progress.begin("quantize")
    splits = {name: Path(file) for name, file in (job.collected or {}).items()}
    artifact = quantize.run(config.quantize, student, splits, quantized, progress)
    progress.begin("evaluate")
    models = {
        "teacher": Path(config.teacher),
        "student": student,
        "quantized": Path(artifact.outputs["artifact"].path),
    }
    subjects = evaluate.Subjects(
        models=models,
        teacher_digest=job.teacher_digest,
        dataset=Path(job.dataset),
        dataset_digest=job.dataset_digest,
        cache_dir=config.cache_dir,
    )
    return evaluate.run(config.evaluate, subjects, measured, progress).metrics


def _remove_models(folder: Path, student: Path) -> None:
    """A study of a hundred trials would fill the disk with models that nobody will look at."""
    for leftover in (student, folder / f"{student.name}.run", folder / "quantize", folder / "rows"):
        shutil.rmtree(leftover, ignore_errors=True)
