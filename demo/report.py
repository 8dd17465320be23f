"""`report.html`: the demo's evidence and figures as one page that needs nothing else.

Usage: python -m demo.report runs/demo

Reads what a run left behind: summary.json, the audit trail, the request log. Decides nothing.
"""

from __future__ import annotations

import html
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from contracts.metrics import GRADE
from demo import plots
from serve.state.rollouts import AuditEntry, RolloutState
from serve.state.tables import open_state

QUALITY_BINS = 24
STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: .2rem }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #e2e8f0 }
table { border-collapse: collapse; margin: .6rem 0 }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #e2e8f0; text-align: right }
td:first-child, th:first-child { text-align: left }
.promoted { color: #15803d }
.rolled_back { color: #b91c1c }
svg { max-width: 100%; height: auto }
p.why { background: #f1f5f9; padding: .6rem .8rem; border-radius: 6px }
small { color: #64748b }
"""


def write(out: Path) -> Path:
    """Write `report.html` beside the summary of a run; returns its path."""
    facts = json.loads((out / "summary.json").read_text())
    state = RolloutState(open_state(f"sqlite:///{out.resolve() / 'state.db'}"))
    rows = list(_log_rows(out))
    sections = [_head(facts), _compression(facts)]
    for fact in facts["rollouts"]:
        mine = [r for r in rows if r["rollout_id"] == fact["id"]]
        sections.append(_rollout(fact, state.audit(fact["id"]), mine))
    sections.append(_stages(facts))
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Stillhouse demo</title>"
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _head(facts: dict[str, Any]) -> str:
    traffic = facts["traffic"]
    return (
        "<h1>Stillhouse demo</h1>"
        f"<p>{traffic['requests']:,} client requests, <b>{traffic['failed']} failed</b>; "
        f"{facts['seconds']:.0f} s.</p>"
    )


def _compression(facts: dict[str, Any]) -> str:
    teacher, student, quantized = facts["teacher"], facts["student"], facts["quantized"]
    rows = [
        ("teacher", teacher, teacher["perplexity"]),
        ("student bf16", student, quantized["bf16_perplexity"]),
        (f"student {quantized['format']}", {**student, **quantized}, quantized["perplexity"]),
    ]
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{m['params']:,}</td><td>{m['bytes']:,}</td>"
        f"<td>{m['accuracy']:.2%}</td>"
        f"<td>{ppl:.4f}</td><td>{_number(m.get('tokens_per_s'))}</td></tr>"
        for name, m, ppl in rows
    )
    bars = [
        (
            name.replace("student ", ""),
            m["accuracy"] / teacher["accuracy"],
            m["params"] / teacher["params"],
            m["bytes"] / teacher["bytes"],
            (m.get("tokens_per_s") or math.nan) / teacher["tokens_per_s"],
        )
        for name, m, _ in rows
    ]
    return (
        "<h2>What compression bought</h2>"
        "<table><tr><th></th><th>parameters</th><th>bytes</th><th>exact match</th>"
        f"<th>perplexity of the teacher's answers</th><th>tokens/s</th></tr>{cells}</table>"
        "<p><small>Accuracy and perplexity through vLLM on held-out requests; tokens/s under the same load, "
        f"alternating turns.</small></p>{plots.compression(bars)}"
    )


def _rollout(fact: dict[str, Any], audit: list[AuditEntry], rows: list[dict[str, Any]]) -> str:
    evidence = _evidence(audit)
    began = audit[0].at if audit else 0.0
    drawn = plots.rollout(f"{fact['model']}: {fact['decision']}", evidence) if evidence.looks else ""
    return (
        f"<h2>{html.escape(fact['model'])}: <span class='{fact['decision']}'>{fact['decision']}</span></h2>"
        f"<p class='why'>{html.escape(fact['reason'])}</p>"
        f"<p>{fact['requests']:,} requests in {fact['seconds']:.0f} s, {fact['canary_requests']:,} of them "
        f"counted for the canary, at most {fact['max_weight']:.0%} of the traffic; "
        f"{fact['failed_requests']} failed for the client.</p>"
        f"{drawn}<h3>Right answers by arm</h3>{plots.quality(_quality(rows, began))}"
        f"<h3>Latency by arm</h3>{plots.latency(_latency(rows))}"
    )


def _evidence(audit: list[AuditEntry]) -> plots.Evidence:
    looked = [e for e in audit if e.kind == "look"]
    began = looked[0].at if looked else 0.0
    looks = [
        plots.Look(
            e.at - began,
            e.body["weight"],
            {m["metric"]: m["log_harm"] for m in e.body["metrics"]},
            {m["metric"]: m["log_noninferior"] for m in e.body["metrics"]},
        )
        for e in looked
    ]
    thresholds = looked[-1].body["thresholds"] if looked else {"log_harm_each": 0.0, "log_promote": 0.0}
    phases = [
        (e.at - began, str(e.body["to"]))
        for e in audit
        if e.kind == "transition" and e.body["from"] != e.body["to"] and e.at >= began
    ]
    return plots.Evidence(looks, thresholds["log_harm_each"], thresholds["log_promote"], phases)


def _quality(rows: list[dict[str, Any]], began: float) -> dict[str, list[tuple[float, float, float]]]:
    """Share of right answers in bins of equal time, with the half width of its normal 95 % interval."""
    graded = [r for r in rows if GRADE in r["scores"]]
    if not graded:
        return {"stable": [], "canary": []}
    last = max(r["ts"] for r in graded) - began
    width = max(last, 1.0) / QUALITY_BINS
    points: dict[str, list[tuple[float, float, float]]] = {"stable": [], "canary": []}
    for arm, found in points.items():
        for i in range(QUALITY_BINS):
            low, high = began + i * width, began + (i + 1) * width
            grades = [r["scores"][GRADE] for r in graded if r["arm"] == arm and low <= r["ts"] < high]
            if grades:
                share = sum(grades) / len(grades)
                half = 1.96 * math.sqrt(max(share * (1 - share), 1e-4) / len(grades))
                found.append(((i + 0.5) * width, share, min(half, 0.5)))
    return points


def _latency(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    def values(field: str) -> dict[str, list[float]]:
        return {
            arm: [r[field] for r in rows if r["arm"] == arm and r["outcome"] == "ok" and r[field] is not None]
            for arm in ("stable", "canary")
        }

    return {"time to first token": values("ttft_s"), "end to end": values("e2e_s")}


def _stages(facts: dict[str, Any]) -> str:
    cells = "".join(f"<tr><td>{html.escape(s)}</td><td>{t:.1f}</td></tr>" for s, t in facts["stages"].items())
    return (
        f"<h2>Distillation, stage by stage</h2><table><tr><th>stage</th><th>seconds</th></tr>{cells}</table>"
    )


def _log_rows(out: Path) -> Iterator[dict[str, Any]]:
    """Rows of the request log that a rollout saw; a torn last line is skipped."""
    for file in sorted((out / "requests").glob("requests-*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if row.get("rollout_id"):
                yield row


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")))
