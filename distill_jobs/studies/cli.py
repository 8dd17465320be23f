"""`stillhouse study`: sweeps and the data-size ablation from the terminal.

Parses and prints; the work is in study.py, imported only when a study runs, so that --help is instant.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from contracts.errors import ConfigError
from distill_jobs.cli import as_interrupt, ending

if TYPE_CHECKING:
    from distill_jobs.studies.config import StudyConfig
    from distill_jobs.studies.summary import Summary

EPILOG = """A study file names a distillation job and what to vary:

\b
  folder: runs/studies/support
  distill: configs/distill-support.yaml
  set: {train.epochs: 2}                          # the base of every trial
  knobs: {train.optimizer.lr: [0.001, 0.002]}     # one at a time, the others at the base
  data: {shares: [0.1, 0.2, 0.4, 0.7, 1.0], worth: 0.01}
  seeds: [0, 1, 2]

Every setting is trained with every seed. The report (FOLDER/report.md, pictures beside it) has a table with
intervals for each knob, the learning curve, and whether twice the data would bring at least `worth`. Ctrl-C
ends the running trials; the same command goes on. Exit codes: 0 done, 1 an error, 130 stopped."""


def study(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/study-support.yaml.")
    ],
    folder: Annotated[Path | None, typer.Option(help="Folder of the study; overrides the file's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials, and run none.")] = False,
) -> None:
    """Ask which setting is better and whether more data is worth it, with intervals over seeds.

    One knob at a time around a distillation job, and nested shares of its training rows.
    """
    console = Console(stderr=True, highlight=False)
    with ending(console):
        config = _read(config_path, folder)
        if dry_run:
            _print_trials(console, config)
            return
        _run(console, config)


def _read(path: Path, folder: Path | None) -> StudyConfig:
    """The study's file. A relative `distill` is as it stands: from where the command is run."""
    from contracts.config import load_config
    from distill_jobs.studies.config import StudyConfig

    config = load_config(path, StudyConfig, {"folder": str(folder)} if folder is not None else None)
    if not config.distill.is_file():
        raise ConfigError(f"{path}: distill: there is no file {config.distill}.")
    return config


def _run(console: Console, config: StudyConfig) -> None:
    from distill_jobs.studies.study import run_study

    # A scheduler says SIGTERM where a person says Ctrl-C; both must end the workers.
    signal.signal(signal.SIGTERM, as_interrupt)
    told = [-1]

    def on_done(done: int, total: int) -> None:
        if done != told[0]:
            told[0] = done
            console.print(f"study     {done}/{total} trials finished", markup=False)

    result = run_study(config, say=lambda text: console.print(text, markup=False), on_done=on_done)
    _print_summary(console, config, result.summary)
    console.print(f"The report is in {result.report}", markup=False)


def _print_trials(console: Console, config: StudyConfig) -> None:
    from distill_jobs.studies.trials import trials_of

    table = Table("setting", "seed")
    for trial in trials_of(config):
        table.add_row(trial.setting.name, str(trial.seed))
    console.print(table)


def _print_summary(console: Console, config: StudyConfig, summary: Summary) -> None:
    from distill_jobs.studies.learning_curve import sentence
    from distill_jobs.studies.report import best

    table = Table("setting", "rows", config.metric, "interval", "")
    shares = [line for line in summary.shares if line is not summary.base]
    for line in [summary.base, *shares, *(line for lines in summary.knobs.values() for line in lines)]:
        interval = "" if line.interval is None else f"{line.interval[0]:.4g} to {line.interval[1]:.4g}"
        verdict = line.verdict if line.setting.knob is not None else ""
        table.add_row(line.setting.name, f"{line.rows:,}", f"{line.mean:.4g}", interval, verdict)
    console.print(table)
    for knob, lines in summary.knobs.items():
        console.print(best(config, knob, lines), markup=False)
    if summary.gain is not None:
        console.print(sentence(summary.gain, config.metric, config.level), markup=False)
