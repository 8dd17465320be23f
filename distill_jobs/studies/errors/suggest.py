"""What data to collect: for each losing slice, how many more training rows, and under which assumption.

The assumption is a learning curve: a slice's loss falls as n^-c in its training rows, so that bringing its
share s down to the others' t takes n (s/t)^(1/c) of them. Knows nothing about where rows come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_jobs.studies.errors.features import Predicates
from distill_jobs.studies.errors.slices import Slice

EXPONENT = 0.5
"""c where no study has measured it; fits of classification errors lie between 0.3 and 0.7 (Hestness 2017)."""
_MOST = 10.0
"""Never more than ten times a slice's rows: beyond that the law is not to be believed."""
_FEW = 50
"""Rows a slice should have before its share of errors says anything about data."""


@dataclass(frozen=True)
class Suggestion:
    """Rows to add for one slice."""

    slice: Slice
    have: int
    more: int

    @property
    def why(self) -> str:
        """For a person."""
        if self.have < _FEW:
            return "hardly any rows"
        return f"loses {self.slice.share:.0%}, others {self.slice.elsewhere:.0%}"


def suggestions(
    slices: Sequence[Slice], training: Predicates, rows: int, exponent: float = EXPONENT
) -> list[Suggestion]:
    """By slice, in their order; `training` are the same predicates on the `rows` training samples."""
    found = []
    for one in slices:
        have = _count(one, training, rows)
        # No loss elsewhere is measured as less than one request.
        target = max(one.elsewhere, 0.5 / max(1, one.requests))
        wanted = max(_FEW, have * min(_MOST, (one.share / target) ** (1 / exponent)))
        found.append(Suggestion(one, have, max(0, int(np.ceil(wanted)) - have)))
    return found


def _count(one: Slice, training: Predicates, rows: int) -> int:
    nobody = np.zeros(rows, dtype=bool)
    mask = np.ones(rows, dtype=bool)
    for predicate in one.predicates:
        mask &= training.get(predicate, nobody)
    return int(mask.sum())
