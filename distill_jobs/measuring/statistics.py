"""A metric as a function of sums over requests, which is all that a value and its interval need.

Every metric here, BLEU and ECE too, depends on its requests only through a sum of a few numbers a request. A
resample of the requests is then a vector of counts, and thousands of resamples are one matrix product. Knows
nothing about what the numbers mean, models or files beyond its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Value = Callable[[np.ndarray], np.ndarray]
"""Sums [..., parts] to values [...]; NaN where a value is not defined."""


@dataclass(frozen=True)
class Statistic:
    """One metric on n requests. A request that says nothing about it (not graded, not scored) is a row of
    zeros.
    """

    rows: np.ndarray
    """[requests, parts], float64."""
    kind: str
    """Name of the function in `VALUES` that makes a value of the sums."""

    def values(self, sums: np.ndarray) -> np.ndarray:
        """Sums [..., parts] to values [...]."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return VALUES[self.kind](sums)

    def value(self) -> float | None:
        """The metric on all requests; None where it is not defined."""
        found = float(self.values(self.rows.sum(0)))
        return found if math.isfinite(found) else None

    @property
    def contributing(self) -> np.ndarray:
        """[requests] bool: the requests that say anything."""
        found: np.ndarray = (self.rows != 0).any(1)
        return found

    @property
    def is_share(self) -> bool:
        """True for a share of requests: each contributes 0 or 1 of 1."""
        if self.kind != "mean":
            return False
        mine = self.rows[self.contributing]
        return bool((mine[:, 1] == 1).all() and np.isin(mine[:, 0], (0.0, 1.0)).all())


def mean_of(values: list[float | None]) -> Statistic:
    """The mean over the requests that have a value."""
    rows = [(0.0, 0.0) if v is None or math.isnan(v) else (float(v), 1.0) for v in values]
    return Statistic(np.array(rows, dtype=np.float64).reshape(len(values), 2), "mean")


def _mean(sums: np.ndarray) -> np.ndarray:
    found: np.ndarray = sums[..., 0] / sums[..., 1]
    return found


def _exp_mean(sums: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.exp(sums[..., 0] / sums[..., 1])
    return found


def _bits(sums: np.ndarray) -> np.ndarray:
    found: np.ndarray = sums[..., 0] / sums[..., 1] / math.log(2)
    return found


def _bleu(sums: np.ndarray) -> np.ndarray:
    from sacrebleu.metrics import BLEU

    scorer = BLEU()
    return np.apply_along_axis(lambda s: _with_length(scorer._compute_score_from_stats, s), -1, sums)


def _chrf(sums: np.ndarray) -> np.ndarray:
    from sacrebleu.metrics import CHRF

    scorer = CHRF()
    return np.apply_along_axis(lambda s: _with_length(scorer._compute_score_from_stats, s), -1, sums)


def _with_length(score: Callable[[list[int]], object], sums: np.ndarray) -> float:
    """A score of summed n-gram statistics; the last part counts requests, and without any there is none."""
    if not sums[-1]:
        return math.nan
    return float(score([int(s) for s in sums[:-1]]).score)  # type: ignore[attr-defined]


def by_class(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 and support, each [..., classes], of sums [..., 3 * classes] = hits, predicted,
    actual. A class that was never predicted has precision 0, as in scikit-learn with zero_division=0.
    """
    hits, predicted, actual = np.split(sums, 3, axis=-1)
    precision = np.where(predicted > 0, hits / np.maximum(predicted, 1), 0.0)
    recall = np.where(actual > 0, hits / np.maximum(actual, 1), 0.0)
    both = precision + recall
    return (
        precision,
        recall,
        np.where(both > 0, 2 * precision * recall / np.maximum(both, 1e-300), 0.0),
        actual,
    )


def _macro(index: int) -> Value:
    """The mean over the classes that occur among the actual ones."""

    def value(sums: np.ndarray) -> np.ndarray:
        parts = by_class(sums)
        present = parts[3] > 0
        found: np.ndarray = (parts[index] * present).sum(-1) / present.sum(-1)
        return found

    return value


def _worst(sums: np.ndarray) -> np.ndarray:
    _, _, f1, support = by_class(sums)
    lowest: np.ndarray = np.where(support > 0, f1, np.inf).min(-1)
    return np.where(np.isinf(lowest), np.nan, lowest)


def _weighted(sums: np.ndarray) -> np.ndarray:
    _, _, f1, support = by_class(sums)
    found: np.ndarray = (f1 * support).sum(-1) / support.sum(-1)
    return found


def _ece(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error (Guo et al. 2017, eq. 5) of sums [..., 3 * bins] = requests, confidence,
    right answers in each bin.
    """
    count, confidence, right = np.split(sums, 3, axis=-1)
    found: np.ndarray = np.abs(confidence - right).sum(-1) / count.sum(-1)
    return found


VALUES: Mapping[str, Value] = {
    "mean": _mean,
    "exp_mean": _exp_mean,
    "bits": _bits,
    "bleu": _bleu,
    "chrf": _chrf,
    "precision_macro": _macro(0),
    "recall_macro": _macro(1),
    "f1_macro": _macro(2),
    "f1_weighted": _weighted,
    "f1_worst": _worst,
    "ece": _ece,
}


def save(statistics: Mapping[str, Statistic], file: Path) -> None:
    """Write them as one compressed npz, atomically."""
    tmp = file.with_name(f".{file.name}.tmp.npz")
    np.savez_compressed(tmp, **{f"{s.kind}:{name}": s.rows for name, s in statistics.items()})  # type: ignore[arg-type]
    tmp.replace(file)


def load(file: Path) -> dict[str, Statistic]:
    """Read what `save` wrote."""
    with np.load(file) as found:
        parts = {key: found[key] for key in found.files}
    return {key.split(":", 1)[1]: Statistic(rows, key.split(":", 1)[0]) for key, rows in parts.items()}
