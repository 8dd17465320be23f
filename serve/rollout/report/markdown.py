"""The report as Markdown: the same facts as the page, for pull requests, chats and terminals.

Texts from outside cannot break out of their cells and fences. Computes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from serve.rollout.report import words
from serve.rollout.report.model import Answer, ArmReport, Comparison, Example, MetricReport, Report
from serve.rollout.sentences import percent

_METRIC_HEAD = (
    "metric", "role", "margin", "stable", "canary", "canary − stable", "harm", "no worse", "verdict"
)  # fmt: skip


def markdown(report: Report) -> str:
    """The whole document."""
    parts = (
        f"# {_inline(report.model_ref)} on {_inline(report.route)}: {report.headline}",
        f"> {_inline(report.sentence)}",
        f"Rollout `{report.id}`, asked for {words.utc(report.started_at)} UTC by "
        f"{_inline(report.spec.created_by)}; made {words.utc(report.made_at)} UTC.",
        *(f"*{_inline(note)}*" for note in report.notes),
        "## What was judged",
        table(
            _METRIC_HEAD,
            (row for m in report.metrics for row in _metric(report, m)),
        ),
        "## What happened",
        table(
            ("after", "what", "weight", "why"),
            (
                (words.duration(m.seconds), m.what, percent(m.weight), words.why(m))
                for m in report.timeline
            ),
        ),
        "## Latency",
        table(
            ("", "n", "p50", "p90", "p95", "p99"), (row for a in report.arms for row in _latency(a))
        ),
        "## Cost of 1000 requests",
        table(
            ("arm", "upstream", "as it was", "with all traffic", "from"), (_cost(a) for a in report.arms)
        ),
        "## Worst examples",
        report.examples.said,
        *(_example(i, e) for i, e in enumerate(report.examples.shown, start=1)),
        "## Why this can be trusted",
        _trust(report),
        "```sh\n" + "\n".join(report.reproduce) + "\n```",
    )  # fmt: skip
    return "\n\n".join(p for p in parts if p) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table; cells may hold anything."""
    lines = [head, ["---"] * len(head), *rows]
    first, rule, *rest = ("| " + " | ".join(_inline(c) for c in line) + " |" for line in lines)
    return "\n".join((first, rule.replace("\\", ""), *rest))


def _metric(report: Report, metric: MetricReport) -> Iterable[tuple[str, ...]]:
    at = report.thresholds
    tests = (
        f"{words.e_value(metric.log_harm)} of {words.limit(metric.log_harm_at)}",
        f"{words.e_value(metric.log_noninferior)} of {words.limit(at.log_promote)}",
        metric.verdict.value,
    )
    margin = f"{100 * metric.margin:g} pp" if words.counts_shares(metric) else f"{metric.margin:g}"
    if not metric.comparisons:
        yield (metric.name, metric.role.value, margin, "–", "–", "–", *tests)
    for index, c in enumerate(metric.comparisons):
        rest = tests if index == 0 else ("", "", "")
        sides = (words.share(c.stable), words.share(c.canary), _difference(metric, c))
        yield (words.label(metric, c), metric.role.value, margin, *sides, *rest)


def _difference(metric: MetricReport, c: Comparison) -> str:
    found = words.apart(metric, c)
    if found is None:
        return "–"
    return f"{found[0]} ({found[1]})" if found[1] else found[0]


def _latency(arm: ArmReport) -> Iterable[tuple[str, ...]]:
    for what, found in (("first token", arm.ttft), ("last token", arm.e2e)):
        if found.n:
            yield (f"{arm.arm}, {what}", f"{found.n:,}", *(words.quantile(q) for q in found.quantiles))


def _cost(arm: ArmReport) -> tuple[str, ...]:
    cost = arm.cost
    figures = (
        "not known" if value is None else f"{value:,.3g} {cost.currency}"
        for value in (cost.per_1000, cost.at_full_traffic)
    )
    return (arm.arm, arm.upstream, *figures, cost.said)


def _example(index: int, example: Example) -> str:
    asked = example.canary.prompt
    alike = "" if example.similarity is None else f" ({example.similarity:.0%} alike)"
    lines = [
        f"### {index}. {example.why}",
        _fence(asked) if asked is not None else "*The request's text is not kept.*",
        f"canary, {_about(example.canary)}:",
        _said(example.canary),
    ]
    if example.other is None:
        return "\n\n".join([*lines, f"*{_inline(example.relation)}*"])
    other = f"{example.other.arm}, {_about(example.other)}; {_inline(example.relation)}{alike}:"
    return "\n\n".join([*lines, other, _said(example.other)])


def _about(answer: Answer) -> str:
    grade = {True: ", graded right", False: ", graded wrong", None: ""}[answer.grade]
    return f"{_inline(answer.upstream)}, {answer.outcome}{grade}, {words.seconds(round(answer.e2e_s, 3))}"


def _said(answer: Answer) -> str:
    return _fence(answer.text) if answer.text is not None else f"*{_inline(answer.error or answer.missing)}*"


def _trust(report: Report) -> str:
    ratio, audit = report.sample_ratio, report.audit
    replayed = (
        "replay is exact, bit for bit" if audit.exact else "replay differs: " + "; ".join(audit.mismatches)
    )
    lines = (
        f"sample ratio: {ratio.canary:,} canary requests, {ratio.expected:,.1f} promised, e-value "
        f"{words.e_value(ratio.log_e)} of {words.e_value(ratio.log_at)}"
        + (": **mismatch, do not trust the comparison**" if ratio.mismatch else ", no mismatch"),
        f"audit: {audit.entries} entries, {audit.ticks} ticks; {_inline(replayed)}",
        f"status digest: `{audit.digest}`",
    )
    return "\n".join(f"- {line}" for line in lines)


def _inline(text: str) -> str:
    """One line that no Markdown in it can change."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _fence(text: str) -> str:
    """A block that its own backticks cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    mark = "`" * max(3, longest + 1)
    return f"{mark}text\n{text}\n{mark}"
