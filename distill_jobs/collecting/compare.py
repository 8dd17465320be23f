"""Compares the texts that share a key of a band, in one shard of the keys, and writes the pairs that are
near-duplicates and not yet in one cluster.

Vectorised down to the pairs that a sketch does not refuse; those are decided by exact Jaccard. Knows nothing
about rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_jobs.collecting.bands import may_resemble
from distill_jobs.collecting.parts import Texts, done, finish, save_array
from distill_jobs.collecting.shingles import U64, jaccard, shingles

MOST_IN_BUCKET = 2048
"""Texts with one key that are compared all with all; a larger bucket is split by its other bands first."""
_PAIRS_AT_ONCE = 1 << 19
SAME_TEXT = -1
"""The "band" whose keys are hashes of whole texts."""
_DEPTH = 3
"""Bands that a bucket is split by before it is compared within windows."""
_CACHED_CHARS = 1 << 21
"""Characters whose shingles are kept; they take some 100 bytes each."""

I64 = NDArray[np.int64]


def compare_shard(task: dict[str, Any]) -> dict[str, Any]:
    """Write the joining pairs of `task`'s bands and shard. Done already: reads the report back."""
    finished = done(task)
    if finished is not None:
        return finished
    shard = _Shard(task)
    try:
        for band in task["bands"]:
            shard.run(band)
    finally:
        shard.texts.close()
    save_array(Path(task["out"]), np.array(shard.edges, np.int32).reshape(-1, 2))
    return finish(
        task, {"unchecked": shard.unchecked, "compared": shard.compared, "joined": len(shard.edges)}
    )


class _Shard:
    """One task's work: its buckets, and a union-find over the roots that it joins."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._task, self._folder = task, Path(task["folder"])
        self._threshold: float = task["threshold"]
        self._roots = np.load(task["roots"])
        self._band: int = SAME_TEXT
        self.texts = Texts(self._folder, task["counts"])
        self._sketches = None if SAME_TEXT in task["bands"] else self._all_sketches()
        self._parent: dict[int, int] = {}
        self._sets: dict[int, frozenset[str]] = {}
        self._cached = 0
        self.edges: list[tuple[int, int]] = []
        self.unchecked = self.compared = 0

    def run(self, band: int) -> None:
        """Compare what shares a key of the band."""
        self._band = band
        numbers, keys = self._keys()
        order = np.argsort(keys, kind="stable")
        numbers, keys = numbers[order], keys[order]
        edges = np.flatnonzero(np.diff(keys)) + 1
        starts = np.concatenate([[0], edges])
        sizes = np.diff(np.concatenate([starts, [len(keys)]]))
        if not len(keys):
            return
        roots = self._roots[numbers]
        apart = np.minimum.reduceat(roots, starts) != np.maximum.reduceat(roots, starts)
        for size in np.unique(sizes[apart]):
            chosen = starts[apart & (sizes == size)]
            if band == SAME_TEXT:
                self._join_equal(numbers, chosen, int(size))
            elif size > MOST_IN_BUCKET:
                for start in chosen:
                    self._large(numbers[start : start + size], (self._band,))
            else:
                self._small(numbers, chosen, int(size))

    def _all_sketches(self) -> U64:
        """The sketches of all partitions, filled in one by one: together they would be in memory twice."""
        made, at = None, 0
        for number, count in enumerate(self._task["counts"]):
            part = np.load(self._folder / f"{number:04d}.sketches.npy")
            if made is None:
                made = np.empty((sum(self._task["counts"]), part.shape[1]), np.uint64)
            made[at : at + count] = part
            at += count
        return np.empty((0, 1), np.uint64) if made is None else made

    def _keys(self) -> tuple[I64, U64]:
        """(samples, keys) of this band that fall to this shard; of equal texts only the first takes part."""
        same_text = self._band == SAME_TEXT
        first = None if same_text else np.load(self._folder / "round-00.roots.npy")
        numbers, keys, at = [], [], 0
        for number, count in enumerate(self._task["counts"]):
            file = self._folder / f"{number:04d}.{'same' if same_text else 'bands'}.npy"
            part: U64 = np.load(file) if same_text else _row_of(file, self._band)
            mine = part % np.uint64(self._task["shards"]) == self._task["shard"]
            if first is not None:
                mine &= first[at : at + count] == np.arange(at, at + count)
            numbers.append(np.flatnonzero(mine) + at)
            keys.append(part[mine])
            at += count
        return np.concatenate(numbers), np.concatenate(keys)

    # buckets ---------------------------------------------------------------------------------------

    def _join_equal(self, numbers: I64, starts: I64, size: int) -> None:
        for start in starts:
            bucket = numbers[start : start + size]
            first = self.texts[int(bucket[0])]
            for number in bucket[1:]:
                if self.texts[int(number)] == first:
                    self._join(int(bucket[0]), int(number))

    def _small(self, numbers: I64, starts: I64, size: int) -> None:
        """All pairs of buckets of one size, many buckets at once."""
        if size < 2:
            return
        left, right = np.triu_indices(size, 1)
        at_once = max(1, _PAIRS_AT_ONCE // len(left))
        for at in range(0, len(starts), at_once):
            block = numbers[starts[at : at + at_once, None] + np.arange(size)]
            self._pairs(block[:, left].ravel(), block[:, right].ravel())

    def _pairs(self, left: I64, right: I64) -> None:
        apart = self._roots[left] != self._roots[right]
        left, right = left[apart], right[apart]
        likely = may_resemble(self._sketches[left], self._sketches[right], self._threshold)
        for a, b in zip(left[likely].tolist(), right[likely].tolist(), strict=True):
            if self._find(a) != self._find(b):
                self.compared += 1
                if jaccard(self._set(a), self._set(b)) >= self._threshold:
                    self._join(a, b)

    def _large(self, bucket: I64, split_by: tuple[int, ...]) -> None:
        """A bucket of very many texts. Near-duplicates share other bands too: it is split by each of those;
        what no three bands tell apart is compared within windows, and the rest counted as unchecked.
        """
        # Most such buckets are one cluster: its first member knows nearly all the others.
        self._pairs(np.full(len(bucket) - 1, bucket[0]), bucket[1:])
        if len({self._find(number) for number in bucket.tolist()}) == 1:
            return
        if len(split_by) == _DEPTH:
            self._windows(bucket)
            return
        for band, keys in self._bands_of(bucket, split_by):
            order = np.argsort(keys, kind="stable")
            for part in np.split(bucket[order], np.flatnonzero(np.diff(keys[order])) + 1):
                if len(part) > MOST_IN_BUCKET:
                    self._large(part, (*split_by, band))
                else:
                    self._small(part, np.zeros(1, np.int64), len(part))

    def _windows(self, bucket: I64) -> None:
        inside = 0
        for at in range(0, len(bucket), MOST_IN_BUCKET):
            window = bucket[at : at + MOST_IN_BUCKET]
            inside += len(window) * (len(window) - 1) // 2
            self._small(window, np.zeros(1, np.int64), len(window))
        self.unchecked += len(bucket) * (len(bucket) - 1) // 2 - inside

    def _bands_of(self, bucket: I64, split_by: tuple[int, ...]) -> Iterator[tuple[int, U64]]:
        """(band, its keys of the bucket's texts) for the bands that further split a bucket; each set of bands
        is come to once.
        """
        starts = np.concatenate([[0], np.cumsum(self._task["counts"])])
        first = split_by[-1] + 1 if len(split_by) > 1 else 0
        for band in range(first, _rows_of(self._folder / "0000.bands.npy")):
            if band in split_by:
                continue
            keys = np.empty(len(bucket), np.uint64)
            for number in range(len(starts) - 1):
                inside = (bucket >= starts[number]) & (bucket < starts[number + 1])
                row = _row_of(self._folder / f"{number:04d}.bands.npy", band)
                keys[inside] = row[bucket[inside] - starts[number]]
            yield band, keys

    # union-find ------------------------------------------------------------------------------------

    def _find(self, number: int) -> int:
        at = int(self._roots[number])
        while (above := self._parent.get(at, at)) != at:
            self._parent[at] = at = self._parent.get(above, above)
        return at

    def _join(self, a: int, b: int) -> None:
        low, high = sorted((self._find(a), self._find(b)))
        if low != high:
            self._parent[high] = low
            self.edges.append((low, high))

    def _set(self, number: int) -> frozenset[str]:
        found = self._sets.get(number)
        if found is None:
            text = self.texts[number]
            if self._cached > _CACHED_CHARS:
                self._sets.clear()
                self._cached = 0
            self._cached += len(text)
            found = self._sets[number] = shingles(text)
        return found


def _row_of(file: Path, row: int) -> U64:
    """One row of a saved (bands, samples) array, read alone."""
    with file.open("rb") as source:
        shape = _header(source)
        source.seek(row * shape[1] * 8, 1)
        return np.fromfile(source, np.uint64, shape[1])


def _rows_of(file: Path) -> int:
    with file.open("rb") as source:
        return _header(source)[0]


def _header(source: Any) -> tuple[int, int]:
    np.lib.format.read_magic(source)
    shape, _, _ = np.lib.format.read_array_header_1_0(source)
    return shape  # type: ignore[return-value]
