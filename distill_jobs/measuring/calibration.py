"""Is a model as sure as it is right? Expected calibration error, Brier score, reliability bins.

A confidence is a probability that the model gave its own answer (`confidence_of` says which). Knows nothing
about who judged the answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jobs.measuring.statistics import Statistic, mean_of


def confidence_of(answer: dict[str, Any], kind: str) -> float | None:
    """Of an answer as the engine wrote it: `answer` is exp of the mean log-probability of its tokens (their
    geometric mean, so that long answers are not unsure by length), `first_token` the first token's
    probability. None for an answer without tokens.
    """
    logprobs = answer.get("logprobs") or []
    if not logprobs:
        return None
    chosen = logprobs[0] if kind == "first_token" else sum(logprobs) / len(logprobs)
    return min(1.0, math.exp(chosen))


def calibration(
    confidence: Sequence[float | None], right: Sequence[float | None], bins: int
) -> dict[str, Statistic]:
    """ECE over equal-width bins (b/bins, (b+1)/bins], and the Brier score."""
    rows = np.zeros((len(right), 3, bins))
    brier: list[float | None] = []
    for i, (c, r) in enumerate(zip(confidence, right, strict=True)):
        if c is None or r is None:
            brier.append(None)
            continue
        rows[i, :, _bin(c, bins)] = (1.0, c, r)
        brier.append((c - r) ** 2)
    if not rows.any():
        return {}
    return {"ece": Statistic(rows.reshape(len(right), -1), "ece"), "brier": mean_of(brier)}


def reliability(ece: Statistic) -> list[dict[str, float]]:
    """The bins with requests in them: their range, count, mean confidence and share of right answers."""
    counts, confidence, right = np.split(ece.rows.sum(0), 3)
    width = 1 / len(counts)
    return [
        {
            "from": b * width,
            "to": (b + 1) * width,
            "requests": int(n),
            "confidence": float(c / n),
            "accuracy": float(r / n),
        }
        for b, (n, c, r) in enumerate(zip(counts, confidence, right, strict=True))
        if n
    ]


def _bin(confidence: float, bins: int) -> int:
    return min(bins - 1, max(0, math.ceil(confidence * bins) - 1))
