"""What stays, on which side, how often, with which weight: decided over all samples by a few bytes of each.

Samples are numbers in the order of their digests; an array has an entry for each. Knows nothing about texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


@dataclass
class Choice:
    """Per sample: how often it is written (0 drops it), its side's number in SPLITS, its weight."""

    copies: NDArray[np.uint8]
    side: NDArray[np.uint8]
    weight: NDArray[np.float32] | None = None


def best_share(scores: NDArray[np.float32], keep: float, unscored: str) -> Mask:
    """True for the best `keep` of the scored samples (ties: the first), for corrected ones (score inf), and
    for those without a score (NaN) unless they are to be dropped.
    """
    stays = np.isposinf(scores) | (np.isnan(scores) & (unscored == "keep"))
    scored = np.flatnonzero(np.isfinite(scores))
    best = scored[np.argsort(-scores[scored], kind="stable")[: math.ceil(keep * len(scored))]]
    stays[best] = True
    return stays


def choose(
    roots: NDArray[np.int32],
    sides: NDArray[np.uint8],
    alive: Mask,
    keep_per_cluster: int,
    max_rows: int | None,
    counts: Counter[str],
) -> Choice:
    """The first samples of each cluster, in order of the clusters' first digests, until `max_rows` are there
    (a cluster is taken whole or not at all); all of a cluster on the side of its first digest.
    """
    number = np.flatnonzero(alive)
    number = number[np.argsort(roots[number], kind="stable")]
    root = roots[number]
    fresh = np.ones(len(root), bool)
    fresh[1:] = root[1:] != root[:-1]
    first = np.maximum.accumulate(np.where(fresh, np.arange(len(root)), 0))
    kept = np.arange(len(root)) - first < keep_per_cluster
    counts["near_duplicate"] += int(len(kept) - kept.sum())
    number, fresh = number[kept], fresh[kept]
    if max_rows is not None and len(number) > max_rows:
        ends = np.append(np.flatnonzero(fresh)[1:], len(number))
        upto = int(ends[ends <= max_rows].max(initial=0))
        counts["over_max_rows"] += len(number) - upto
        number = number[:upto]
    copies = np.zeros(len(roots), np.uint8)
    copies[number] = 1
    return Choice(copies, sides[roots])


def balance(
    choice: Choice,
    classes: NDArray[np.int32],
    names: Sequence[str],
    draw: NDArray[np.uint64],
    config: Mapping[str, Any],
    counts: Counter[str],
) -> None:
    """Bring the training samples' classes to the target, in place.

    A class's factor is its target share over its share, among the classes that the target names. weight: the
    factor itself. drop and repeat: as many samples as the target gives its class when the class that is worst
    off keeps just what it has (drop), or the class that is best off does (repeat); chosen by `draw`.
    """
    training = (choice.copies > 0) & (choice.side == 0)
    target = _target(config["target"], names)
    present = {c: np.flatnonzero(training & (classes == c)) for c in target}
    present = {c: rows for c, rows in present.items() if len(rows)}
    if not present:
        return
    share = sum(target[c] for c in present)
    total = sum(len(rows) for rows in present.values())
    factor = {c: target[c] / share * total / len(rows) for c, rows in present.items()}
    most = config["most_repeats"]
    if config["by"] == "weight":
        choice.weight = np.ones(len(choice.copies), np.float32)
        for c, rows in present.items():
            choice.weight[rows] = min(factor[c], most)
        return
    scale = max(factor.values()) if config["by"] == "drop" else min(factor.values())
    for c, rows in present.items():
        wanted = min(round(len(rows) * factor[c] / scale), most * len(rows))
        each, more = divmod(wanted, len(rows))
        choice.copies[rows] = each
        choice.copies[rows[np.argsort(draw[rows], kind="stable")[:more]]] += 1
        counts["balance_dropped"] += max(0, len(rows) - wanted)
        counts["balance_repeated"] += max(0, wanted - len(rows))


def _target(target: Mapping[str, float] | str, names: Sequence[str]) -> dict[int, float]:
    """Class code → share; "uniform" is over the classes that are there."""
    if isinstance(target, str):
        return dict.fromkeys(range(len(names)), 1 / max(1, len(names)))
    return {code: target[name] / sum(target.values()) for code, name in enumerate(names) if name in target}


def bin_edges(difficulty: NDArray[np.float32], bins: int) -> list[float]:
    """The bins - 1 inner edges of equally large bins."""
    if not len(difficulty):
        return [0.0] * (bins - 1)
    return [float(e) for e in np.quantile(difficulty, np.arange(1, bins) / bins, method="lower")]
