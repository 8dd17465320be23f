"""The few shapes of PromQL that the dashboards are made of.

`$__rate_interval` and the variables are Grafana's. Labels that are grouped by are bounded: they come from
splits, specs and configuration. Knows metrics by name; nothing about panels.
"""

from __future__ import annotations

FAILED = 'outcome=~"upstream_error|timeout|broken_stream"'
"""Outcomes that the assigned arm is charged with (contracts.traffic.Outcome.failed)."""
COUNTED = 'outcome=~"ok|upstream_error|timeout|broken_stream"'
"""Outcomes that say something about the arm (Outcome.counts)."""
QUANTILES = (0.5, 0.95, 0.99)


def select(metric: str, *matchers: str) -> str:
    """A selector; empty matchers are left out."""
    kept = ", ".join(m for m in matchers if m)
    return f"{metric}{{{kept}}}" if kept else metric


def rate(metric: str, by: str, *matchers: str) -> str:
    """A counter's rate per second, summed by labels (empty: over everything)."""
    return f"sum{_by(by)} (rate({select(metric, *matchers)}[$__rate_interval]))"


def total(metric: str, by: str, *matchers: str) -> str:
    """A gauge, summed by labels."""
    return f"sum{_by(by)} ({select(metric, *matchers)})"


def largest(metric: str, by: str, *matchers: str) -> str:
    """A gauge that every process exports alike, once by labels."""
    return f"max{_by(by)} ({select(metric, *matchers)})"


def increase(metric: str, by: str, *matchers: str) -> str:
    """What a counter grew by in the dashboard's time range, summed by labels."""
    return f"sum{_by(by)} (increase({select(metric, *matchers)}[$__range]))"


def quantile(q: float, metric: str, by: str, *matchers: str) -> str:
    """A quantile of a histogram by labels, interpolated within its bucket."""
    labels = f"{by}, le" if by else "le"
    inner = f"rate({select(f'{metric}_bucket', *matchers)}[$__rate_interval])"
    return f"histogram_quantile({q:g}, sum by ({labels}) ({inner}))"


def mean(metric: str, by: str, *matchers: str) -> str:
    """The mean of a histogram by labels."""
    return f"{rate(f'{metric}_sum', by, *matchers)} / {rate(f'{metric}_count', by, *matchers)}"


def ratio(part: str, whole: str) -> str:
    """A share; where there is no traffic there is no point, never a division by nothing drawn as 0."""
    return f"({part}) / ({whole} > 0)"


def errors(by: str, *matchers: str) -> str:
    """The share of counted requests that their arm failed."""
    requests = "stillhouse_requests_total"
    return ratio(rate(requests, by, FAILED, *matchers), rate(requests, by, COUNTED, *matchers))


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
