"""errors: where a student loses to its teacher, by slice, class and example, and what data would help.

Reads a finished job's workdir and writes a report beside it; measures nothing. Knows nothing about engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from distill_jobs.studies.errors.features import predicates
from distill_jobs.studies.errors.read import Answers, Training, read_answers, read_training
from distill_jobs.studies.errors.slices import Found, find
from distill_jobs.studies.errors.suggest import EXPONENT, Suggestion, suggestions


@dataclass(frozen=True)
class Analysis:
    """One student against one other model."""

    model: str
    against: str
    answers: Answers
    lost: np.ndarray
    """[requests] bool: the other is right and the student is not."""
    gained: np.ndarray
    """The other way round."""
    p: float
    """McNemar's exact test (1947): could lost and gained be as many?"""
    found: Found
    suggestions: list[Suggestion]
    worst: list[int]
    """Lost requests to look at: the ones it was surest of, every slice's first."""
    training_rows: int


def analyse(
    workdir: Path, model: str = "student", against: str = "teacher", least: int = 10, level: float = 0.05,
    examples: int = 12, exponent: float = EXPONENT,
) -> Analysis:  # fmt: skip
    """Compare a job's student with its teacher (or another model that was evaluated).

    Args:
        least: requests a slice must have.
        level: share of false findings allowed among the slices (q).
        exponent: c of the learning curve n^-c behind the suggested counts.
    """
    answers, training = read_answers(workdir, model, against), read_training(workdir)
    right, theirs = answers.right[model], answers.right[against]
    lost, gained = theirs & ~right, right & ~theirs
    known = predicates(answers.requests, answers.references, answers.classes, least)
    found = find(known, lost, least, level)
    names = {p for one in found.slices for p in one.predicates}
    wanted = _suggested(found, training, names, exponent)
    disagree = int(lost.sum() + gained.sum())
    p = float(binomtest(int(lost.sum()), disagree).pvalue) if disagree else 1.0
    masks = [np.logical_and.reduce([known[n] for n in one.predicates]) for one in found.slices]
    worst = _worst(lost, np.array(answers.confidence), masks, examples)
    return Analysis(model, against, answers, lost, gained, p, found, wanted, worst, len(training.requests))


def _suggested(
    found: Found, training: Training, names: set[tuple[str, str]], exponent: float
) -> list[Suggestion]:
    words = frozenset(value for attribute, value in names if attribute == "word")
    there = predicates(training.requests, training.answers, training.classes, 1, words)
    return suggestions(found.slices, there, len(training.requests), exponent)


def _worst(lost: np.ndarray, confidence: np.ndarray, masks: list[np.ndarray], most: int) -> list[int]:
    """The surest mistake of every slice, then the surest ones left."""
    order = [int(i) for i in np.argsort(-confidence, kind="stable") if lost[i]]
    chosen: list[int] = []
    for mask in masks:
        first = next((i for i in order if mask[i] and i not in chosen), None)
        if first is not None:
            chosen.append(first)
    return (chosen + [i for i in order if i not in chosen])[:most]
