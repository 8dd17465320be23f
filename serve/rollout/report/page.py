"""The report as one HTML page that needs nothing else: works offline, prints, follows light and dark.

Every text from outside is escaped; every figure has a title, a description and a table of its numbers. Says
what `Report` holds and computes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from contracts.gates import Verdict
from contracts.metrics import LATENCY_KINDS
from serve.rollout.report import figures, sides, words
from serve.rollout.report.model import Comparison, Latency, MetricReport, Report
from serve.rollout.report.style import STYLE
from serve.rollout.sentences import percent

_TABLE_ROWS = 16
"""Rows of a figure's table at most; the JSON has all of them."""
_TONES = {"promoted": ("good", "✔"), "rolled_back": ("bad", "✖"), "aborted": ("ended", "■")}
_VERDICTS = {
    Verdict.PASS: ("good", "✔ no worse"),
    Verdict.FAIL: ("bad", "✖ harm"),
    Verdict.INCONCLUSIVE: ("waiting", "… undecided"),
    Verdict.NO_DATA: ("", "no data"),
    Verdict.ERROR: ("bad", "! error"),
}


def page(report: Report) -> str:
    """The whole page."""
    title = f"{report.model_ref} on {report.route}: {report.headline}"
    body = "".join((
        _head(report),
        _metrics(report),
        _timeline(report),
        _evidence(report),
        _differences(report),
        _latencies(report),
        _cost(report),
        sides.examples(report.examples),
        _trust(report),
    ))  # fmt: skip
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", numbers: Iterable[int] = ()
) -> str:
    """A table of cells that are HTML already; the first of every row names it."""
    right = set(numbers)
    kinds = ['class="n"' if i in right else "" for i in range(len(head))]
    heads = "".join(f'<th scope="col" {k}>{cell}</th>' for cell, k in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row" {k}>{cell}</th>' if i == 0 else f"<td {k}>{cell}</td>"
            for i, (cell, k) in enumerate(zip(row, kinds, strict=True))
        )
        + "</tr>"
        for row in rows
    )
    said = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{said}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _head(report: Report) -> str:
    tone, sign = _TONES.get(report.decision or "", ("waiting", "…"))
    notes = "".join(f"<p class='soft'>{escape(n)}</p>" for n in report.notes)
    return (
        f'<header><p class="where">Stillhouse rollout report · route <b>{escape(report.route)}</b> · '
        f"{words.utc(report.started_at)} UTC</p>"
        f"<h1>{escape(report.model_ref)} on {escape(report.route)} "
        f'<span class="badge {tone}">{sign} {escape(report.headline)}</span></h1>'
        f'<p class="lead {tone}">{_glue(report.sentence)}</p>{_tiles(report)}{notes}</header>'
    )


def _tiles(report: Report) -> str:
    stable, canary = report.arms
    tiles = [
        (f"{canary.requests:,}", f"canary requests, beside {stable.requests:,} on stable"),
        (percent(report.max_weight), "of the traffic at most"),
        (words.duration(report.seconds), "from request to end" if report.phase.terminal else "so far"),
    ]
    for metric in report.metrics:
        for c in metric.comparisons:
            if metric.kind not in LATENCY_KINDS and c.canary.mean is not None:
                tiles.append(_tile(metric, c))
    tiles.append((_quantile(canary.e2e), f"p95 to the last token, stable {_quantile(stable.e2e)}"))
    if canary.cost.per_1000 is not None:
        beside = f", stable {_money(stable.cost.at_full_traffic, stable.cost.currency)}"
        tiles.append((
            _money(canary.cost.at_full_traffic, canary.cost.currency),
            "per 1000 requests" + (beside if stable.cost.per_1000 is not None else ""),
        ))  # fmt: skip
    cells = "".join(f"<li><b>{_glue(value)}</b><span>{_glue(said)}</span></li>" for value, said in tiles)
    return f'<ul class="tiles">{cells}</ul>'


def _tile(metric: MetricReport, c: Comparison) -> tuple[str, str]:
    assert c.canary.mean is not None
    if c.canary.bad is None:
        return f"{c.canary.mean:.3f}", f"{metric.name}, stable {_mean(c)}"
    return f"{100 * c.canary.mean:.2f} %", f"{words.tile(metric)}, stable {_mean(c)}"


def _mean(c: Comparison) -> str:
    if c.stable.mean is None:
        return "no data"
    return f"{c.stable.mean:.3f}" if c.stable.bad is None else f"{100 * c.stable.mean:.2f} %"


def _metrics(report: Report) -> str:
    rows = []
    for metric in report.metrics:
        for index, c in enumerate(metric.comparisons or (None,)):
            rows.append(_metric_row(report, metric, c, index == 0))
    head = (
        "metric",
        "stable",
        "canary",
        "canary − stable",
        "harm → roll back",
        "no worse → promote",
        "verdict",
    )
    at = report.thresholds
    return (
        "<h2>What was judged</h2>"
        f"<div class='judged'>{table(head, rows, numbers=(1, 2, 3))}</div>"
        "<p class='soft'>An e-value is evidence: what a bet against the claim turned 1 into. "
        f"{words.limit(at.log_harm_each)} on one guardrail, or a mean of {words.limit(at.log_harm_mean)} "
        "over all of them, rolls back at any time; promotion needs "
        f"{words.limit(at.log_promote)} on every metric that may decide. Differences weigh the looks by "
        "their size, so that a changing share cannot bias them; beside them stands the interval that holds "
        "at every look together.</p>"
    )


def _metric_row(report: Report, metric: MetricReport, c: Comparison | None, first: bool) -> tuple[str, ...]:
    tone, verdict = _VERDICTS[metric.verdict]
    about = f"{escape(metric.question)}; margin {_scaled(metric, metric.margin)}, {metric.role.value}"
    name = escape(metric.name if c is None else words.label(metric, c))
    label = f"{name}<br><span class='soft'>{about}</span>" if first else name
    sides_ = (
        ("–", "–", "–")
        if c is None
        else (_two(words.share(c.stable)), _two(words.share(c.canary)), _apart(metric, c))
    )
    if not first:
        return (label, *sides_, "", "", "")
    return (
        label,
        *sides_,
        _meter(metric.log_harm, metric.log_harm_at, "bad"),
        _meter(metric.log_noninferior, report.thresholds.log_promote, "good"),
        f'<span class="badge {tone}">{verdict}</span>',
    )


def _two(text: str) -> str:
    return escape(text).replace(" (", "<br>(")


def _apart(metric: MetricReport, c: Comparison) -> str:
    found = words.apart(metric, c)
    return "–" if found is None else f"{found[0]}<br><span class='soft'>{found[1]}</span>"


def _scaled(metric: MetricReport, value: float) -> str:
    return f"{100 * value:g} pp" if words.counts_shares(metric) else f"{value:g}"


def _meter(log_e: float, log_at: float, tone: str) -> str:
    share = min(1.0, max(0.0, log_e / log_at))
    return (
        f"{words.e_value(log_e)} of {words.limit(log_at)}"
        f'<span class="meter {tone}" aria-hidden="true"><i style="width:{100 * share:.0f}%"></i></span>'
    )


def _timeline(report: Report) -> str:
    rows = [
        (
            f"{words.duration(m.seconds)}",
            escape(m.what),
            percent(m.weight),
            _glue(words.why(m)),
        )
        for m in report.timeline
    ]
    return (
        "<h2>What happened</h2>"
        f"{_figure(figures.weight(report), 'The canary’s share', 'of the traffic, below its phases.')}"
        f"{table(('after', 'what', 'weight', 'why'), rows)}"
    )


def _evidence(report: Report) -> str:
    if not report.series.seconds:
        return "<h2>Evidence over time</h2><p>No look at the evidence yet.</p>"
    harm = "Every line that reaches the dashed one is shown harm, and rolls the canary back at once."
    better = "When every line has passed the dashed one, the canary is shown to be no worse by its margin."
    return (
        "<h2>Evidence over time</h2>"
        f"{_figure(figures.evidence(report, True), 'Harm.', harm)}"
        f"{_figure(figures.evidence(report, False), 'No worse than stable.', better)}"
        f"{_details('Evidence as a table', _evidence_table(report))}"
    )


def _evidence_table(report: Report) -> str:
    series = report.series
    head = ["after", "weight", "stable", "canary"]
    head += [escape(f"{t.metric} {what}") for t in series.tests for what in ("harm", "no worse")]
    rows = []
    for i in spread(len(series.seconds), _TABLE_ROWS):
        row = [words.duration(series.seconds[i]), percent(series.weight[i])]
        row += [f"{series.requests[arm][i]:,}" for arm in ("stable", "canary")]
        for test in series.tests:
            row += [words.e_value(test.log_harm[i]), words.e_value(test.log_noninferior[i])]
        rows.append(row)
    caption = f"E-values at {len(rows)} of {len(series.seconds)} looks; report.json has all of them"
    return table(head, rows, caption, range(1, len(head)))


def _differences(report: Report) -> str:
    drawn, rows = [], []
    for m, metric in enumerate(report.metrics):
        for k, c in enumerate(metric.comparisons):
            if c.interval is None or not c.interval.seconds:
                continue
            label = escape(words.label(metric, c))
            drawn.append(_figure(figures.difference(report, metric, c, f"difference-{m}-{k}"), label, ""))
            values = (c.interval.estimate[-1], c.interval.low[-1], c.interval.high[-1])
            rows.append((label, *(words.points(v, metric) for v in values), _scaled(metric, metric.margin)))
    if not drawn:
        return ""
    alpha = next(c.interval.alpha for m in report.metrics for c in m.comparisons if c.interval is not None)
    last = table(
        ("metric", "difference", "at least", "at most", "margin"), rows, "At the last look", range(1, 5)
    )
    return (
        "<h2>How much the arms differ</h2>"
        f"<p>Canary minus stable with a confidence sequence: with probability {percent(1 - alpha)} the true "
        "difference is inside the band at every moment shown, so reading it early, or often, is fair.</p>"
        f'<div class="pair">{"".join(drawn)}</div>{_details("Differences as a table", last)}'
    )


def _latencies(report: Report) -> str:
    stable, canary = report.arms
    if not (stable.e2e.n or canary.e2e.n):
        return "<h2>Latency</h2><p>No answered requests yet.</p>"
    limits = {
        f: tuple(c.threshold_s for m in report.metrics if m.kind == f for c in m.comparisons if c.threshold_s)
        for f in ("ttft", "e2e")
    }
    drawn = "".join(
        _figure(
            figures.latency(report.arms, f, limits[f]),
            said,
            "Dots are bucket edges: nothing is known between.",
        )
        for f, said in (("ttft", "Time to first token."), ("e2e", "Time to last token."))
        if getattr(stable, f).n or getattr(canary, f).n
    )
    rows = [
        (f"{arm.arm}, {said}", f"{found.n:,}", *(escape(words.quantile(q)) for q in found.quantiles))
        for f, said in (("ttft", "first token"), ("e2e", "last token"))
        for arm in report.arms
        if (found := getattr(arm, f)).n
    ]
    caption = "Quantiles with both edges of their bucket, answered requests only"
    head = ("", "n", "p50", "p90", "p95", "p99")
    return f'<h2>Latency</h2><div class="pair">{drawn}</div>{table(head, rows, caption, range(1, 6))}'


def _cost(report: Report) -> str:
    rows = [
        (
            arm.arm,
            escape(arm.upstream),
            _money(arm.cost.per_1000, arm.cost.currency),
            _money(arm.cost.at_full_traffic, arm.cost.currency),
            escape(arm.cost.said),
        )
        for arm in report.arms
    ]
    head = ("arm", "upstream", "as it was", "with all traffic", "from")
    return f"<h2>Cost of 1000 requests</h2>{table(head, rows, numbers=(2, 3))}"


def _trust(report: Report) -> str:
    ratio, audit = report.sample_ratio, report.audit
    replayed = (
        f"replaying {audit.ticks} ticks gives the same decisions and the same status, bit for bit"
        if audit.exact
        else "replay differs: " + "; ".join(audit.mismatches)
    )
    said = "the arms did not get the traffic that the split promises; do not trust the comparison"
    facts = (
        ("sample ratio", f"{ratio.canary:,} canary requests where the weights promise {ratio.expected:,.1f}: "
         f"e-value {words.e_value(ratio.log_e)} against that, a mismatch from {words.limit(ratio.log_at)}"
         + (f". {said}." if ratio.mismatch else "; no mismatch")),
        ("audit", f"{audit.entries} entries; {replayed}"),
        ("status digest", audit.digest),
        ("asked for by", report.spec.created_by),
        ("model digest", report.spec.digest or "not known"),
    )  # fmt: skip
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    commands = "\n".join(report.reproduce)
    return (
        f"<h2>Why this can be trusted</h2><dl class='facts'>{listed}</dl>"
        f"<h3>Policy</h3>{_policy(report)}"
        f"<h3>Again</h3><pre>{escape(commands)}</pre>"
        f"<footer>Made {words.utc(report.made_at)} UTC from rollout {escape(report.id)}. Examples quote the "
        "request log: erasing somebody there does not reach a report that was written before.</footer>"
    )


def _policy(report: Report) -> str:
    spec = report.spec
    steps = " → ".join(percent(s.weight) for s in spec.steps) + (
        " and hold" if spec.hold_final else " → 100 %"
    )
    rows = [
        (f"{i + 1}", percent(s.weight), f"{s.min_samples:,}", words.duration(s.min_dwell_s))
        for i, s in enumerate(spec.steps)
    ]
    said = (
        f"Steps {steps}; a look every {words.duration(spec.look_s)}; harm at level {spec.alpha_harm:g}, "
        f"promotion at level {spec.alpha_promote:g}; rolled back without data for "
        f"{words.duration(spec.no_data_deadline_s)}, or at once when "
        f"{percent(spec.kill_switch_errors)} of at least 20 requests failed."
    )
    head = ("step", "weight", "canary requests at least", "time at least")
    return f"<p>{said}</p>{_details('Steps as a table', table(head, rows, '', (1, 2, 3)))}"


def spread(count: int, most: int) -> list[int]:
    """At most so many indices of a sequence, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _figure(svg: str, name: str, said: str) -> str:
    return f"<figure><figcaption><b>{name}</b> {said}</figcaption>{svg}</figure>"


def _details(summary: str, inner: str) -> str:
    return f"<details><summary>{summary}</summary>{inner}</details>"


def _glue(text: str) -> str:
    """Escaped, with numbers that stay beside their units."""
    return re.sub(r"(?<=[\d≤>]) (?=[\d%smp])", "&#160;", escape(text))


def _quantile(value: Latency) -> str:
    found = next((q for q in value.quantiles if q.q == 0.95), None)
    if found is None:
        return "–"
    return (
        f"≤ {words.seconds(found.at_most_s)}"
        if found.at_most_s is not None
        else f"> {words.seconds(found.above_s)}"
    )


def _money(value: float | None, currency: str | None) -> str:
    return "not known" if value is None else f"{value:,.3g} {currency}"
