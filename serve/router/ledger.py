"""Evidence: integer counts by route, rollout, assigned arm and split version, flushed as numbered deltas.

Only requests that say something about the arm they were randomly assigned to are counted. Latency buckets
hold non-failed requests; time to first token only counts streaming requests, because the first byte of a
whole answer is its last. Knows nothing about the tests that read the counts.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from typing import NamedTuple

from contracts.metrics import LATENCY_BUCKETS_S, SCORE_VALUES, ArmCounts, score_bin
from contracts.rollout import LedgerEntry

_BUCKETS = len(LATENCY_BUCKETS_S) + 1


class EvidenceKey(NamedTuple):
    """What one line of evidence is about."""

    route: str
    rollout_id: str
    arm: str
    split_version: int


def bucket_of(seconds: float) -> int:
    """Index of the latency bucket whose upper edge is the first one not below `seconds`."""
    return bisect_left(LATENCY_BUCKETS_S, seconds)


class _Tally:
    __slots__ = ("e2e", "errors", "n", "scores", "ttft")

    def __init__(self) -> None:
        self.n = self.errors = 0
        self.scores: dict[str, list[int]] = {}
        self.ttft = [0] * _BUCKETS
        self.e2e = [0] * _BUCKETS

    def counts(self) -> ArmCounts:
        return ArmCounts(
            n=self.n,
            errors=self.errors,
            ttft=tuple(self.ttft),
            e2e=tuple(self.e2e),
            scores={name: tuple(found) for name, found in self.scores.items()},
        )


class Ledger:
    """Counts of one router process. Counting happens on its event loop, grades arrive from another thread."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._lock = threading.Lock()
        self._tallies: dict[EvidenceKey, _Tally] = {}
        self._unstored: list[LedgerEntry] = []
        self._seq = 0

    def count(self, key: EvidenceKey, failed: bool, ttft_s: float | None, e2e_s: float) -> None:
        """Count one ended request; latencies of failed ones are not evidence."""
        with self._lock:
            tally = self._tally(key)
            tally.n += 1
            if failed:
                tally.errors += 1
                return
            tally.e2e[bucket_of(e2e_s)] += 1
            if ttft_s is not None:
                tally.ttft[bucket_of(ttft_s)] += 1

    def score(self, key: EvidenceKey, grader: str, score: float) -> None:
        """Count one graded answer; it may come long after the request was counted."""
        at = score_bin(score)
        with self._lock:
            scores = self._tally(key).scores
            found = scores.get(grader)
            if found is None:
                found = scores[grader] = [0] * len(SCORE_VALUES)
            found[at] += 1

    def cut(self) -> list[LedgerEntry]:
        """Everything not yet stored, oldest first, numbered; call `stored` once it is in the state store."""
        with self._lock:
            tallies, self._tallies = self._tallies, {}
            now = time.time()
            for key, tally in tallies.items():
                self._seq += 1
                self._unstored.append(
                    LedgerEntry(
                        replica=self._replica, seq=self._seq, at=now, counts=tally.counts(), **key._asdict()
                    )
                )
            return list(self._unstored)

    def backlog(self) -> int:
        """How many numbered entries are not in the state store yet."""
        with self._lock:
            return len(self._unstored)

    def stored(self, entries: list[LedgerEntry]) -> None:
        """Forget entries that the state store has."""
        done = {e.seq for e in entries}
        with self._lock:
            self._unstored = [e for e in self._unstored if e.seq not in done]

    def _tally(self, key: EvidenceKey) -> _Tally:
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = _Tally()
        return tally
