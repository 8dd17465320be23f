"""Similarity of two texts: character 5-grams, their exact Jaccard similarity, and MinHash signatures of many
texts at once.

Characters rather than words, because Chinese has no spaces. Signatures only find candidates; what is called
similar is decided by `jaccard`. Knows nothing about samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHINGLE_CHARS = 5
PERMUTATIONS = 256
SEED = 1
_CHUNK = 1000
"""Texts hashed together: their shingles fit the processor's cache (5,000 at once took half as long again)."""
_GAP = "\0" * (SHINGLE_CHARS - 1)

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

_MULTIPLIERS = (0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)


def shingles(text: str) -> frozenset[str]:
    """The character 5-grams of a text; a shorter text is its own only shingle."""
    if len(text) <= SHINGLE_CHARS:
        return frozenset([text])
    return frozenset(text[i : i + SHINGLE_CHARS] for i in range(len(text) - SHINGLE_CHARS + 1))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Exact Jaccard similarity of two shingle sets."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def signatures(texts: Sequence[str]) -> U32:
    """MinHash signatures, shape (texts, PERMUTATIONS): the least of each permutation over a text's shingles
    (Broder 1997). Permutations are odd affine maps modulo 2**32.
    """
    made = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for at in range(0, len(texts), _CHUNK):
        made[at : at + _CHUNK] = _signatures(texts[at : at + _CHUNK])
    return made


def _signatures(texts: Sequence[str]) -> U32:
    hashed, edges = windows(texts)
    scale, shift = _permutations()
    turned = np.empty_like(hashed)
    made = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for i in range(PERMUTATIONS):
        np.multiply(hashed, scale[i], out=turned)
        np.add(turned, shift[i], out=turned)
        made[:, i] = np.minimum.reduceat(turned, edges)[::2]
    return made


def _permutations() -> tuple[U32, U32]:
    draw = np.random.RandomState(SEED)  # RandomState's stream is frozen; default_rng's may change
    scale, shift = (draw.randint(0, 2**32, PERMUTATIONS, dtype=np.uint64) for _ in range(2))
    return (scale | np.uint64(1)).astype(np.uint32), shift.astype(np.uint32)


def windows(texts: Sequence[str]) -> tuple[U32, NDArray[np.int64]]:
    """Hashes of all 5-character windows of the texts laid end to end, and (first, end) of each text's own, in
    one flat array.

    Gaps keep windows from reaching into the next text; the windows that start in a gap are nobody's.
    """
    joined = _GAP.join(texts) + _GAP + "\0"
    chars = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    count = len(chars) - len(_GAP)
    mixed = chars[:count] * np.uint64(0x9E3779B97F4A7C15)
    for at, multiplier in enumerate(_MULTIPLIERS, start=1):
        mixed ^= mixed >> np.uint64(29)
        mixed += chars[at : at + count] * np.uint64(multiplier)
        mixed *= np.uint64(0xE7037ED1A0B428DB)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    edges = np.empty(2 * len(texts), np.int64)
    edges[::2] = np.cumsum(lengths + len(_GAP)) - (lengths + len(_GAP))
    edges[1::2] = edges[::2] + np.maximum(lengths - len(_GAP), 1)
    return mix(mixed).astype(np.uint32), edges


def mix(values: U64) -> U64:
    """Spread 64-bit values so that every bit depends on all (the finalizer of MurmurHash's family)."""
    values = values ^ (values >> np.uint64(32))
    values = values * np.uint64(0xD6E8FEB86659FD93)
    mixed: Any = values ^ (values >> np.uint64(32))
    return mixed
