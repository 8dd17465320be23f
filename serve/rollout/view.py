"""A rollout drawn for a terminal: phase, ladder, counts by arm, every test against its threshold, the reason.

Only rich renderables made from spec, status and audit. Reads nothing, decides nothing.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from contracts.gates import Verdict
from contracts.metrics import LATENCY_BUCKETS_S, ArmCounts
from contracts.rollout import PHASE_SENTENCES, Phase
from serve.rollout import evidence, sentences
from serve.rollout.decide import step_evidence
from serve.state.rollouts import AuditEntry, StoredRollout

_COLOURS = {
    Phase.RAMPING: "cyan",
    Phase.HELD: "yellow",
    Phase.PAUSED: "yellow",
    Phase.WATCHING: "green",
    Phase.PROMOTING: "green",
    Phase.PROMOTED: "green",
    Phase.ROLLING_BACK: "red",
    Phase.ROLLED_BACK: "red",
    Phase.ABORTED: "magenta",
}
_VERDICTS = {
    Verdict.PASS: "[green]✔ PASS[/]",
    Verdict.FAIL: "[red]✖ FAIL[/]",
    Verdict.NO_DATA: "[dim]NO_DATA[/]",
}
_BAR = 16


def rollout_panel(stored: StoredRollout, now: float | None = None) -> RenderableType:
    """Everything about one rollout on one screen."""
    spec, status = stored.spec, stored.status
    colour = _COLOURS.get(status.phase, "blue")
    at = time.time() if now is None else now
    head = Text.assemble(
        (f"{status.phase.value.upper()} ", f"bold {colour}"), (PHASE_SENTENCES[status.phase], "dim")
    )
    age = f"{duration(at - spec.created_at)} old, {duration(at - status.phase_since)} in this phase"
    body = Group(
        head,
        Text(f"why   {status.reason}"),
        ladder(stored),
        Text(f"weight {sentences.percent(status.weight)} · stable {_stable(stored)} · {age}", style="dim"),
        counts_table(status.total_counts),
        metrics_table(stored),
    )
    title = f"[bold]{spec.route}[/] ← {spec.model_ref} [dim]{spec.id}[/]"
    return Panel(body, title=title, title_align="left", border_style=colour)


def ladder(stored: StoredRollout) -> Text:
    """The ramp on one line: done, current and coming steps, then the promotion."""
    spec, status = stored.spec, stored.status
    line = Text("ramp  ")
    for index, step in enumerate(spec.steps):
        mark, style = "○", "dim"
        if status.max_weight > 0 and (index < status.step or status.decision == "promoted"):
            mark, style = "●", "green"
        elif status.max_weight > 0 and index == status.step:
            mark, style = "◉", "bold " + _COLOURS.get(status.phase, "blue")
        line.append(f"{mark} {sentences.percent(step.weight)}", style=style).append(" ── ", style="dim")
    done = status.phase is Phase.PROMOTED
    return line.append(("● " if done else "○ ") + "100 %", style="green" if done else "dim")


def counts_table(counts: dict[str, ArmCounts]) -> Table:
    """Requests, failures and latencies by arm since the rollout began."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("arm", "requests", "errors", "graded", "wrong", "ttft p50/p95", "e2e p50/p95"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in ("stable", "canary"):
        c = counts.get(arm, ArmCounts())
        wrong = _rate(c.failed(), c.graded())
        table.add_row(
            arm, str(c.n), _rate(c.errors, c.n), str(c.graded()), wrong, quantiles(c.ttft), quantiles(c.e2e)
        )
    return table


def metrics_table(stored: StoredRollout) -> Table:
    """Every metric's two tests as bars that are full at their thresholds."""
    spec, status = stored.spec, stored.status
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("metric", "harm e-value → roll back", "no-worse e-value → promote", "step needs", "verdict"):
        table.add_column(name)
    if not status.metrics:
        return table
    family = evidence.combine(spec, status.metrics)
    needed = step_evidence(spec, status.step)
    margins = {m.key: m.margin for m in spec.metrics}
    for m in status.metrics:
        table.add_row(
            f"{m.name} [dim]margin {100 * margins[m.name]:g} pp[/]",
            bar(m.log_harm, family.log_harm_each_at, "red"),
            bar(m.log_noninferior, family.log_promote_at, "green"),
            f"{needed:.3g}",
            _VERDICTS.get(m.verdict, "… undecided"),
        )
    return table


def bar(log_e: float, log_at: float, colour: str) -> Text:
    """An e-value on a log scale from 1 to its threshold."""
    filled = round(_BAR * min(1.0, max(0.0, log_e / log_at)))
    text = Text("█" * filled, style=colour).append("·" * (_BAR - filled), style="dim")
    return text.append(f" {sentences.number(log_e)} of {sentences.number(log_at)}")


def history_table(found: list[StoredRollout]) -> Table:
    """All rollouts, one line each."""
    table = Table(header_style="bold")
    for name in ("started", "id", "route", "model", "phase", "max weight", "canary requests", "why"):
        table.add_column(name, no_wrap=name in ("started", "phase"), overflow="fold")
    for r in found:
        canary = r.status.total_counts.get("canary", ArmCounts())
        phase = f"[{_COLOURS.get(r.status.phase, 'blue')}]{r.status.phase.value}[/]"
        table.add_row(
            when(r.spec.created_at), r.spec.id, r.spec.route, r.spec.model_ref, phase,
            sentences.percent(r.status.max_weight), str(canary.n), Text(r.status.reason),
        )  # fmt: skip
    return table


def audit_table(trail: list[AuditEntry], transitions_only: bool) -> Table:
    """The audit trail: every move, and every look with its strongest evidence."""
    table = Table(header_style="bold")
    for name in ("tick", "at", "what", "weight", "reason"):
        table.add_column(name, no_wrap=name != "reason", overflow="fold")
    for e in trail:
        if transitions_only and e.kind != "transition":
            continue
        notes = "; ".join(e.body.get("notes", []))
        reason = Text(str(e.body.get("reason", "")) + (f" [{notes}]" if notes else ""))
        weight = sentences.percent(float(e.body.get("weight", 0.0)))
        table.add_row(str(e.tick), when(e.at), _what(e), weight, reason)
    return table


def as_json(stored: StoredRollout) -> dict[str, Any]:
    """Spec, status (without the tests' inner state) and the thresholds, for machines."""
    spec, status = stored.spec, stored.status
    family = evidence.combine(spec, status.metrics)
    dumped = status.model_dump(mode="json")
    for metric in dumped["metrics"]:
        metric.pop("state")
    return {
        "spec": spec.model_dump(mode="json"),
        "status": dumped,
        "thresholds": {
            "log_harm_each": family.log_harm_each_at,
            "log_harm_mean": family.log_harm_mean_at,
            "log_promote": family.log_promote_at,
            "step_evidence": step_evidence(spec, status.step),
        },
    }


def quantiles(buckets: tuple[int, ...]) -> str:
    """p50/p95 as the upper edges of the buckets they fall in."""
    return "/".join(_edge(buckets, q) for q in (0.5, 0.95)) if sum(buckets) else "–"


def duration(seconds: float) -> str:
    """Seconds for people."""
    s = max(0, int(seconds))
    if s < 120:
        return f"{s} s"
    return f"{s // 60} min" if s < 7200 else f"{s // 3600} h {s % 3600 // 60} min"


def when(at: float) -> str:
    """Local time for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _edge(buckets: tuple[int, ...], q: float) -> str:
    left = q * sum(buckets)
    for count, edge in zip(buckets, (*LATENCY_BUCKETS_S, float("inf")), strict=True):
        left -= count
        if left <= 0:
            return "≤inf" if edge == float("inf") else (f"{1000 * edge:g} ms" if edge < 1 else f"{edge:g} s")
    return "–"


def _what(entry: AuditEntry) -> str:
    if entry.kind == "look":
        return "look"
    moved = (entry.body.get("from"), entry.body.get("to"))
    return entry.body.get("event") or (f"{moved[0]} → {moved[1]}" if moved[0] != moved[1] else "note")


def _rate(k: int, n: int) -> str:
    return f"{k} ({100 * k / n:.1f} %)" if n else "0"


def _stable(stored: StoredRollout) -> str:
    return stored.status.stable.name if stored.status.stable is not None else "–"
