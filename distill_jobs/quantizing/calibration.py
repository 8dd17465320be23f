"""Which logged samples calibrate a quantization: those that together cover lengths and texts.

The first N of a split are the N least digests: a fair draw, in which what is rare may be missing. Here
samples fall into strata of length, and in each the next one taken is the one with most pairs of tokens not
seen yet (greedy maximum coverage, Nemhauser et al. 1978), so near-copies of a sample are the last to be
taken. Knows nothing about quantization.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contracts.errors import DataError
from distill_jobs.samples import each
from distill_jobs.tokens import ChatTokenizer

_STRATA = 8
_POOL = 16
"""Candidates a wanted sample: coverage is chosen among so many, whatever the log's size."""


def calibration_rows(
    tokenizer: ChatTokenizer, collected: dict[str, Path], samples: int, max_tokens: int
) -> list[dict[str, Any]]:
    """`samples` rows {"ids"}: logged requests with their answers, cut to `max_tokens`, chosen to cover;
    filled from the training split where the calibration split is too small. Raises: DataError when there are
    none.
    """
    rows = _tokenised(tokenizer, each(collected["calibration"]), max_tokens, _POOL * samples)
    if len(rows) < samples:
        rows += _tokenised(tokenizer, each(collected["train"]), max_tokens, _POOL * samples - len(rows))
    if not rows:
        raise DataError("There is nothing to calibrate on: collect kept no sample.")
    return [{"ids": rows[i]} for i in choose(rows, samples)]


def _tokenised(
    tokenizer: ChatTokenizer, samples: Iterable[dict[str, Any]], max_tokens: int, most: int
) -> list[list[int]]:
    found: list[list[int]] = []
    for sample in samples:
        if len(found) == most:
            break
        answer = [] if sample["answer"] is None else tokenizer.answer(sample["answer"])
        ids = tokenizer.prompt(sample["request"], sample["messages"]) + answer
        found.append(ids[:max_tokens])
    return found


def choose(rows: Sequence[Sequence[int]], wanted: int) -> list[int]:
    """Places of `wanted` rows (or all there are) that cover lengths and token pairs; in the order taken.

    The same rows give the same choice. Strata are quantiles of length and take turns.
    """
    if len(rows) <= wanted:
        return list(range(len(rows)))
    lengths = np.array([len(row) for row in rows])
    strata = np.array_split(np.argsort(lengths, kind="stable"), min(_STRATA, wanted))
    pairs = [set(itertools.pairwise(row)) or {(-1, len(row))} for row in rows]
    left = [dict.fromkeys(int(i) for i in stratum) for stratum in strata]
    seen: set[tuple[int, int]] = set()
    taken: list[int] = []
    while len(taken) < wanted:
        before = len(taken)
        for stratum in left:
            if not stratum or len(taken) == wanted:
                continue
            # Coverage a token: a long row must not win by its length alone.
            best = max(stratum, key=lambda i: len(pairs[i] - seen) / max(1, lengths[i]))
            if pairs[best] <= seen:
                continue
            del stratum[best]
            seen |= pairs[best]
            taken.append(best)
        if len(taken) == before:
            seen.clear()  # all of it is covered: cover it once more
    return taken
