"""Confidence sequences for the report's figures: how much the arms differ, at every look.

They describe, they do not decide; deciding is done by the e-processes. Knows nothing about how they look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from contracts.metrics import SCORE_STEPS, MetricKind, MetricSpec
from serve.rollout.evidence import windows_of
from serve.rollout.observation import SeenWindow
from serve.rollout.report.measures import RATE_KINDS
from serve.rollout.report.model import Comparison, Interval
from serve.rollout.report.trail import Seen
from serve.rollout.stats import sequences

MOST_POINTS = 120
"""Points of a sequence at most: neighbouring windows under the same weights are taken as one."""
_NOTHING = (0,) * (SCORE_STEPS + 1)


def with_intervals(
    metric: MetricSpec, found: tuple[Comparison, ...], seen: Sequence[Seen], alpha: float
) -> tuple[Comparison, ...]:
    """Comparisons with the confidence sequence of canary - stable (pairs: canary - ½); of a query none."""
    if not seen or metric.kind is MetricKind.QUERY:
        return found
    times = tuple(s.seconds for s in seen)
    return tuple(
        c.model_copy(update={"interval": _interval(times, _sequence(metric, i, seen, alpha), alpha)})
        for i, c in enumerate(found)
    )


def merged(seen: Sequence[Seen]) -> list[Seen]:
    """Looked-at windows, neighbours of one split version together, so that there are few enough.

    Never across weights: mixing two shares of traffic would compare different times (Simpson's paradox). What
    came in after the decision belongs to no look and is left out.
    """
    looked = [s for s in seen if s.look >= 0]
    size = math.ceil(len(looked) / MOST_POINTS)
    found: list[Seen] = []
    held = 0
    for each in looked:
        last = found[-1] if found else None
        if last is not None and held < size and last.window.split_version == each.window.split_version:
            found[-1] = Seen(each.seconds, last.weight, _plus(last.window, each.window), each.look)
            held += 1
        else:
            found.append(each)
            held = 1
    return found


def _sequence(metric: MetricSpec, index: int, seen: Sequence[Seen], alpha: float) -> list[sequences.Interval]:
    windows = [s.window for s in seen]
    if metric.kind in RATE_KINDS:
        counted = [windows_of(metric, w.stable, w.canary)[index] for w in windows]
        return sequences.risk_difference(counted, alpha)
    of = metric.grader
    if metric.kind is MetricKind.SCORE:
        scores = [(w.stable.scores.get(of, ()), w.canary.scores.get(of, ())) for w in windows]
        return sequences.difference(scores, alpha)
    found, so_far = [], _NOTHING
    for window in windows:
        so_far = tuple(a + b for a, b in zip(so_far, window.pairs.scores.get(of, _NOTHING), strict=True))
        judged = sequences.mean(so_far, alpha)
        # On the margin's scale: how far the canary's side of the pairs is from a half.
        found.append(sequences.Interval(*(v - 0.5 for v in judged)))
    return found


def _interval(times: tuple[float, ...], found: list[sequences.Interval], alpha: float) -> Interval:
    """The sequence from the first look on at which both arms had something to compare."""
    begun = next((i for i, v in enumerate(found) if v.estimate != 0.0 or v.low > -1.0 or v.high < 1.0), 0)
    times, found = times[begun:], found[begun:]
    return Interval(
        seconds=times,
        estimate=tuple(i.estimate for i in found),
        low=tuple(i.low for i in found),
        high=tuple(i.high for i in found),
        alpha=alpha,
    )


def _plus(a: SeenWindow, b: SeenWindow) -> SeenWindow:
    return SeenWindow(
        split_version=a.split_version,
        stable=a.stable.plus(b.stable),
        canary=a.canary.plus(b.canary),
        pairs=a.pairs.plus(b.pairs),
    )
