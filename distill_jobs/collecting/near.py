"""Clusters of near-duplicates over all samples: candidates by bands, pairs decided by exact Jaccard, then
connected components.

A sample is a number here (its place in the order of digests), and a cluster is named by its least member.
Bands are worked through in rounds; a round's tasks each take the keys of one band that fall to one shard,
and leave the pairs that join two clusters of the rounds before. What stays in memory is some 50 bytes a
sample. Knows nothing about what a sample is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_jobs.collecting.bands import choose_bands
from distill_jobs.collecting.compare import SAME_TEXT, compare_shard
from distill_jobs.collecting.executor import Mapper
from distill_jobs.collecting.parts import save_array

Roots = NDArray[np.int32]
"""The least member of each sample's cluster."""

_SHARD_ROWS = 3_000_000
"""Samples whose keys one task sorts."""
_GROUPS = 4
"""Tasks that a round's bands are dealt out to."""
_ALONE = 50_000
"""Samples from which a round of one band is worth two tasks, so that two cores have work."""


def clusters(
    folder: Path,
    counts: Sequence[int],
    threshold: float,
    mapper: Mapper,
    progress: Callable[[int, int], None],
) -> tuple[Roots, int]:
    """The roots of all samples (partitions of `counts` samples in `folder`), and the pairs that were left
    unchecked because thousands of different texts shared every band.
    """
    rounds = _rounds(choose_bands(threshold).count)
    before, unchecked = folder / "start.roots.npy", 0
    save_array(before, np.arange(sum(counts), dtype=np.int32))
    for number, bands in enumerate(rounds):
        file = folder / f"round-{number:02d}.roots.npy"
        tasks = _tasks(folder, counts, threshold, number, bands, before)
        reports = list(mapper(compare_shard, tasks))
        if not file.is_file():
            save_array(file, merge(np.load(before), [np.load(t["out"]) for t in tasks]))
        unchecked += sum(report["unchecked"] for report in reports)
        before = file
        progress(number + 1, len(rounds))
    roots: Roots = np.load(before)
    return roots, unchecked


def _rounds(bands: int) -> list[list[int]]:
    """Equal texts, then one band, then twice as many a round: the first ones join nearly all that belongs
    together, and what is joined is not compared again.
    """
    rounds, at, size = [[SAME_TEXT]], 0, 1
    while at < bands:
        rounds.append(list(range(at, min(at + size, bands))))
        at, size = at + size, 2 * size
    return rounds


def _tasks(
    folder: Path, counts: Sequence[int], threshold: float, number: int, bands: list[int], roots: Path
) -> list[dict[str, Any]]:
    shards = max(-(-sum(counts) // _SHARD_ROWS), 1 if len(bands) > 1 or sum(counts) < _ALONE else 2)
    groups = min(len(bands), _GROUPS if sum(counts) >= _ALONE else 1)
    return [
        {
            "folder": str(folder.resolve()),
            "counts": list(map(int, counts)),
            "threshold": threshold,
            "bands": bands[group::groups],
            "shard": shard,
            "shards": shards,
            "roots": str(roots.resolve()),
            "out": str((folder / f"round-{number:02d}-{group}-{shard}.npy").resolve()),
            "report": str((folder / f"round-{number:02d}-{group}-{shard}.json").resolve()),
        }
        for group in range(groups)
        for shard in range(shards)
    ]


def merge(roots: Roots, edges: Sequence[NDArray[np.int32]]) -> Roots:
    """Join the clusters that the edges (pairs of roots, shape (n, 2)) connect; the least member names
    them.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.concatenate([np.empty((0, 2), np.int32), *edges])
    if not len(pairs):
        return roots
    nodes, at = np.unique(pairs, return_inverse=True)
    at = at.reshape(pairs.shape)
    graph = coo_array((np.ones(len(pairs), bool), (at[:, 0], at[:, 1])), shape=(len(nodes),) * 2)
    _, label = connected_components(graph, directed=False)
    least = np.full(label.max() + 1, np.iinfo(np.int32).max, np.int32)
    np.minimum.at(least, label, nodes)
    moved = np.arange(len(roots), dtype=np.int32)
    moved[nodes] = least[label]
    joined: Roots = moved[roots]
    return joined
