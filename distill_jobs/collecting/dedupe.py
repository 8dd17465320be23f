"""Duplicates over all samples: exact ones by digest, near ones as clusters, what resembles a held-out text.

MinHash finds candidates and the exact Jaccard similarity decides, so the threshold means what it says.
Order of arrival plays no part: all goes by digest. Keeps all signatures in memory (about 1 kB a sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_jobs.collecting.shingles import PERMUTATIONS, jaccard, minhash, shingles, signature

Sample = dict[str, Any]

# Candidates cost a set intersection, missed pairs cost a leak: weigh false negatives nine to one.
_WEIGHTS = (0.1, 0.9)


def drop_exact(samples: Sequence[Sample]) -> list[Sample]:
    """One sample a digest, sorted by digest; of several answers the latest (the teacher of today) stays, a
    person's correction before any.
    """
    latest: dict[str, Sample] = {}
    for sample in samples:
        old = latest.get(sample["sample_digest"])
        if old is None or _rank(sample) > _rank(old):
            latest[sample["sample_digest"]] = sample
    return [latest[d] for d in sorted(latest)]


def _rank(sample: Sample) -> tuple[bool, bool, float, str]:
    return sample["answer"] is not None, sample["corrected"], sample["ts"], sample["request_id"]


def drop_resembling(
    samples: Sequence[Sample], held_out: Sequence[str], threshold: float | None
) -> list[Sample]:
    """Samples that resemble no held-out (normalised) text; without a threshold, that equal none."""
    texts = set(held_out)
    left = [s for s in samples if s["text"] not in texts]
    if threshold is None or not texts:
        return left
    ordered = sorted(texts)
    index = _Index(threshold)
    for number, text in enumerate(ordered):
        index.add(str(number), signature(text))
    return [
        s
        for s in left
        if not any(
            jaccard(shingles(s["text"]), shingles(ordered[int(n)])) >= threshold
            for n in index.near(s["signature"])
        )
    ]


def clusters(samples: Sequence[Sample], threshold: float | None) -> list[list[Sample]]:
    """Connected groups of near-duplicates, each sorted by digest; groups in order of their first digest."""
    parent = list(range(len(samples)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    if threshold is not None:
        for a, b in _near_pairs(samples, threshold):
            low, high = sorted((find(a), find(b)))
            parent[high] = low
    groups: dict[int, list[Sample]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(find(i), []).append(sample)
    ordered = [sorted(g, key=lambda s: str(s["sample_digest"])) for g in groups.values()]
    return sorted(ordered, key=lambda g: str(g[0]["sample_digest"]))


def _near_pairs(samples: Sequence[Sample], threshold: float) -> list[tuple[int, int]]:
    index = _Index(threshold)
    pairs = []
    for i, sample in enumerate(samples):
        mine = shingles(sample["text"])
        for key in index.near(sample["signature"]):
            j = int(key)
            if jaccard(mine, shingles(samples[j]["text"])) >= threshold:
                pairs.append((j, i))
        index.add(str(i), sample["signature"])
    return pairs


class _Index:
    """datasketch's LSH index over signatures."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        # datasketch has no bands for a threshold of exactly 1; candidates at 0.98 hold all of those.
        self._lsh = MinHashLSH(threshold=min(threshold, 0.98), num_perm=PERMUTATIONS, weights=_WEIGHTS)

    def add(self, key: str, values: Sequence[int]) -> None:
        self._lsh.insert(key, minhash(values), check_duplication=False)

    def near(self, values: Sequence[int]) -> list[str]:
        return sorted(self._lsh.query(minhash(values)))
