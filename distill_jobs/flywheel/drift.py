"""Has the traffic changed? Two samples of conversations, compared by a seeded permutation test.

Pure. A conversation is one observation, however many words it has, so permuting whole conversations is exact
under "nothing changed". Knows nothing about logs or where samples are kept.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np

from contracts.config import Record

BUCKETS = 256
"""Words are hashed into so many: one byte each."""
LENGTHS = 24
"""Lengths in characters are compared on a scale of powers of two."""
MAX_WORDS = 256
"""Words of a conversation that are kept."""
MAX_PERMUTATIONS = 100_000
_CHUNK = 256
_ENOUGH = 10
"""Exceedances after which a p-value is large enough to be known (Besag and Clifford, 1991)."""
_WORD = re.compile(r"[a-z0-9_]+|\w")  # a script without spaces: its characters

Statistic = Callable[[np.ndarray], np.ndarray]
"""[permutations, units] of 0/1 (1: recent) → the statistic of each permutation."""


class Unit(NamedTuple):
    """What is kept of one conversation: no text."""

    key: int
    """Hash of the conversation's id, 63 bits: a sample of the smallest is uniform over conversations."""
    ts: float
    words: bytes
    """Bucket of each word."""
    length: int
    """Characters."""


class Look(Record):
    """One test. `fired` needs both: more than chance gives (p ≤ alpha), and enough to matter."""

    kind: Literal["words", "length", "grades", "feedback"]
    value: float
    """Bits of divergence beyond chance; of grades the fall of the mean; of feedback the lower bound of the
    bad share."""
    bound: float
    p: float
    alpha: float
    """What this look may spend."""
    reference: int
    """Conversations in the training window's sample; of feedback the bad judgements."""
    recent: int
    """Conversations in the latest sample; of feedback all judgements."""

    @property
    def fired(self) -> bool:
        """True when it starts a run."""
        return self.p <= self.alpha and self.value >= self.bound

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        if self.kind == "feedback":
            return (
                f"{self.reference} of {self.recent} judgements are bad: "
                f"a share of at least {self.value:.3f} (bound {self.bound:g})"
            )
        what = "grades fell by" if self.kind == "grades" else f"{self.kind} diverge by"
        unit = "" if self.kind == "grades" else " bits"
        test = f"bound {self.bound:g}, p {self.p:.2g}, may spend {self.alpha:.2g}"
        return f"{what} {self.value:.3f}{unit} ({test})"


def spend(alpha: float, look: int) -> float:
    """What the look-th look (from 1) may spend: alpha / (look (look + 1)); all looks together spend alpha."""
    return alpha / (look * (look + 1))


def features(text: str) -> tuple[bytes, int]:
    """(bucket of each word, length) of a conversation's normalised text."""
    words = _WORD.findall(text)[:MAX_WORDS]
    return bytes(zlib.crc32(w.encode()) % BUCKETS for w in words), len(text)


def compare_requests(
    reference: Sequence[Unit], recent: Sequence[Unit], bound: float, alpha: float, seed: int
) -> list[Look]:
    """Words and lengths, each at half of alpha."""
    both = [*reference, *recent]
    words = np.stack([_word_shares(u.words) for u in both])
    lengths = np.zeros((len(both), LENGTHS), dtype=np.float32)
    lengths[np.arange(len(both)), [min(u.length.bit_length(), LENGTHS - 1) for u in both]] = 1
    looks = []
    for kind, rows in (("words", words), ("length", lengths)):
        value, p = permute(_divergence(rows), len(reference), len(recent), bound, alpha / 2, seed)
        looks.append(_look(kind, value, bound, p, alpha / 2, len(reference), len(recent)))
    return looks


def compare_grades(
    reference: Sequence[float], recent: Sequence[float], bound: float, alpha: float, seed: int
) -> Look:
    """One-sided: a fall of the mean."""
    scores = np.asarray([*reference, *recent], dtype=np.float64)
    m, total = len(recent), float(scores.sum())

    def fall(chosen: np.ndarray) -> np.ndarray:
        late = chosen @ scores
        return np.asarray((total - late) / len(reference) - late / m)

    value, p = permute(fall, len(reference), m, bound, alpha, seed)
    return _look("grades", value, bound, p, alpha, len(reference), m)


def permute(
    statistic: Statistic, n: int, m: int, bound: float, alpha: float, seed: int
) -> tuple[float, float]:
    """(statistic beyond its mean under permutation, p-value) of units 0…n-1 against n…n+m-1.

    Sequential (Besag and Clifford 1991): it ends once 10 permutations reached the observed value, p is then
    10 / permutations, else (exceedances + 1) / (permutations + 1); both are valid p-values. A difference that
    is below `bound` after the first chunk is not tested further: it could not fire.
    """
    observed = np.zeros((1, n + m), dtype=np.float32)
    observed[0, n:] = 1
    seen = float(statistic(observed)[0])
    most = min(MAX_PERMUTATIONS, math.ceil(2 / alpha))
    rng = np.random.default_rng(seed)
    reached, done, total = 0, 0, 0.0
    while done < most:
        values = statistic(_labels(rng, min(_CHUNK, most - done), n, m))
        done += len(values)
        total += float(values.sum())
        reached += int((values >= seen - 1e-9).sum())
        if reached >= _ENOUGH:
            return seen - total / done, reached / done
        if seen - total / done < bound:
            break
    return seen - total / done, (reached + 1) / (done + 1)


def _labels(rng: np.random.Generator, count: int, n: int, m: int) -> np.ndarray:
    order = rng.random((count, n + m), dtype=np.float32).argpartition(m - 1, axis=1)[:, :m]
    chosen = np.zeros((count, n + m), dtype=np.float32)
    np.put_along_axis(chosen, order, 1.0, axis=1)
    return chosen


def _divergence(rows: np.ndarray) -> Statistic:
    total = rows.sum(0)

    def of(chosen: np.ndarray) -> np.ndarray:
        late = chosen @ rows
        return jensen_shannon(total - late, late)

    return of


def jensen_shannon(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits of histograms [..., buckets] (Lin, 1991); an empty one counts as
    zero divergence.
    """
    p = a / np.maximum(a.sum(-1, keepdims=True), 1e-12)
    q = b / np.maximum(b.sum(-1, keepdims=True), 1e-12)
    mean = (p + q) / 2
    return np.asarray(_entropy(mean) - (_entropy(p) + _entropy(q)) / 2)


def _entropy(p: np.ndarray) -> np.ndarray:
    p = np.maximum(p, 0)
    return np.asarray(-(p * np.log2(np.where(p > 0, p, 1))).sum(-1))


def _word_shares(words: bytes) -> np.ndarray:
    counts = np.bincount(np.frombuffer(words, dtype=np.uint8), minlength=BUCKETS).astype(np.float32)
    return counts / max(1.0, float(counts.sum()))


def _look(kind: Any, value: float, bound: float, p: float, alpha: float, n: int, m: int) -> Look:
    return Look(kind=kind, value=value, bound=bound, p=p, alpha=alpha, reference=n, recent=m)


def judge_feedback(bad: int, total: int, bound: float, alpha: float) -> Look:
    """The lower bound of the bad share, at level alpha, against a bound."""
    value = wilson_lower(bad, total, alpha)
    return Look(kind="feedback", value=value, bound=bound, p=alpha, alpha=alpha, reference=bad, recent=total)


def wilson_lower(bad: int, total: int, alpha: float) -> float:
    """One-sided lower confidence bound of a share (Wilson, 1927)."""
    if total == 0:
        return 0.0
    z = NormalDist().inv_cdf(1 - alpha)
    share = bad / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, (centre - spread) / (1 + z * z / total))
