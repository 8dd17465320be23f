"""A study's report.md: the sentence about data, tables, pictures. Knows nothing of trials or Ray."""

from __future__ import annotations

import re
from pathlib import Path

from contracts.config import write_atomic
from distill_jobs.studies import plots
from distill_jobs.studies.config import StudyConfig
from distill_jobs.studies.learning_curve import sentence
from distill_jobs.studies.summary import Interval, Line, Summary


def write_report(study: StudyConfig, summary: Summary) -> Path:
    """Write report.md and its pictures into the study's folder; returns the report."""
    folder = study.folder
    text = [f"# Study of {study.distill}", "", _about(study), ""]
    if summary.gain is not None and summary.curve is not None:
        plots.learning_curve(study, summary, folder / "data-size.png")
        text += ["## Size of the data", "", sentence(summary.gain, study.metric, study.level), ""]
        text += ["![Metric by training rows](data-size.png)", "", *_share_table(study, summary), ""]
        text += [_how(study), ""]
    for name, lines in summary.knobs.items():
        picture = f"knob-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.png"
        plots.knob(study, name, lines, summary.base, folder / picture)
        text += [f"## {name}", "", best(study, name, lines), "", f"![{name}]({picture})", ""]
        text += [*_knob_table(study, lines, summary.base), ""]
    write_atomic(folder / "report.md", "\n".join(text))
    return folder / "report.md"


def best(study: StudyConfig, name: str, lines: list[Line]) -> str:
    """What a sweep says in one sentence."""
    surely = [line for line in lines if line.verdict == "better"]
    if surely:
        top = max(surely, key=lambda line: line.gain or 0.0)
        return (
            f"{top.setting.name} is better than the base: {study.metric} improves by"
            f" {top.gain:.3g} ({_range(top.gain_interval)})."
        )
    if len(study.seeds) < 2:
        return f"With one seed nobody can say whether a value of {name} is better than the base."
    return f"No value of {name} is surely better than the base."


def _about(study: StudyConfig) -> str:
    seeds = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"
    changes = ", ".join(f"{k} = {v}" for k, v in study.set.items())
    return (
        f"{study.metric}, {'less' if study.minimise else 'more'} is better; {seeds};"
        f" intervals at {study.level:.0%}, Student's t over the seeds."
        + (f" Base: {changes}." if changes else "")
    )


def _how(study: StudyConfig) -> str:
    assert study.data is not None
    budget = (
        "every share is passed over as often, so less data is also fewer steps"
        if study.data.budget == "epochs"
        else "every share gets as many optimizer steps"
    )
    return (
        f"Shares are nested by digest, each seed with an order of its own; {budget}. The curve is a + b n^-c"
        " by least squares, its interval a residual bootstrap's. What lies beyond the measured rows is"
        " extrapolation: it holds as long as the new rows are like the old ones."
    )


def _share_table(study: StudyConfig, summary: Summary) -> list[str]:
    lines = [f"| rows | share | {study.metric} | interval |", "|---:|---:|---:|---|"]
    for line in summary.shares:
        lines.append(
            f"| {line.rows:,} | {line.setting.share:.0%} | {line.mean:.4g} | {_range(line.interval)} |"
        )
    return lines


def _knob_table(study: StudyConfig, lines: list[Line], base: Line) -> list[str]:
    rows = [f"| value | {study.metric} | interval | better than the base by | |", "|---|---:|---|---|---|"]
    shown = lines if any(line.gain is None for line in lines) else [base, *lines]
    for line in shown:
        value = "(base)" if line.setting.knob is None else str(line.setting.value)
        gain = "" if line.gain is None else f"{line.gain:.3g} ({_range(line.gain_interval)})"
        rows.append(f"| {value} | {line.mean:.4g} | {_range(line.interval)} | {gain} | {line.verdict} |")
    return rows


def _range(interval: Interval | None) -> str:
    return "one seed" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
