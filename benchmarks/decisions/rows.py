"""What is simulated, and how it is summed up: rows of our scenarios and of the peers, and the bars.

Knows nothing about processes or terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.decisions import argo, day, flagger, judged, kayenta, ours, ztest
from benchmarks.decisions.setting import (
    DAY,
    DWELL,
    HOUR,
    MARGIN,
    RAMP,
    SEED,
    WEIGHT,
    Ended,
    standard_error,
)
from benchmarks.decisions.traffic import Traffic
from benchmarks.results import Bar, at_least, at_most

Found = dict[str, list[Any]]
Row = dict[str, Any]
OURS = "stillhouse decide()"
EXTRAS = (0.0, 0.005, 0.01, 0.02, 0.05)

SCENARIOS: dict[str, Callable[[int], Any]] = {  # by seed
    **ours.SCENARIOS,
    "paired": judged.paired,
    "unpaired score": judged.unpaired_score,
    "unpaired quality": judged.unpaired_quality,
}
BATCHES: dict[str, Callable[[Sequence[int]], list[Any]]] = {"a_day": day.days, "a_hour": day.hours}
"""Scenarios that take many seeds at once."""
MULTIPLE: dict[str, float] = {
    "a_day": 3,
    "a_hour": 10,
    **dict.fromkeys(("+1", "+2", "+5", "promote +0", "ramp +0"), 2),
    **dict.fromkeys((name for name in ours.SCENARIOS if "tolerant" in name or "ladder" in name), 0.25),
    **dict.fromkeys(("low, 1 % errors", "low, default ramp"), 0.25),
    "silent": 0.05,
}
"""Cheap rows that carry a bar get this many times the runs, so that their Monte-Carlo error is smaller; rows
that only inform get fewer, and say how many."""
COST = {
    "a_day": 40,
    "a_hour": 2,
    "low": 30,
    "low, 1 % errors": 90,
    "low, default ramp": 20,
    "boundary": 28,
    "late": 18,
    "silent": 20,
    "incident": 20,
    "unpaired score": 22,
}
"""Milliseconds a run (others: 10), for the progress bar and the order of work."""


class Share(NamedTuple):
    """A share of runs in percent with its Monte-Carlo error, and the minutes of those it happened to."""

    runs: int
    percent: float
    error: float
    median: float | None
    p90: float | None

    @classmethod
    def of(cls, minutes: Sequence[float]) -> Share:
        """From the minute in which it happened by run, inf where it did not.

        Median and p90 are over all runs where it happened to enough of them, else over those it happened to.
        """
        at = np.asarray(minutes, dtype=float)
        hit = at[np.isfinite(at)]
        share = len(hit) / len(at)
        of = [_quantile(at if share >= 0.95 else hit, q) for q in (0.5, 0.9)] if len(hit) else [None, None]
        return cls(len(at), 100 * share, 100 * standard_error(share, len(at)), *of)


def when(ends: Sequence[Ended], decision: str, within: float = np.inf) -> list[float]:
    """The minute in which a run ended so, inf where it did not."""
    return [e.minutes if e.decision == decision and e.minutes <= within else np.inf for e in ends]


def rows(found: Found, runs: int) -> list[Row]:
    """Every row of the result: ours, then the peers."""
    return [*_our_rows(found), *_peer_rows(runs)]


def _our_rows(found: Found) -> list[Row]:
    a_day = [ended for ended, _ in found["a_day"]]
    alarms = [at or np.inf for _, at in found["a_day"]]
    made: list[Row] = [
        row(OURS, "A/A, rolled back within 1 h", when(found["a_hour"], "rolled_back")),
        row(OURS, "A/A, rolled back within 24 h", when(a_day, "rolled_back")),
        row(f"{OURS}, detector", "A/A, false alarm within 24 h", alarms),
        row(f"{OURS}, detector", "+2 pp after 4 healthy hours, found within 3 h", found["late"]),
        row(OURS, "promotion at the margin, harm test off", when(found["boundary"], "promoted")),
    ]
    for name, ends in found.items():
        if name in ("a_day", "a_hour", "late", "boundary") or name in _JUDGED:
            continue
        made.append(row(OURS, f"{name}: rolled back", when(ends, "rolled_back")))
        made.append(row(OURS, f"{name}: promoted", when(ends, "promoted")))
    what = "judged answers an arm until equal is shown (not minutes)"
    return made + [row(f"{OURS}, {name}", what, found[name]) for name in _JUDGED]


def _peer_rows(runs: int) -> list[Row]:
    made: list[Row] = []
    for extra in EXTRAS:
        at_ten = Traffic(runs, extra).minutes(HOUR, WEIGHT)
        what = f"+{100 * extra:g} pp, rolled back within 1 h"
        made += [
            row("Argo docs (95 %, 5m/5m, limit 3)", what, argo.rolled_back(at_ten, 0.95, 5, 5, 3)),
            row("Argo default limit 0 (95 %, 1m/1m)", what, argo.rolled_back(at_ten, 0.95, 1, 1, 0)),
            row("Argo 99 %, 5m/5m, limit 3", what, argo.rolled_back(at_ten, 0.99, 5, 5, 3)),
            row("Kayenta once at 60 min", what, np.where(kayenta.high(at_ten), float(HOUR), np.inf)),
            row("z-test every minute", what, ztest.rolled_back(at_ten)),
            row("Flagger docs (99 %, 10, 5..50)", what, flagger.decided(Traffic(runs, extra), HOUR)[0]),
        ]
    aa = Traffic(runs, 0.0).minutes(DAY, WEIGHT)
    made.append(row("z-test every minute", "A/A, rolled back within 24 h", ztest.rolled_back(aa)))
    made.append(
        row("Argo 99 %, 5m/5m, limit 3", "A/A, rolled back within 24 h", argo.rolled_back(aa, 0.99, 5, 5, 3))
    )
    ramp = [w for w, _ in RAMP for _ in range(DWELL)]
    hit = Traffic(runs, 0.0, incident=True).minutes(HOUR, np.array(ramp + [RAMP[-1][0]] * (HOUR - len(ramp))))
    what = "A/A on the ramp with a shared incident, rolled back"
    made.append(row("z-test every minute", what, ztest.rolled_back(hit)))
    made.append(row("Argo 95 %, 1m/1m, limit 3", what, argo.rolled_back(hit, 0.95, 1, 1, 3)))
    for extra, what in ((0.0, "equal arms, promoted"), (MARGIN, "promotion at the margin")):
        seen = Traffic(runs, extra).minutes(ours.NI_LOOKS, WEIGHT)
        made.append(row("z-test every minute", what, ztest.promoted(seen, MARGIN)))
    for rate in (3.0, 6.0, 15.0):
        back = flagger.decided(Traffic(runs, 0.0, rate, 0.0), DAY)[0]
        what = f"healthy canary, {rate:g} requests/min, rolled back within 24 h"
        made.append(row("Flagger docs (99 %, 10, 5..50)", what, back))
    return made


def row(controller: str, what: str, minutes: Sequence[float]) -> Row:
    """One line of the table."""
    share = Share.of(minutes)
    return {
        "controller": controller,
        "what": what,
        "runs": share.runs,
        "seed": SEED,
        "percent": round(share.percent, 2),
        "mc_error": round(share.error, 2),
        "median": share.median,
        "p90": share.p90,
    }


def bars(found: Found, tick_s: float) -> list[Bar]:
    """The promises of issue 4 that this benchmark measures."""
    a_day = [ended for ended, _ in found["a_day"]]
    two = Share.of(when(found["+2"], "rolled_back"))
    late = Share.of(found["late"])
    zero = found["silent"]
    deadline = min((e.minutes for e in zero), default=0.0)
    ratio = _median(found["paired"]) / _median(found["unpaired score"])

    def percent(name: str, decision: str) -> float:
        return Share.of(when(found[name], decision)).percent

    def median(name: str, decision: str) -> float:
        return _quantile(np.asarray(when(found[name], decision)), 0.5) or np.inf

    alarms = Share.of([at or np.inf for _, at in found["a_day"]]).percent
    return [
        at_most("A/A rolled back within 1 h, %", Share.of(when(found["a_hour"], "rolled_back")).percent, 2.5),
        at_most("A/A rolled back within 24 h, %", Share.of(when(a_day, "rolled_back")).percent, 3.5),
        at_least("+2 pp found within 60 min, %", two.percent, 99),
        at_most("+2 pp, median minutes", median("+2", "rolled_back"), 11),
        at_most("+2 pp, p90 minutes", two.p90 or np.inf, 25),
        at_most("+5 pp, median minutes", median("+5", "rolled_back"), 3),
        at_least("+1 pp found within 60 min, %", percent("+1", "rolled_back"), 76),
        at_most("equal arms promoted at 10 %, median minutes", median("promote +0", "promoted"), 11),
        at_most("equal arms promoted on the ramp, median minutes", median("ramp +0", "promoted"), 15),
        at_most("promoted exactly at the margin, %", percent("boundary", "promoted"), 4),
        at_most(
            "A/A on the ramp with a shared incident rolled back, %", percent("incident", "rolled_back"), 3
        ),
        at_most("zero-traffic canary promoted, %", percent("silent", "promoted"), 0),
        at_least("zero-traffic canary, earliest end in minutes (deadline 60)", deadline, 60),
        at_most("paired judging, samples against unpaired", round(ratio, 3), 0.5),
        at_most("healthy canary at 3 requests/min rolled back in 24 h, %", percent("low", "rolled_back"), 3),
        at_most("late +2 pp, median minutes", late.median or np.inf, 29),
        at_most("late detector, false alarms in 24 h, %", alarms, 1),
        at_most("decide() for 1,000 rollouts x 5 metrics, seconds", round(tick_s, 3), 1),
    ]


_JUDGED = ("paired", "unpaired score", "unpaired quality")


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _quantile(values: np.ndarray, q: float) -> float | None:  # type: ignore[type-arg]
    """The smallest value that at least a share q reaches; None when that never happened."""
    at = float(np.sort(values)[max(0, int(np.ceil(q * len(values))) - 1)])
    return at if np.isfinite(at) else None
