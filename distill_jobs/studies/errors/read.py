"""What error analysis reads: a job's evaluated requests, and the rows that its student learned from.

Knows nothing about slices.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from contracts.dataset import Manifest
from contracts.errors import ConfigError, DataError, NotFoundError
from distill_jobs.engine import read_lines
from distill_jobs.measuring.classes import class_function, classes_of
from distill_jobs.stage import read_manifest


@dataclass(frozen=True)
class Answers:
    """The gradable requests of one evaluation, with two models' answers."""

    requests: list[dict[str, Any]]
    references: list[str | None]
    classes: list[str | None]
    """Of the references."""
    texts: dict[str, list[str]]
    """By model: the student's and the one it is held against."""
    predicted: dict[str, list[str | None]]
    """By model: the class of its answers."""
    right: dict[str, np.ndarray]
    """By model: [requests] bool."""
    confidence: list[float]
    """The student's, 0 where it has none."""


@dataclass(frozen=True)
class Training:
    """The samples that the student learned from."""

    requests: list[dict[str, Any]]
    answers: list[str | None]
    classes: list[str | None]


def read_answers(workdir: Path, model: str, against: str) -> Answers:
    """Of the newest finished evaluation. Raises: NotFoundError, ConfigError for a model it did not measure,
    DataError when nothing could be graded.
    """
    manifest = newest(workdir, "evaluate")
    if "requests" not in manifest.outputs:
        raise NotFoundError(f"The evaluation in {workdir} is of an older version. Evaluate again.")
    rows = read_lines(manifest.output("requests"))
    have = sorted(rows[0]["models"])
    for name in (model, against):
        if name not in have:
            raise ConfigError(f"The evaluation in {workdir} has no {name!r}. It measured: {', '.join(have)}.")
    rows = [row for row in rows if row["models"][model]["right"] is not None]
    if not rows:
        raise DataError(f"No answer in {workdir} could be graded. Set evaluate.grader or evaluate.classes.")
    requests, references = [r["request"] for r in rows], [r["reference"] for r in rows]
    mine = {name: [r["models"][name] for r in rows] for name in (model, against)}
    return Answers(
        requests,
        references,
        _classes(manifest, requests, references),
        {name: [a["text"] for a in answers] for name, answers in mine.items()},
        {name: [a["class"] for a in answers] for name, answers in mine.items()},
        # A teacher that nobody graded is the reference itself.
        {name: np.array([a["right"] != 0.0 for a in answers]) for name, answers in mine.items()},
        [a["confidence"] or 0.0 for a in mine[model]],
    )


def read_training(workdir: Path) -> Training:
    """The training samples of the newest finished collection, with those a teacher made of them (augment)."""
    evaluated = newest(workdir, "evaluate")
    stage = "augment" if any(workdir.glob("augment-*/manifest.json")) else "collect"
    samples = pq.read_table(newest(workdir, stage).output("train")).to_pylist()
    requests = [_request(sample) for sample in samples]
    answers = [sample["answer"] for sample in samples]
    return Training(requests, answers, _classes(evaluated, requests, answers))


def newest(workdir: Path, stage: str) -> Manifest:
    """The stage's manifest that was started last. Raises: NotFoundError with what to run."""
    if not workdir.is_dir():
        raise NotFoundError(f"There is no folder {workdir}. Give a job's workdir.")
    found = [m for p in workdir.glob(f"{stage}-*") if (m := read_manifest(p)) is not None]
    if not found:
        raise NotFoundError(
            f"{workdir} has no finished {stage} stage. Run `stillhouse distill CONFIG` first."
        )
    return max(found, key=lambda m: m.started_at)


def _classes(manifest: Manifest, requests: list[dict[str, Any]], texts: list[str | None]) -> list[str | None]:
    spec = manifest.config.get("classes")
    if not isinstance(spec, str):
        return [None] * len(texts)
    return classes_of(class_function(spec), requests, texts)


def _request(sample: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(sample["request"])
    if sample.get("messages"):
        body["messages"] = json.loads(sample["messages"])
    return body
