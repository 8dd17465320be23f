"""How hard a sample is: by the teacher's own log-probability of its answer, or by the text's length and
rarity.

Rarity is that of character 5-grams over all samples, counted by hash. Knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_jobs.collecting.parts import done, finish, read_batches, save_array
from distill_jobs.collecting.shingles import windows

_BINS = 1 << 18
_CHUNK = 1000

F32 = NDArray[np.float32]


def shingle_counts(texts: Sequence[str]) -> NDArray[np.int64]:
    """How often each hashed 5-gram occurs in the texts, shape (2**18,)."""
    counts = np.zeros(_BINS, np.int64)
    for at in range(0, len(texts), _CHUNK):
        hashed, edges = windows(texts[at : at + _CHUNK])
        inside = np.zeros(len(hashed) + 1, np.int64)
        np.add.at(inside, edges[::2], 1)
        np.add.at(inside, edges[1::2], -1)
        own = np.cumsum(inside)[:-1] > 0
        counts += np.bincount(hashed[own] % _BINS, minlength=_BINS)
    return counts


def text_difficulty(texts: Sequence[str], answers: Sequence[str | None], rarity: F32) -> F32:
    """log(1 + characters of request and answer) × mean rarity (negative log frequency, nats) of the request's
    5-grams.
    """
    made = np.empty(len(texts), np.float32)
    for at in range(0, len(texts), _CHUNK):
        some = texts[at : at + _CHUNK]
        hashed, edges = windows(some)
        sums = np.add.reduceat(rarity[hashed % _BINS].astype(np.float64), edges)[::2]
        chars = [len(t) + len(a or "") for t, a in zip(some, answers[at : at + _CHUNK], strict=True)]
        made[at : at + _CHUNK] = np.log1p(chars) * sums / (edges[1::2] - edges[::2])
    return made


def rarity_of(counts: NDArray[np.int64]) -> F32:
    """Negative log frequency of each hashed 5-gram, add-one smoothed."""
    return (-np.log((counts + 1) / (counts.sum() + len(counts)))).astype(np.float32)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Write both measures of a partition's samples; a missing log-probability is NaN. `task` holds folder,
    partition and rarity (a file).
    """
    finished = done(task)
    if finished is not None:
        return finished
    folder, number = Path(task["folder"]), task["partition"]
    rarity = np.load(task["rarity"])
    by_text, by_logprob = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    for batch in read_batches(folder / f"{number:04d}.arrow"):
        by_text.append(text_difficulty(batch["text"].to_pylist(), batch["answer"].to_pylist(), rarity))
        by_logprob.append(-batch["logprob"].fill_null(float("nan")).to_numpy(zero_copy_only=False))
    save_array(
        folder / f"{number:04d}.hard.npy", np.stack([np.concatenate(by_text), np.concatenate(by_logprob)])
    )
    return finish(task, {"rows": sum(map(len, by_text))})
