"""Paired against unpaired judging: how many graded answers of the canary until equal arms are shown equal?

Setting F of the research: nine answers in ten pass, margin 5 points of pass rate; paired, the arms disagree
on 7.2 % of the prompts. Both go through the shipped evidence, five judged prompts a look. A sample is one
judged answer of each arm, either way. Knows nothing about rates or ramps.
"""

from __future__ import annotations

import numpy as np

from benchmarks.decisions.setting import spec
from contracts.metrics import SCORE_STEPS, ArmCounts, MetricKind, MetricSpec, pass_fail
from serve.rollout import evidence
from serve.rollout.observation import SeenWindow

A_LOOK, MOST = 5, 4000
WRONG, DISAGREE = 0.1, 0.072
_JUDGE = "judge"


def samples(kind: MetricKind, seed: int) -> float:
    """Judged answers a arm until non-inferiority is shown; MOST when it never was."""
    # z = (x_c - x_s + 1)/2 halves differences, and so the margin.
    margin = 0.025 if kind is MetricKind.PAIRS else 0.05
    of = spec(metrics=(MetricSpec(kind=kind, margin=margin, grader=_JUDGE),))
    rng, found, seen = np.random.default_rng(seed), evidence.fresh(of), 0
    while seen < MOST:
        found = evidence.update(of, found, _window(kind, rng))
        seen += A_LOOK
        if evidence.combine(of, found).noninferior:
            break
    return float(seen)


def paired(seed: int) -> float:
    """Both arms answer the same prompts."""
    return samples(MetricKind.PAIRS, seed)


def unpaired_score(seed: int) -> float:
    """Different prompts, by the mean of the judge's scores: the same engine (betting) as for pairs."""
    return samples(MetricKind.SCORE, seed)


def unpaired_quality(seed: int) -> float:
    """Different prompts, as pass or fail: the two-sample test made for rates."""
    return samples(MetricKind.QUALITY, seed)


def _window(kind: MetricKind, rng: np.random.Generator) -> SeenWindow:
    if kind is MetricKind.PAIRS:
        win, tie, loss = rng.multinomial(A_LOOK, [DISAGREE / 2, 1.0 - DISAGREE, DISAGREE / 2]).tolist()
        half = (0,) * (SCORE_STEPS // 2 - 1)
        counts = ArmCounts(scores={_JUDGE: (loss, *half, tie, *half, win)})
        return SeenWindow(split_version=1, pairs=counts)
    arms = (
        ArmCounts(n=A_LOOK, scores={_JUDGE: pass_fail(A_LOOK - wrong, wrong)})
        for wrong in rng.binomial(A_LOOK, WRONG, 2).tolist()
    )
    return SeenWindow(split_version=1, stable=next(arms), canary=next(arms))
