"""Which new texts resemble one that is there: exact Jaccard similarity of character 5-grams, no candidates
missed.

The index holds the new texts only, a window of them; those that are there pass by one at a time, however many
they are. Knows nothing about samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from distill_jobs.collecting.shingles import shingles


class Index:
    """Texts by their shingles. Without a threshold, only equal texts resemble each other."""

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        self._sizes: list[int] = []
        self._texts: dict[str, list[int]] = {}
        self._holders: dict[str, list[int]] = {}

    def add(self, text: str) -> None:
        """Put a text in; it is named by its number, from 0."""
        number, own = len(self._sizes), shingles(text)
        self._texts.setdefault(text, []).append(number)
        self._sizes.append(len(own))
        for shingle in own:
            self._holders.setdefault(shingle, []).append(number)

    def near(self, text: str) -> set[int]:
        """Numbers of the texts that resemble this one."""
        if self._threshold is None:
            return set(self._texts.get(text, ()))
        mine = shingles(text)
        known = [s for s in mine if s in self._holders]
        if len(known) < self._threshold * len(mine):  # the union is no smaller than `mine`
            return set()
        shared = Counter(n for s in known for n in self._holders[s])  # sizes of the intersections
        limit = self._threshold
        return {n for n, both in shared.items() if both / (len(mine) + self._sizes[n] - both) >= limit}


def unlike(texts: Sequence[str], others: Iterable[str], threshold: float | None) -> list[bool]:
    """True for each text that resembles none of the others."""
    index = Index(threshold)
    for text in texts:
        index.add(text)
    found: set[int] = set()
    for other in others:
        found |= index.near(other)
    return [number not in found for number in range(len(texts))]


def apart(texts: Sequence[str], threshold: float | None) -> list[bool]:
    """True for each text that resembles none of those before it that are True."""
    index = Index(threshold)
    kept = []
    for text in texts:
        kept.append(not index.near(text))
        if kept[-1]:
            index.add(text)
    return kept
