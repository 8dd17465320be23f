"""A pipeline for the flywheel's daemon that keeps the real files and really trains, in seconds.

Called as a run's command: stages, manifests and progress are the pipeline's own classes, the curve comes from
the trainer over random rows. While FOLDER holds `hold`, it stays in its last stage. No Ray, no engine.

    python -m tests.integration.flywheel_pipeline WORKDIR FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from distill_jobs.progress import Progress
from distill_jobs.stage import Job, Result
from distill_jobs.training.progress import PROGRESS, append
from tests.unit.test_training_loop import config, tiny_model, write_rows


def collect(folder: Path) -> Result:
    """Rows to train on."""
    write_rows(folder / "rows")
    return Result(outputs={}, counts={"rows": 24})


def teach(folder: Path) -> Result:
    """What the teacher was asked for."""
    return Result(outputs={}, counts={"teacher_tokens": 1200})


def train(folder: Path, rows: Path) -> Result:
    """A few steps of the real trainer, and the loss of its model on the same rows as the validation."""
    from distill_jobs.training.data import Rows
    from distill_jobs.training.loop import Trainer
    from distill_jobs.training.validation import rows_loss

    settings = config()
    source = Rows(rows, 64, settings.loss.kd_weight > 0)
    trainer = Trainer(tiny_model(), source, settings)
    curve = folder / "student.run" / "0" / PROGRESS
    for metrics in trainer.run():
        append(curve, metrics)
    append(
        curve, {"step": trainer.steps, "steps": trainer.steps, **rows_loss(trainer.model, source, settings)}
    )
    return Result(outputs={}, counts={"steps": trainer.steps})


def main(workdir: Path, world: Path) -> None:
    """Collect, teach and train; then stand in the stage of quantization for as long as asked."""
    job = Job(workdir, Progress(workdir / "progress.json"))
    done = {"collect": job.stage("collect", {}, {}, collect)}
    done["teach"] = job.stage("teach", {}, done, teach)
    rows = job.folder("collect", {}, {}) / "rows"
    done["train"] = job.stage("train", {}, {"teach": done["teach"]}, lambda at: train(at, rows))
    job.progress.begin("quantize")
    while (world / "hold").exists():
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
