"""A study's trials as one Ray Tune experiment: so many at a time, restored after a kill, ended by Ctrl-C.

A trial's result is the file it writes, so what Tune remembers only decides what is started again. Knows
nothing about what a trial does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contracts.errors import TrainingError
from distill_jobs.keys import sha256_of
from distill_jobs.ray_session import ray_session
from distill_jobs.studies.run_trial import TrialJob, run_trial
from distill_jobs.ticking import every

OnDone = Callable[[int, int], None]
"""Called with how many trials are finished, of how many."""

_RETRIES = 1
_COUNT_EVERY_S = 2.0


def run_trials(
    jobs: list[TrialJob], folder: Path, parallel: int, cpus_each: float, address: str, on_done: OnDone
) -> None:
    """Run every trial that has no result yet, `parallel` at a time.

    Raises: KeyboardInterrupt after Ctrl-C, when the running trials are ended and the experiment is saved;
    TrainingError naming the trials that failed.
    """
    left = [job for job in jobs if not job.result.is_file()]
    on_done(len(jobs) - len(left), len(jobs))
    if not left:
        return
    # Ray Train's controller takes a CPU beside its workers'. More logical than real ones: they mostly wait.
    with ray_session(address, cpus=int(parallel * (cpus_each + 1)) + 1), _counting(jobs, on_done):
        results = _tuner(jobs, folder, parallel).fit()
    failed = [str(e).strip().splitlines()[-1] for e in results.errors]
    missing = [job.folder for job in jobs if not job.result.is_file()]
    if missing and not failed:
        raise KeyboardInterrupt
    if missing:
        raise TrainingError(
            f"{len(missing)} of {len(jobs)} trials failed: {failed[0]}\n"
            f"The first is {missing[0]}. Run the study again to retry these alone."
        )


def _tuner(jobs: list[TrialJob], folder: Path, parallel: int) -> Any:
    """The experiment of exactly these trials: the one an earlier run left, or a new one."""
    from ray import tune

    name = f"tune-{sha256_of([job.folder for job in jobs])[:12]}"
    where = str((folder / name).resolve())
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Its workers' CPUs are what a trial needs; its own process waits for them.
    trainable = tune.with_resources(_trainable, {"CPU": 0.01})
    if tune.Tuner.can_restore(where):
        return tune.Tuner.restore(where, trainable, resume_unfinished=True, restart_errored=True)
    return tune.Tuner(
        trainable,
        param_space={"job": tune.grid_search([asdict(job) for job in jobs])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=parallel,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder.resolve()),
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            verbose=0,
        ),
    )


def _trainable(space: dict[str, Any]) -> None:
    """What each Tune trial runs, in a process of its own."""
    from ray import tune

    metrics = run_trial(TrialJob(**space["job"]))
    tune.report({name: value for name, value in metrics.items() if value is not None})


def _trial_name(trial: Any) -> str:
    return str(Path(trial.config["job"]["folder"]).name)


@contextmanager
def _counting(jobs: list[TrialJob], on_done: OnDone) -> Iterator[None]:
    """Tell how many results there are, now and then: a restored experiment forgets its callbacks."""

    def count() -> None:
        on_done(sum(job.result.is_file() for job in jobs), len(jobs))

    with every(_COUNT_EVERY_S, count, "study-progress"):
        yield
