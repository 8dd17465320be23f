"""The report's figures: which numbers go on which chart, and what a reader who cannot see it is told.

Knows nothing about HTML beyond what `chart` makes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from contracts.metrics import LATENCY_BUCKETS_S
from contracts.rollout import Phase
from serve.rollout.report import words
from serve.rollout.report.chart import Axis, Band, Chart, Line, Rule, Stretch, draw, ticks, time_ticks
from serve.rollout.report.measures import shares
from serve.rollout.report.model import ArmReport, Comparison, Latency, MetricReport, Report

_LN10 = math.log(10.0)
_LOWEST = -3.0
"""Evidence below 1/1000 is drawn at the edge: it says 'no' clearly enough."""
_TIME = "time since the rollout was asked for"
_PHASE_STYLES = {
    Phase.PENDING: "idle",
    Phase.WARMING: "idle",
    Phase.RAMPING: "going",
    Phase.HELD: "waiting",
    Phase.PAUSED: "waiting",
    Phase.WATCHING: "good",
    Phase.PROMOTING: "good",
    Phase.PROMOTED: "good",
    Phase.ROLLING_BACK: "bad",
    Phase.ROLLED_BACK: "bad",
    Phase.ABORTED: "ended",
}


def weight(report: Report) -> str:
    """The canary's share over time, under a ribbon of phases."""
    moves = [(m.seconds, m.weight) for m in report.timeline]
    points = [(0.0, 0.0), *moves, (report.seconds, report.weight)]
    high = max(1.05 * max(w for _, w in points), 0.02)
    labelled = [(v, f"{100 * v:g} %") for v, _ in ticks(0.0, high, str)]
    peak = f"at most {100 * report.max_weight:g} %"
    return draw(Chart(
        name="weight",
        title="The canary's share of traffic and the rollout's phases over time",
        about=f"{len(report.spec.steps)} steps were planned, it got {peak}; the timeline lists every move.",
        x=_time(report),
        y=Axis(0.0, high, "canary's share", labelled),
        lines=[Line(points, "canary", f"canary {100 * report.weight:g} %", step=True)],
        bands=[Band(_stairs(points), "canary")],
        ribbon=_phases(report),
        height=220.0,
    ))  # fmt: skip


def evidence(report: Report, harm: bool) -> str:
    """The e-values of all metrics over time against their threshold, on a log scale."""
    at = report.thresholds.log_harm_each if harm else report.thresholds.log_promote
    lines = []
    for index, test in enumerate(report.series.tests):
        logs = test.log_harm if harm else test.log_noninferior
        points = [(s, v / _LN10) for s, v in zip(report.series.seconds, logs, strict=True)]
        last = words.e_value(logs[-1]) if logs else "–"
        lines.append(Line(points, f"m{index % 6 + 1}", f"{test.metric} {last}"))
    drawn = [y for line in lines for _, y in line.points] or [0.0]
    top = max(1.35 * at / _LN10, min(1.05 * max(drawn), 3.0 * at / _LN10))
    lines = [_off_the_top(line, top) for line in lines]
    low = min(-0.5, max(1.05 * min(drawn), _LOWEST))
    does = "roll back" if harm else "promote"
    rules = [Rule(at / _LN10, f"{does} at {words.limit(at)}", "limit"), Rule(0.0, "", "zero")]
    what = "harm" if harm else "being no worse"
    ends = "; ".join(line.label for line in lines)
    return draw(Chart(
        name="harm" if harm else "noninferior",
        title=f"Evidence for {what}: e-values over time",
        about=f"Threshold {words.limit(at)}. Last values: {ends}.",
        x=_time(report),
        y=Axis(low, top, "e-value", _powers(low, top)),
        lines=lines,
        rules=rules,
        height=250.0,
        labels=190.0,
    ))  # fmt: skip


def difference(report: Report, metric: MetricReport, comparison: Comparison, name: str) -> str:
    """How much the arms differ on one metric: estimate, confidence sequence, margin."""
    interval = comparison.interval
    assert interval is not None
    last_low, last_high = interval.low[-1], interval.high[-1]
    worse_is_up = words.counts_shares(metric)
    margin = metric.margin if worse_is_up else -metric.margin
    reach = 2.2 * metric.margin
    low, high = min(1.25 * last_low, -reach), max(1.25 * last_high, reach)
    scale = 100.0 if worse_is_up else 1.0
    unit = " pp" if worse_is_up else ""
    marks = [(v, f"{scale * v:+.3g}{unit}" if v else "0") for v, _ in ticks(low, high, str)]
    said = f"{words.points(interval.estimate[-1], metric)}, between {words.points(last_low, metric)} and "
    said += words.points(last_high, metric)
    return draw(Chart(
        name=name,
        title=f"Difference canary minus stable: {words.label(metric, comparison)}",
        about=f"At the last look {said}; margin {words.points(margin, metric)}.",
        x=_time(report, 4),
        y=Axis(low, high, "", marks),
        lines=[Line(list(zip(interval.seconds, interval.estimate, strict=True)), "canary", "seen")],
        bands=[Band(list(zip(interval.seconds, interval.low, interval.high, strict=True)), "canary")],
        rules=[Rule(0.0, "equal", "zero"), Rule(margin, "margin", "limit")],
        width=460.0,
        height=210.0,
        labels=62.0,
    ))  # fmt: skip


def latency(arms: tuple[ArmReport, ...], field: str, thresholds: tuple[float, ...]) -> str:
    """Share of answers that came within a time, by arm, known at bucket edges."""
    found: dict[str, Latency] = {arm.arm: getattr(arm, field) for arm in arms}
    low, high = _span(found)
    rules = [
        Rule(math.log10(t), words.seconds(t), "zero", vertical=True) for t in thresholds if low <= t <= high
    ]
    lines = [
        Line(_curve(value, low, high), arm, f"{arm} (n {value.n:,})", dots=True)
        for arm, value in found.items()
        if value.n
    ]
    name = "time to first token" if field == "ttft" else "time to last token"
    ends = [
        f"{arm}: " + ", ".join(f"p{100 * q.q:g} {words.quantile(q)}" for q in value.quantiles)
        for arm, value in found.items()
    ]
    return draw(Chart(
        name=f"latency-{field}",
        title=f"Share of answers within a {name}, by arm",
        about="; ".join(ends) + ".",
        x=Axis(math.log10(low), math.log10(high), f"{name}, log scale", _decades(low, high)),
        y=Axis(0.0, 1.0, "share of answers", [(v / 4, f"{25 * v} %") for v in range(5)]),
        lines=lines,
        rules=rules,
        width=460.0,
        height=250.0,
        labels=128.0,
    ))  # fmt: skip


def _off_the_top(line: Line, top: float) -> Line:
    """A line whose end is not on the chart says so."""
    above = bool(line.points) and line.points[-1][1] > top
    return replace(line, label=f"{line.label} ↑") if above else line


def _time(report: Report, most: int = 8) -> Axis:
    end = max(report.seconds, 1.0)
    return Axis(0.0, end, _TIME, time_ticks(0.0, end, most))


def _stairs(points: list[tuple[float, float]]) -> list[tuple[float, float, float]]:
    stairs = [points[0], *(q for a, b in pairwise(points) for q in ((b[0], a[1]), b))]
    return [(x, 0.0, y) for x, y in stairs]


def _phases(report: Report) -> list[Stretch]:
    """Phases as stretches; moves within a phase do not cut it."""
    starts: list[tuple[float, Phase]] = [(0.0, Phase.PENDING)]
    for move in report.timeline:
        if move.phase is not starts[-1][1]:
            starts.append((move.seconds, move.phase))
    ends = [start for start, _ in starts[1:]] + [report.seconds]
    return [
        Stretch(start, end, phase.value.replace("_", " "), _PHASE_STYLES.get(phase, "going"))
        for (start, phase), end in zip(starts, ends, strict=True)
    ]


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    stride = max(1, math.ceil((high - low) / 6.0))
    first = math.ceil(low / stride) * stride
    return [
        (float(p), f"{10.0**p:g}" if -4 < p < 5 else f"1e{p}") for p in range(first, int(high) + 1, stride)
    ]


def _span(found: dict[str, Latency]) -> tuple[float, float]:
    """Edges around everything that was seen."""
    used = [i for value in found.values() for i, count in enumerate(value.buckets) if count]
    if not used:
        return LATENCY_BUCKETS_S[0], LATENCY_BUCKETS_S[-1]
    last = len(LATENCY_BUCKETS_S) - 1
    return LATENCY_BUCKETS_S[max(min(used) - 1, 0)], LATENCY_BUCKETS_S[min(max(*used, min(used) + 1), last)]


def _curve(value: Latency, low: float, high: float) -> list[tuple[float, float]]:
    points = zip(LATENCY_BUCKETS_S, shares(value.buckets), strict=True)
    return [(math.log10(edge), share) for edge, share in points if low <= edge <= high]


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    marks = [m * 10.0**p for p in range(-3, 2) for m in (1.0, 2.0, 5.0)]
    return [(math.log10(m), words.seconds(round(m, 4))) for m in marks if low <= m <= high]
