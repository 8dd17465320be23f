"""In-context demonstrations for the teacher alone: solved samples that look like the request, put before it.

The student learns from distributions that were made with them and reads requests without (context
distillation). Likeness is lexical: cosine of TF-IDF over character 3- to 5-grams. Knows nothing about tokens.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

_BLOCK = 1024
_SYSTEM = ("system", "developer")
_KEPT = ("sample_digest", "text", "messages", "answer")
READ = (*_KEPT, "task")
"""Columns of a sample that the pool looks at."""

Sample = dict[str, Any]


class Pool:
    """Solved samples to choose from: of a stream of any length the first `most` by digest, and no more of
    them in memory.
    """

    def __init__(self, samples: Iterable[Sample], most: int) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        solved = ({name: s[name] for name in _KEPT} for s in samples if _solved(s))
        self._solved = heapq.nsmallest(most, solved, key=lambda s: str(s["sample_digest"]))
        self._vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32)
        if self._solved:
            self._shown = self._vectors.fit_transform([s["text"] for s in self._solved]).T.tocsr()

    def choose(self, samples: Sequence[Sample], k: int) -> list[list[Sample]]:
        """For each sample the k most similar of the pool, the most similar first.

        Never the sample itself, nor one of the same text (its answer would be given away).
        """
        if not self._solved:
            return [[] for _ in samples]
        chosen = []
        for start in range(0, len(samples), _BLOCK):
            block = samples[start : start + _BLOCK]
            likeness = (self._vectors.transform([s["text"] for s in block]) @ self._shown).toarray()
            for sample, scores in zip(block, likeness, strict=True):
                best = (self._solved[i] for i in np.argsort(-scores, kind="stable"))
                chosen.append(list(islice((other for other in best if not _same(sample, other)), k)))
        return chosen


def _same(a: Sample, b: Sample) -> bool:
    return bool(a["sample_digest"] == b["sample_digest"] or a["text"] == b["text"])


def _solved(sample: Sample) -> bool:
    """Only whole and simple samples: a system's instructions come once, before all demonstrations."""
    turns = [m["role"] for m in json.loads(sample["messages"]) if m["role"] not in _SYSTEM]
    return (
        bool(sample["answer"] and sample["text"].strip())
        and turns == ["user"]
        and sample.get("task") in (None, "answer")
    )


def fitting(
    sample: Sample, demonstrations: Sequence[Sample], length: Callable[[list[dict[str, Any]]], int], most: int
) -> list[dict[str, Any]]:
    """The teacher's conversation with as many demonstrations as `most` tokens hold; the least similar go
    first.
    """
    for count in range(len(demonstrations), 0, -1):
        shown = shown_to_teacher(sample, demonstrations[:count])
        if length(shown) <= most:
            return shown
    return shown_to_teacher(sample, ())


def shown_to_teacher(sample: Sample, demonstrations: Sequence[Sample]) -> list[dict[str, Any]]:
    """The sample's conversation as the teacher sees it: its system's messages, the demonstrations (the most
    similar last, next to the request), its own turns.
    """
    own = json.loads(sample.get("teacher_messages") or sample["messages"])
    system = [m for m in own if m["role"] in _SYSTEM]
    turns = [m for m in own if m["role"] not in _SYSTEM]
    solved: list[dict[str, Any]] = []
    for demonstration in reversed(demonstrations):
        asked = [m for m in json.loads(demonstration["messages"]) if m["role"] == "user"]
        solved += [*asked, {"role": "assistant", "content": demonstration["answer"]}]
    return [*system, *solved, *turns]
