"""One model's measurements, made of what the engine wrote about it: statistics by request, plain figures, and
a readable row a request.

Knows nothing about how the engine was run or who reads the result.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from contracts.plugins import load_function
from distill_jobs.config import EvaluateConfig
from distill_jobs.engine import read_lines
from distill_jobs.measuring.calibration import calibration, confidence_of, reliability
from distill_jobs.measuring.classes import class_function, class_statistics, classes_of, table
from distill_jobs.measuring.scores import against_teacher, likelihood
from distill_jobs.measuring.statistics import Statistic, mean_of
from distill_jobs.measuring.texts import against_references


@dataclass(frozen=True)
class Output:
    """What the engine wrote about one model."""

    answers: list[dict[str, Any]]
    """By request: {"text", "logprobs", …}."""
    scores: list[dict[str, Any]]
    done: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """The answers."""
        return [answer["text"] for answer in self.answers]


@dataclass(frozen=True)
class Measured:
    """One model on the evaluation requests."""

    statistics: dict[str, Statistic]
    figures: dict[str, float | None]
    """What is no function of the requests: speed, memory, counts."""
    details: dict[str, Any]
    """For a report: F1 by class, reliability bins."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """By request: {"text", "right", "class", "confidence"}."""


def read_output(folder: Path) -> Output:
    """Read a finished engine job."""
    answers = {row["id"]: row for row in read_lines(folder / "answers.jsonl")}
    return Output(
        [answers[i] for i in range(len(answers))],
        pq.read_table(folder / "scores.parquet").to_pylist(),
        json.loads((folder / "done.json").read_text(encoding="utf-8")),
    )


def measure(
    config: EvaluateConfig,
    dataset: Sequence[dict[str, Any]],
    own: Output,
    teacher: Output | None,
    scored_texts: dict[int, str],
) -> Measured:
    """Everything about one model.

    Args:
        dataset: rows {"request", "answer"?}.
        teacher: None when the model is the teacher, whose own answers are then no references.
        scored_texts: the texts whose tokens `own.scores` holds, by request.
    """
    size = len(dataset)
    requests = [row["request"] for row in dataset]
    references = references_of(dataset, teacher)
    found = likelihood(own.scores, scored_texts, size)
    if teacher is not None and own.done.get("teachers_tokens", True):
        found |= against_teacher(teacher.scores, own.scores, size)
    found |= against_references(own.texts, references, config.bleu_tokenize)
    figures = _figures(own.done)
    graded = _grades(config, requests, own.texts)
    if graded is not None:
        found["accuracy"] = mean_of(graded)
        figures["graded"] = float(sum(g is not None for g in graded))
    details: dict[str, Any] = {}
    classes: list[str | None] = [None] * size
    actual: list[str | None] = [None] * size
    if config.classes is not None:
        classify = class_function(config.classes)
        classes, actual = (
            classes_of(classify, requests, own.texts),
            classes_of(classify, requests, references),
        )
        found |= class_statistics(classes, actual)
        details["classes"] = table(classes, actual)
    right = _first(graded, _equal(classes, actual), _same(own.texts, references))
    confidence = [confidence_of(answer, config.confidence) for answer in own.answers]
    calibrated = calibration(confidence, right, config.ece_bins)
    found |= calibrated
    if "ece" in calibrated:
        details["reliability"] = reliability(calibrated["ece"])
    rows = [
        {"text": t, "right": r, "class": c, "confidence": p}
        for t, r, c, p in zip(own.texts, right, classes, confidence, strict=True)
    ]
    return Measured(found, figures, details, rows)


def references_of(dataset: Sequence[dict[str, Any]], teacher: Output | None) -> list[str | None]:
    """The dataset's answers, and the teacher's where it has none."""
    taught: Sequence[str | None] = [None] * len(dataset) if teacher is None else teacher.texts
    return [row.get("answer", text) for row, text in zip(dataset, taught, strict=True)]


def _grades(
    config: EvaluateConfig, requests: Sequence[dict[str, Any]], texts: Sequence[str]
) -> list[float | None] | None:
    if config.grader is None:
        return None
    grade: Callable[[dict[str, Any], str], bool | None] = load_function(config.grader, "evaluate.grader")
    grades = [grade(request, text) for request, text in zip(requests, texts, strict=True)]
    return [None if g is None else float(bool(g)) for g in grades]


def _equal(classes: Sequence[str | None], actual: Sequence[str | None]) -> list[float | None]:
    return [None if a is None else float(c == a) for c, a in zip(classes, actual, strict=True)]


def _same(texts: Sequence[str], references: Sequence[str | None]) -> list[float | None]:
    return [
        None if r is None else float(t.strip() == r.strip()) for t, r in zip(texts, references, strict=True)
    ]


def _first(*judgements: list[float | None] | None) -> list[float | None]:
    """The first judgement that knows anything: the grader's, else the class's, else equality of the text."""
    for judgement in judgements:
        if judgement is not None and any(j is not None for j in judgement):
            return judgement
    return judgements[-1] or []


def _figures(done: dict[str, Any]) -> dict[str, float | None]:
    speed, memory = done["speed"], done.get("memory", {})
    return {
        "tokens_per_s": speed["tokens_per_s"],
        "ttft_s": statistics.median(speed["ttft_s"]) if speed.get("ttft_s") else None,
        "peak_rss_bytes": memory.get("peak_rss"),
        "gpu_bytes": memory.get("gpu") or None,
    }
