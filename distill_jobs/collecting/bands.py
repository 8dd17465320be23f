"""Which texts to compare: locality-sensitive hashing over bands of MinHash signatures, and sketches of one
bit a value that refuse most pairs that only share a band by chance.

Bands: Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4. Sketches: Li and König, "b-Bit Minwise
Hashing", 2010, with b = 1. Knows nothing about texts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill_jobs.collecting.shingles import PERMUTATIONS, U32, U64, mix

MISSED = 2e-4
"""Largest chance that a pair exactly at the threshold shares no band."""
_SIGMAS = 5.0
_WORDS = PERMUTATIONS // 64
# No bands hold a threshold of exactly 1; candidates at 0.98 hold all of those.
_HIGHEST = 0.98


class Bands(NamedTuple):
    """`count` bands of `rows` signature values each; two texts are candidates when one band is equal."""

    count: int
    rows: int


def choose_bands(threshold: float) -> Bands:
    """The longest bands that still miss at most MISSED of the pairs at the threshold: the longer, the fewer
    pairs are compared for nothing.
    """
    at = min(threshold, _HIGHEST)
    for rows in range(PERMUTATIONS, 1, -1):
        count = PERMUTATIONS // rows
        if (1 - at**rows) ** count <= MISSED:
            return Bands(count, rows)
    return Bands(PERMUTATIONS, 1)


def band_keys(signed: U32, bands: Bands) -> U64:
    """The key of each band of each text, shape (bands, texts)."""
    keys = np.empty((bands.count, len(signed)), np.uint64)
    for band in range(bands.count):
        key = np.full(len(signed), band + 1, np.uint64)
        for row in range(band * bands.rows, (band + 1) * bands.rows):
            key = mix(key * np.uint64(0x9E3779B97F4A7C15) + signed[:, row])
        keys[band] = key
    return keys


def sketches(signed: U32) -> U64:
    """One bit of each signature value, shape (texts, PERMUTATIONS / 64)."""
    bits = (signed * np.uint32(0x9E3779B1)) >> np.uint32(31)
    return np.packbits(bits.astype(np.uint8), axis=1).view(np.uint64).reshape(len(signed), _WORDS)


def may_resemble(left: U64, right: U64, threshold: float) -> NDArray[np.bool_]:
    """False where two sketches differ more than they would at the threshold, by five standard deviations.

    Bits agree with probability (1 + J) / 2.
    """
    agree = (1 + threshold) / 2
    allowed = PERMUTATIONS * (1 - agree) + _SIGMAS * math.sqrt(PERMUTATIONS * agree * (1 - agree)) + 1
    differing = np.bitwise_count(left ^ right).sum(axis=1, dtype=np.int64)
    result: NDArray[np.bool_] = differing <= allowed
    return result
