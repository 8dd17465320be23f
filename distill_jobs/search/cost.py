"""Seconds of a decoding step by shape and precision: a linear model of a few engines that were timed.

step = fixed + layers × launch + weights of the blocks × rate of the precision, none of them negative: the
roofline of a model that is launched layer by layer. Pure; knows nothing about engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from contracts.errors import ConfigError
from distill_jobs.search.config import Precision
from distill_jobs.search.space import Candidate, Frame, block_params


@dataclass(frozen=True)
class CostModel:
    """A fit."""

    frame: Frame
    fixed: float
    launch: float
    """Seconds a layer."""
    rates: dict[Precision, float]
    """Seconds a weight."""
    worst: float
    """Largest relative error on what it was fitted to."""

    def step_s(self, one: Candidate) -> float:
        """Predicted seconds of a step. Raises: ConfigError for a precision that was not timed."""
        if one.precision not in self.rates:
            raise ConfigError(f"space.precision: {one.precision} was not timed, so nothing predicts it.")
        work = block_params(self.frame, one.shape) * self.rates[one.precision]
        return self.fixed + self.launch * one.shape.layers + work


def fit(frame: Frame, timed: Sequence[tuple[Candidate, float]]) -> CostModel:
    """Least squares of the relative errors, over (candidate, seconds a step)."""
    from scipy.optimize import nnls

    precisions: list[Precision] = list(dict.fromkeys(one.precision for one, _ in timed))
    seconds = np.array([step for _, step in timed])
    features = np.zeros((len(timed), 2 + len(precisions)))
    for row, (one, _) in enumerate(timed):
        features[row, :2] = 1, one.shape.layers
        features[row, 2 + precisions.index(one.precision)] = block_params(frame, one.shape)
    scale = features.max(0)
    scale[scale == 0] = 1
    found = nnls(features / scale / seconds[:, None], np.ones(len(timed)))[0] / scale
    worst = float(np.abs(features @ found / seconds - 1).max())
    rates = dict(zip(precisions, found[2:].tolist(), strict=True))
    return CostModel(frame, float(found[0]), float(found[1]), rates, worst)


def anchors(found: Sequence[Candidate], frame: Frame) -> list[Candidate]:
    """What to time: of the commonest precision the largest and the smallest, the deepest narrow one and the
    shallowest wide one; of each other the one of most weights."""
    by_precision: dict[Precision, list[Candidate]] = {}
    for one in found:
        by_precision.setdefault(one.precision, []).append(one)
    first = max(by_precision, key=lambda name: len(by_precision[name]))
    chosen: dict[str, Candidate] = {}
    for name, mine in by_precision.items():
        size = {one.name: block_params(frame, one.shape) for one in mine}
        picks = [max(mine, key=lambda one: size[one.name])]
        if name == first:
            by_depth = sorted(mine, key=lambda one: (one.shape.layers, -size[one.name]))
            picks += [min(mine, key=lambda one: size[one.name]), by_depth[-1], by_depth[0]]
        chosen |= {one.name: one for one in picks}
    return list(chosen.values())
