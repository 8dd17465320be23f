"""Similarity of two texts: character 5-grams, their MinHash signature, their exact Jaccard similarity.

Characters rather than words, because Chinese has no spaces. Knows nothing about samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHINGLE_CHARS = 5
PERMUTATIONS = 128
SEED = 1
# Named, because stored values carry no trace of it; datasketch 2.0 refuses to mix schemes.
SCHEME = "affine32"


def shingles(text: str) -> frozenset[str]:
    """The character 5-grams of a text; a shorter text is its own only shingle."""
    if len(text) <= SHINGLE_CHARS:
        return frozenset([text])
    return frozenset(text[i : i + SHINGLE_CHARS] for i in range(len(text) - SHINGLE_CHARS + 1))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Exact Jaccard similarity of two shingle sets."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def signature(text: str) -> list[int]:
    """MinHash signature of a text."""
    from datasketch import MinHash

    hashed = MinHash(num_perm=PERMUTATIONS, seed=SEED, scheme=SCHEME)
    hashed.update_batch([s.encode() for s in shingles(text)])
    return [int(v) for v in hashed.hashvalues]


def minhash(values: Sequence[int]) -> Any:
    """A stored signature as datasketch's object."""
    import numpy as np
    from datasketch import LeanMinHash

    return LeanMinHash(seed=SEED, hashvalues=np.array(values, dtype=np.uint32), scheme=SCHEME)
