"""How well a judge agrees with people: agreement with its interval, Cohen's kappa, position bias. Pure.

Kappa: Cohen, Educational and Psychological Measurement 20 (1960); weighted: Psychological Bulletin 70 (1968).
Interval: Wilson, JASA 22 (1927). Knows nothing about how verdicts were got.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from contracts.config import Record

_Z95 = 1.959963984540054
WITHIN = 0.2
"""A score this close to people's agrees with them."""
_GRADES = 10
_VALUES = {"a": 1.0, "tie": 0.5, "b": 0.0}


class Anchor(Record):
    """One judgement of people: of a pair (`answer_a`, `answer_b`, `human`) or of one answer."""

    request: dict[str, Any]
    answer_a: str | None = None
    answer_b: str | None = None
    human: Literal["a", "b", "tie"] | None = None
    answer: str | None = None
    human_score: float | None = Field(default=None, ge=0.0, le=1.0)
    """0 (useless) to 1 (nothing to improve)."""

    @model_validator(mode="after")
    def _one_form(self) -> Anchor:
        pair = (self.answer_a, self.answer_b, self.human)
        single = (self.answer, self.human_score)
        if None not in pair and single == (None, None):
            return self
        if None not in single and pair == (None, None, None):
            return self
        raise ValueError("give 'answer_a', 'answer_b' and 'human', or 'answer' and 'human_score'")

    @property
    def pairwise(self) -> bool:
        """True for a pair."""
        return self.human is not None

    @property
    def truth(self) -> float:
        """What people said: of a pair 1 for a, ½ for a tie, 0 for b; of one answer its score."""
        if self.human is not None:
            return _VALUES[self.human]
        assert self.human_score is not None
        return self.human_score


def agrees(said: float | None, truth: float, pairwise: bool) -> bool:
    """True when a judge said what people said. An unreadable verdict agrees with nobody."""
    if said is None:
        return False
    return said == truth if pairwise else abs(said - truth) <= WITHIN + 1e-9


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share. Without any trial it is everything."""
    if n == 0:
        return 0.0, 1.0
    p, zz = hits / n, _Z95 * _Z95
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = _Z95 / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def kappa(said: Sequence[float | None], truth: Sequence[float], pairwise: bool) -> float | None:
    """Cohen's kappa of judge and people: 1 is agreement, 0 what chance would give.

    Of pairs over {a, tie, b}, an unreadable verdict being a fourth word; of scores weighted quadratically
    over 0…10, the unreadable left out. None when nothing is left, or both always say one and the same thing.
    """
    if not pairwise:
        known = [(s, t) for s, t in zip(said, truth, strict=True) if s is not None]
        return _weighted([(round(s * _GRADES), round(t * _GRADES)) for s, t in known])
    words = [(s if s is not None else -1.0, t) for s, t in zip(said, truth, strict=True)]
    n = len(words)
    if n == 0:
        return None
    observed = sum(s == t for s, t in words) / n
    labels = {w for pair in words for w in pair}
    chance = sum(sum(s == w for s, _ in words) * sum(t == w for _, t in words) for w in labels) / n**2
    return None if chance >= 1.0 else (observed - chance) / (1.0 - chance)


def _weighted(pairs: list[tuple[int, int]]) -> float | None:
    if not pairs:
        return None
    n = len(pairs)
    observed = sum((s - t) ** 2 for s, t in pairs) / n
    expected = sum((s - t) ** 2 for s, _ in pairs for _, t in pairs) / n**2
    return None if expected == 0 else 1.0 - observed / expected


def position_bias(
    straight: Sequence[float | None], swapped: Sequence[float | None]
) -> tuple[float | None, float | None]:
    """(share of decided verdicts for the answer shown first, share of anchors whose verdict the order
    changed).

    Args:
        straight: value for a, with a shown first.
        swapped: value for a, with b shown first.
    """
    first = [v == 1.0 for v in straight if v in (0.0, 1.0)] + [v == 0.0 for v in swapped if v in (0.0, 1.0)]
    both = [(s, w) for s, w in zip(straight, swapped, strict=True) if s is not None and w is not None]
    return (
        sum(first) / len(first) if first else None,
        sum(s != w for s, w in both) / len(both) if both else None,
    )
