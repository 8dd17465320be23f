"""A search's report: its table as JSON, its front as a picture, its winner as a job's configuration.

Knows nothing about how anything was found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from contracts.config import parse_config, write_atomic
from distill_jobs.config import DistillConfig
from distill_jobs.search.config import Precision, SearchConfig
from distill_jobs.search.halving import front
from distill_jobs.search.search import Found, Outcome
from distill_jobs.search.space import Frame, block_params, group_of, shape_config
from distill_jobs.search.students import shrink_config
from distill_jobs.studies.plots import new_figure, write_figure

REPORT, PICTURE, WINNER = "report.json", "front.png", "winner.yaml"
_ABOUT_PRECISION = ("scheme", "algorithm", "granularity", "group_size", "format", "budget_bytes")
"""Fields of a job's quantize section that the winner's precision decides."""
_INK, _BLUE, _AMBER, _GREY = "#0f172a", "#2563eb", "#d97706", "#94a3b8"


def write_report(config: SearchConfig, job: DistillConfig, outcome: Outcome) -> None:
    """All three files, into the search's folder; no winner's without a winner."""
    folder, kept = config.folder, front_of(outcome.found)
    rows = [_row(one, outcome) | {"front": one.candidate.name in kept} for one in outcome.found]
    chosen = None if outcome.chosen is None else outcome.chosen.candidate.name
    report = {"chosen": chosen, "rungs": [vars(rung) for rung in outcome.plan], "rows": rows}
    write_atomic(folder / REPORT, json.dumps(report, indent=1) + "\n")
    draw(outcome, folder / PICTURE)
    if outcome.chosen is not None:
        text = yaml.safe_dump(winner(config, job, outcome.chosen, outcome.frame), sort_keys=False)
        told = f"# {chosen}, chosen by `stillhouse search`: {outcome.chosen.candidate.bytes:,} bytes.\n"
        write_atomic(folder / WINNER, told + text)


def front_of(found: list[Found]) -> list[str]:
    """Names of those that none is better than in bytes and loss, by everybody's last loss: those that left
    early were trained less."""
    return front({one.candidate.name: (float(one.candidate.bytes), one.loss) for one in found})


def winner(config: SearchConfig, job: DistillConfig, chosen: Found, frame: Frame) -> dict[str, Any]:
    """The job with the chosen student in it: `stillhouse distill` takes it, and finds the job's own rows.

    Raises: ConfigError where the job's other settings do not go with the student.
    """
    shape, precision = chosen.candidate.shape, chosen.candidate.precision
    data: dict[str, Any] = job.model_dump(mode="json", exclude_unset=True)
    train = {k: v for k, v in data.get("train", {}).items() if k not in ("shape", "shrink", "fake_quant")}
    if config.start == "cut":
        data["student"] = job.teacher
        train["shrink"] = shrink_config(shape, config.importance_rows).model_dump(
            mode="json", exclude_none=True
        )
    else:
        train["shape"] = shape_config(frame, shape, job.teacher).model_dump(mode="json")
    data["train"] = train
    changes = quantize_changes(precision)
    kept = {k: v for k, v in data.get("quantize", {}).items() if not changes or k not in _ABOUT_PRECISION}
    data["quantize"] = kept | changes
    parse_config(data, DistillConfig, source="the winner's job")
    return data


def quantize_changes(precision: Precision) -> dict[str, Any]:
    """The quantize section's fields of a precision; bf16 has none, since every job quantizes."""
    group = group_of(precision)
    if group is not None:
        return {"scheme": "W4A16", "granularity": "group", "group_size": group}
    return {"scheme": "W8A8", "granularity": "channel"} if precision == "w8a8" else {}


def _row(one: Found, outcome: Outcome) -> dict[str, Any]:
    candidate = one.candidate
    predicted = None if outcome.model is None else 1e3 * outcome.model.step_s(candidate)
    return {
        "name": candidate.name,
        "bytes": candidate.bytes,
        "memory_bytes": candidate.memory,
        "block_params": block_params(outcome.frame, candidate.shape),
        "rung": one.rung + 1,
        "tokens": one.tokens,
        "loss": one.loss,
        "predicted_step_ms": predicted,
        "tokens_per_s": one.tokens_per_s,
        "fits": one.fits,
    }


def draw(outcome: Outcome, file: Path) -> None:
    """Bytes against held-out loss; a marker's area is how far it was trained, the front is joined."""
    figure, axis = new_figure(7.2, 4.4)
    kept, most = front_of(outcome.found), max(one.tokens for one in outcome.found)
    chosen = None if outcome.chosen is None else outcome.chosen.candidate.name
    for one in outcome.found:
        name, place = one.candidate.name, (one.candidate.bytes / 1e6, one.loss)
        colour = _AMBER if name == chosen else _BLUE if name in kept else _GREY
        axis.scatter(*place, s=12 + 60 * one.tokens / most, color=colour, zorder=4)
        if name == chosen or name in kept:
            axis.annotate(name, place, fontsize=6, xytext=(4, 4), textcoords="offset points", color=_INK)
    line = sorted((f.candidate.bytes / 1e6, f.loss) for f in outcome.found if f.candidate.name in kept)
    axis.plot([x for x, _ in line], [y for _, y in line], color=_BLUE, linewidth=1, alpha=0.5)
    axis.margins(x=0.2)
    axis.set_xlabel("weights, MB (front in blue, chosen in amber; area: training tokens)")
    axis.set_ylabel("held-out loss")
    axis.set_title("Students within the budget", loc="left", fontsize=11, fontweight="bold")
    write_figure(figure, file)
