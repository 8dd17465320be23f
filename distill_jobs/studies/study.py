"""study: one-knob sweeps and the data-size ablation of a distillation job, from its logs to a report.

What the trials share (collect, teach) is made once for each configuration of it, in `<folder>/job`; trials
train in `<folder>/trials/<key>`. Interrupted anywhere, the same call goes on. Knows nothing about Ray Tune.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contracts.config import dump_resolved
from contracts.dataset import Manifest
from contracts.errors import DataError
from distill_jobs.config import DistillConfig
from distill_jobs.evaluation_set import pin_dataset
from distill_jobs.keys import model_digest, model_folder, sha256_of
from distill_jobs.pipeline import order_of, run_pipeline
from distill_jobs.progress import Listener
from distill_jobs.stage import locked
from distill_jobs.studies.config import StudyConfig
from distill_jobs.studies.report import write_report
from distill_jobs.studies.run_trial import TrialJob, run_trial
from distill_jobs.studies.summary import Metrics, Summary, summarise
from distill_jobs.studies.trials import Setting, Trial, trial_key, trials_of
from distill_jobs.studies.tune import OnDone, run_trials

_AFTER_TEACH = {"train", "quantize", "evaluate", "gates", "publish"}
"""Sections of a job that its training rows do not depend on."""

Runner = Callable[[list[TrialJob], Path, int, float, str, OnDone], None]


@dataclass(frozen=True)
class StudyResult:
    """A finished study and its report on disk."""

    summary: Summary
    report: Path


def run_study(
    study: StudyConfig,
    say: Callable[[str], None] = print,
    listener: Listener | None = None,
    on_done: OnDone = lambda done, total: None,
    runner: Runner = run_trials,
) -> StudyResult:
    """Run what is not finished, and write the report. Raises: what a stage raises; ConfigError for a knob."""
    trials = trials_of(study)
    with locked(study.folder):
        dump_resolved(study, study.folder / "study.json")
        jobs = _jobs(study, trials, say, listener)
        distinct = list({job.folder: job for job in jobs}.values())
        config = trials[0].config
        cpus = config.train.workers * config.train.cpus_per_worker
        parallel = _parallel(study, config)
        say(f"study: {len(distinct)} trials, {parallel} at a time, in {study.folder / 'trials'}")
        runner(distinct, study.folder, parallel, cpus, config.ray, on_done)
        found: dict[Setting, list[Metrics]] = {}
        for trial, job in zip(trials, jobs, strict=True):
            found.setdefault(trial.setting, []).append(run_trial(job))
        _check(study, found)
        summary = summarise(study, found)
        return StudyResult(summary, write_report(study, summary))


def _jobs(
    study: StudyConfig, trials: list[Trial], say: Callable[[str], None], listener: Listener | None
) -> list[TrialJob]:
    """Each trial with the rows it learns from; collect and teach run here, once for each way to do them."""
    made: dict[str, dict[str, Manifest]] = {}
    jobs = []
    for trial in trials:
        config = trial.config
        shared = sha256_of(config.model_dump(mode="json", exclude=_AFTER_TEACH))
        if shared not in made:
            order = order_of(config)
            for stage in order[: order.index("train")]:
                made[shared] = run_pipeline(config, only=stage, say=say, listener=listener).manifests
        jobs.append(_job(study, trial, made[shared]))
    return jobs


def _job(study: StudyConfig, trial: Trial, manifests: dict[str, Manifest]) -> TrialJob:
    config = trial.config
    collected, taught = manifests["collect"], manifests["teach"]
    key = trial_key(trial, taught.outputs["train"].digest, study.evaluate)
    dataset, dataset_digest = pin_dataset(config.evaluate, config.workdir)
    return TrialJob(
        folder=str((study.folder / "trials" / key).resolve()),
        config=_absolute(config).model_dump(mode="json"),
        share=trial.setting.share,
        seed=trial.seed,
        rows={split: str(taught.output(split)) for split in ("train", "validation")},
        evaluate=study.evaluate,
        collected={name: str(collected.output(name)) for name in collected.outputs},
        dataset=str(dataset),
        dataset_digest=dataset_digest,
        teacher_digest=model_digest(config.teacher) if study.evaluate else "",
        keep_models=study.keep_models,
    )


def _absolute(config: DistillConfig) -> DistillConfig:
    """The configuration as a worker with a working directory of its own must have it."""
    changes: dict[str, object] = {"cache_dir": config.cache_dir.resolve(), "ray": "auto"}
    if Path(config.student).exists():
        changes["student"] = str(Path(config.student).resolve())
    changes["teacher"] = str(model_folder(config.teacher))
    shape = config.train.shape
    if shape is not None and Path(shape.tokenizer).is_dir():
        shape = shape.model_copy(update={"tokenizer": str(Path(shape.tokenizer).resolve())})
        changes["train"] = config.train.model_copy(update={"shape": shape})
    return config.model_copy(update=changes)


def _parallel(study: StudyConfig, config: DistillConfig) -> int:
    """As many trials as the machine has CPUs for; an engine beside training would spoil both's figures."""
    if study.parallel is not None:
        return study.parallel
    if study.evaluate:
        return 1
    return max(1, (os.cpu_count() or 1) // (config.train.workers * max(1, config.train.threads)))


def _check(study: StudyConfig, found: dict[Setting, list[Metrics]]) -> None:
    """Raises: DataError when the study's metric was not measured, naming those that were."""
    for setting, metrics in found.items():
        for one in metrics:
            if one.get(study.metric) is None:
                have = ", ".join(sorted(name for name, value in one.items() if value is not None))
                raise DataError(f"{study.metric} was not measured ({setting.name}). There is: {have}.")
