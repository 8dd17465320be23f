"""Numbers and sentences for people: what was decided and why, in one sentence.

Pure. Decides nothing; the reason is the controller's own.
"""

from __future__ import annotations

import math
import time

from contracts.metrics import MetricKind
from contracts.rollout import PHASE_SENTENCES, Phase
from serve.rollout import sentences
from serve.rollout.report.model import Comparison, MetricReport, Move, Quantile, Sample
from serve.state.rollouts import StoredRollout

ANY_TIME = (
    "The evidence is an e-process: these answers hold at whatever moment one looks, and looking earlier or "
    "more often costs nothing."
)
_HEADLINES = {
    "promoted": "promoted to stable",
    "rolled_back": "rolled back",
    "aborted": "ended without a verdict",
}


def headline(stored: StoredRollout) -> str:
    """What was decided, in a few words."""
    status = stored.status
    if status.decision is not None:
        if status.phase is Phase.WATCHING:
            return "promoted, watched for late harm"
        said = _HEADLINES.get(status.decision, status.decision.replace("_", " "))
        return said if status.phase.terminal else f"{said}, draining"
    if stored.spec.hold_final:
        return f"A/B test running at {sentences.percent(status.weight)}"
    return f"undecided, {status.phase.value} at {sentences.percent(status.weight)}"


def sentence(stored: StoredRollout, seconds: float) -> str:
    """What was decided and why, with the time it took."""
    spec, status = stored.spec, stored.status
    who, took = f"{spec.model_ref} on route {spec.route}", duration(seconds)
    reason = status.reason.rstrip(".")
    if status.decision == "promoted":
        return f"After {took}, {who} was promoted: {reason}."
    if status.decision == "rolled_back":
        peak = sentences.percent(status.max_weight)
        return f"After {took} and at most {peak} of the traffic, {who} was rolled back: {reason}."
    if status.decision == "aborted":
        return f"After {took}, {who} ended without a verdict: {reason}."
    if status.phase in (Phase.PENDING, Phase.WARMING):
        return f"{who} has no traffic yet ({PHASE_SENTENCES[status.phase]}): {reason}."
    kind = "A/B test: " if spec.hold_final else ""
    has = f"{kind}{who} has {sentences.percent(status.weight)} of the traffic after {took}"
    return f"{has} and nothing is decided: {reason}." + (f" {ANY_TIME}" if spec.hold_final else "")


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 5 s, 2 h 10 min."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min" + (f" {s % 60} s" if s % 60 else "")
    return f"{s // 3600} h" + (f" {s % 3600 // 60} min" if s % 3600 >= 60 else "")


def utc(at: float) -> str:
    """Unix seconds for people: a report travels, so its times are in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))


def seconds(value: float) -> str:
    """A latency: 40 ms, 1.5 s."""
    return f"{1000 * value:g} ms" if value < 1 else f"{value:g} s"


def share(sample: Sample) -> str:
    """`12 of 480 (2.5 %)`, or a mean score with its n."""
    if sample.n == 0 or sample.mean is None:
        return "no data"
    if sample.bad is not None:
        return f"{sample.bad:,} of {sample.n:,} ({100 * sample.mean:.2f} %)"
    return f"{sample.mean:.3f} of {sample.n:,}"


def quantile(q: Quantile) -> str:
    """A quantile with both edges of its bucket: nobody knows more than that."""
    if q.at_most_s is None:
        return f"over {seconds(q.above_s)}"
    return f"{seconds(q.above_s)} – {seconds(q.at_most_s)}"


def points(value: float, metric: MetricReport) -> str:
    """A difference: percentage points of shares, plain for mean scores."""
    return f"{100 * value:+.2f} pp" if counts_shares(metric) else f"{value:+.3f}"


def apart(metric: MetricReport, c: Comparison) -> tuple[str, str] | None:
    """The difference and its interval, as far as both are known: ('+0.12 pp', '-1.00 to +1.20 pp')."""
    if c.stable.mean is None or c.canary.mean is None:
        return None
    if c.interval is None:
        return points(c.canary.mean - c.stable.mean, metric), ""
    last = (c.interval.estimate[-1], c.interval.low[-1], c.interval.high[-1])
    at, low, high = (points(v, metric) for v in last)
    return at, f"{low.removesuffix(' pp')} to {high}"


def counts_shares(metric: MetricReport) -> bool:
    """True for metrics that count bad ones."""
    return any(c.canary.bad is not None for c in metric.comparisons)


def e_value(log_e: float) -> str:
    """An e-value from its log."""
    return sentences.number(log_e)


def limit(log_e: float) -> str:
    """A threshold from its log: 20, 80, 2.5e+03."""
    return f"{math.exp(log_e):.3g}"


def why(move: Move) -> str:
    """A move's reason, with what was noted beside it."""
    return move.reason + "".join(f" [{note}]" for note in move.notes)


def tile(metric: MetricReport) -> str:
    """What a metric's share or mean is, in two words."""
    known = {MetricKind.ERRORS: "of requests failed", MetricKind.QUALITY: "graded wrong"}
    return known.get(metric.kind, metric.name)


def label(metric: MetricReport, comparison: Comparison) -> str:
    """A metric, with its threshold where there is one."""
    if comparison.threshold_s is None:
        return metric.name
    return f"{metric.name} > {seconds(comparison.threshold_s)}"
