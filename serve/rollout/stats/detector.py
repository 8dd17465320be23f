"""E-detector: has harm begun at some time, known to nobody, after a promotion?

An e-process that was healthy for hours has lost its capital and notices a late regression late. A detector
starts again at every look: for each alternative W = max(W, 0) + ln e, an alarm when the mean of exp W reaches
the average run length (ARL) that one wants between false alarms. exp W is at most the sum over all starting
times of the e-process begun there (Shiryaev-Roberts), whose expectation at any stopping time τ is at most
E τ; hence E[looks to a false alarm] >= ARL, and P(alarm within T looks) <= T / ARL.

Fed by what two_sample multiplies into its harm test, or by a rate against a fixed bound where no second arm
is left. Give it a two_sample state of its own with tolerance 0, since it watches for any change: with a
quarter of a 2-point margin as tolerance, +2 points late take twice as long to be found (60 looks against 29
in the median, 300 requests a look, 10 % canary). Does not know what is restored after an alarm.

Source: Shin, Ramdas & Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", New
England Journal of Statistics in Data Science 2(2), 2024, arXiv 2203.03532 (e-CUSUM, mixtures of e-detectors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from serve.rollout.stats.combine import log_mean_exp
from serve.rollout.stats.two_sample import HARM_ALTERNATIVES, TwoSample

ARL = 28_800.0
"""Looks between false alarms at least, on average: 20 days of looks a minute."""
HARM_WEIGHTS = (0.02, 0.10, 0.75, 0.09, 0.02, 0.01, 0.01)
"""By alternative: most on +2 points, the late regression whose minutes this pays for; the larger ones need no
weight, the smaller ones cannot be seen at this ARL within hours (docs/decisions/0010)."""
_HIGHEST = 0.985


class State(NamedTuple):
    """By alternative, the log of the best e-process over all starting times; and their mean's log."""

    logs: tuple[float, ...]
    log_value: float


def start(k: int = len(HARM_ALTERNATIVES)) -> State:
    """A detector over k alternatives. Raises: ValueError for none."""
    if k < 1:
        raise ValueError(f"detector: needs one alternative at least, not {k}")
    return State((0.0,) * k, 0.0)


def look(
    state: State, log_increments: Sequence[float], weights: Sequence[float] | None = HARM_WEIGHTS
) -> State:
    """Fold one look's log e-values in, one an alternative; `weights` are their priors (None: equal)."""
    logs = tuple(max(w, 0.0) + e for w, e in zip(state.logs, log_increments, strict=True))
    return State(logs, log_mean_exp(logs, weights))


def log_value(state: State) -> float:
    """Log of the detector; alarm when it reaches ln ARL."""
    return state.log_value


def alarmed(state: State, arl: float = ARL) -> bool:
    """True when a change must be assumed."""
    return state.log_value >= math.log(arl)


def harm_increments(before: TwoSample, after: TwoSample) -> tuple[float, ...]:
    """What one look multiplied into each alternative of a harm test."""
    return tuple(b - a for a, b in zip(before.harm, after.harm, strict=True))


def bound_increments(n: int, k: int, bound: float) -> tuple[float, ...]:
    """Log e-values of one look against H0: rate <= bound, for the excesses of HARM_ALTERNATIVES.

    For when the former stable gets no traffic any more and `bound` was fixed before (its rate plus a
    tolerance). A likelihood ratio that rises in k, so its expectation is largest, and 1, at the bound. It
    cannot tell a regression from an incident that would have hit both arms.

    Raises: ValueError for impossible counts, or a bound outside (0, 0.985).
    """
    if not 0 <= k <= n or not 0.0 < bound < _HIGHEST:
        raise ValueError(f"detector: cannot test {k} of {n} against a bound of {bound}")
    rates = (min(bound + excess, _HIGHEST) for excess, _ in HARM_ALTERNATIVES)
    return tuple(k * math.log(q / bound) + (n - k) * math.log((1.0 - q) / (1.0 - bound)) for q in rates)


def dump(state: State) -> dict[str, list[float]]:
    """The state as lists of floats, exact through JSON."""
    return {"logs": list(state.logs), "value": [state.log_value]}


def load(stored: dict[str, list[float]]) -> State:
    """The state from `dump`; fresh, over HARM_ALTERNATIVES, from an empty dict."""
    return State(tuple(stored["logs"]), stored["value"][0]) if stored else start()
