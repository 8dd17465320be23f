"""Slices where a student loses to its teacher: every predicate, and every pair, tested and corrected.

A request is lost when the teacher is right and the student is not. Each slice's share of lost requests is
held against that of all others with Fisher's exact test; Benjamini and Hochberg's correction over all slices
that were looked at keeps the false ones among those listed below the level. Knows nothing about what a
predicate means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import false_discovery_control, hypergeom

from distill_jobs.studies.errors.features import Predicates

Predicate = tuple[str, str]

_ALIKE = 0.8
"""Two slices whose lost requests overlap by this much (Jaccard) are one finding; the surer one is told."""
_SHARPER = 1.3
"""A pair of predicates must lose so many times the share that either loses alone."""


@dataclass(frozen=True)
class Slice:
    """Requests for which all predicates hold."""

    predicates: tuple[Predicate, ...]
    requests: int
    lost: int
    elsewhere: float
    """Share of the other requests that is lost."""
    p: float
    q: float
    """p corrected for all slices looked at (Benjamini, Hochberg 1995)."""

    @property
    def share(self) -> float:
        """Share of the slice's requests that is lost."""
        return self.lost / self.requests

    @property
    def name(self) -> str:
        """For a person."""
        return " and ".join(f"{attribute} {value}" for attribute, value in self.predicates)


@dataclass(frozen=True)
class Found:
    """The slices that hold, the worst first, and how many were looked at."""

    slices: list[Slice]
    tested: int


def find(predicates: Predicates, lost: np.ndarray, least: int, level: float = 0.05, most: int = 20) -> Found:
    """Slices of at least `least` requests that lose more than the rest do, q at most `level`."""
    masks = _masks(predicates, least)
    if not masks or not lost.any():
        return Found([], len(masks))
    every = np.array(list(masks.values()))
    size, hits = every.sum(1), (every & lost).sum(1)
    # One-sided Fisher: hits or more of the lost ones in a draw of this size.
    p = hypergeom.sf(hits - 1, len(lost), int(lost.sum()), size)
    q = false_discovery_control(p)
    rest = (lost.sum() - hits) / np.maximum(1, len(lost) - size)
    candidates = [
        (Slice(names, int(size[i]), int(hits[i]), float(rest[i]), float(p[i]), float(q[i])), every[i])
        for i, names in enumerate(masks)
        if q[i] <= level and hits[i] / size[i] > rest[i]
    ]
    shares = {names: hits[i] / size[i] for i, names in enumerate(masks)}
    candidates.sort(key=lambda c: (c[0].p, len(c[0].predicates)))
    kept = _distinct([c for c in candidates if _sharper(c[0], shares)], lost)
    return Found(kept[:most], len(masks))


def _masks(predicates: Predicates, least: int) -> dict[tuple[Predicate, ...], np.ndarray]:
    """The requests of each predicate and of each pair of different attributes; every set of them once, under
    its first and simplest name.
    """
    found: dict[tuple[Predicate, ...], np.ndarray] = {}
    seen: set[bytes] = set()

    def add(names: tuple[Predicate, ...], mask: np.ndarray) -> None:
        key = np.packbits(mask).tobytes()
        if least <= mask.sum() < len(mask) and key not in seen:
            seen.add(key)
            found[names] = mask

    for name, mask in predicates.items():
        add((name,), mask)
    for (one, first), (two, second) in combinations(predicates.items(), 2):
        # Two words are as good a pair as any; two lengths cannot both hold.
        if one[0] != two[0] or one[0] == "word":
            add((one, two), first & second)
    return found


def _sharper(one: Slice, shares: dict[tuple[Predicate, ...], float]) -> bool:
    """A pair must say more than its parts."""
    if len(one.predicates) == 1:
        return True
    parts = [shares.get((p,), 0.0) for p in one.predicates]
    return one.share >= _SHARPER * max(parts)


def _distinct(candidates: Sequence[tuple[Slice, np.ndarray]], lost: np.ndarray) -> list[Slice]:
    """Candidates come surest first; one whose lost requests another one has already is left out."""
    kept: list[tuple[Slice, np.ndarray]] = []
    for one, mask in candidates:
        mine = mask & lost
        if all((mine & other).sum() < _ALIKE * (mine | other).sum() for _, other in kept):
            kept.append((one, mine))
    return [one for one, _ in kept]
