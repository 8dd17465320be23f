"""A rollout drawn for a terminal: phase, ladder, arms and replicas, tests against thresholds, what is next.

Only rich renderables made from spec, status and audit, for wide and narrow terminals, in Unicode or ASCII.
Reads nothing, decides nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import ASCII, ROUNDED
from rich.console import Console, Group, OverflowMethod, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from contracts.gates import Verdict
from contracts.metrics import ArmCounts, MetricSpec, Role, bucket_quantile
from contracts.rollout import PHASE_SENTENCES, Phase
from contracts.traffic import Upstream
from serve.rollout import evidence, sentences
from serve.rollout.decide import step_evidence
from serve.rollout.pace import Pace, pace
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
_WIDE, _NARROW, _TINY = 120, 96, 64
"""Below so many columns margins are left out, then latencies and what a step needs, then harm and the box."""
_LAST = 4
"""Moves shown of the audit trail."""


@dataclass(frozen=True)
class Look:
    """What a terminal can show, and the signs to show it with."""

    width: int = 140
    ascii: bool = False

    def sign(self, name: str) -> str:
        """A sign by name."""
        return _SIGNS[name][self.ascii]

    def plain(self, text: str) -> str:
        """Text that this terminal can print."""
        return text.replace("→", "->").encode("ascii", "replace").decode() if self.ascii else text


_SIGNS = {
    "done": ("●", "*"),
    "now": ("◉", "@"),
    "todo": ("○", "o"),
    "line": (" ── ", " - "),
    "full": ("█", "#"),
    "empty": ("·", "."),
    "branch": ("├─ ", "|- "),
    "last": ("└─ ", "`- "),
    "bar": ("│  ", "|  "),
    "gap": ("   ", "   "),
    "from": ("←", "<-"),
    "to": ("→", "->"),
    "dot": (" · ", " | "),
    "none": ("–", "-"),
    "pass": ("✔", "+"),
    "fail": ("✖", "x"),
    "wait": ("…", "..."),
    "working": ("⟳", "~"),
    "pause": ("॥", "="),
}
_PHASE_SIGNS = {
    Phase.PENDING: "todo",
    Phase.WARMING: "working",
    Phase.RAMPING: "now",
    Phase.HELD: "wait",
    Phase.PAUSED: "pause",
    Phase.WATCHING: "working",
    Phase.PROMOTING: "working",
    Phase.PROMOTED: "pass",
    Phase.ROLLING_BACK: "working",
    Phase.ROLLED_BACK: "fail",
    Phase.ABORTED: "fail",
}
_VERDICTS = {
    Verdict.PASS: ("pass", "no worse", "green"),
    Verdict.FAIL: ("fail", "harm", "red"),
    Verdict.INCONCLUSIVE: ("wait", "open", "yellow"),
    Verdict.NO_DATA: ("none", "no data", "dim"),
    Verdict.ERROR: ("fail", "error", "red"),
}


@dataclass(frozen=True)
class Live:
    """What is known besides the rollout itself, for whoever watches it run."""

    trail: Sequence[AuditEntry] = ()
    replicas: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Ray Serve application → its replicas' URLs."""


def look_of(console: Console) -> Look:
    """What a console can show."""
    return Look(console.width, ascii=not console.encoding.lower().startswith("utf"))


def rollout_panel(
    stored: StoredRollout,
    now: float | None = None,
    live: Live | None = None,
    look: Look = Look(),
) -> RenderableType:
    """Everything about one rollout on one screen."""
    spec, status = stored.spec, stored.status
    at = time.time() if now is None else now
    parts: list[RenderableType] = [head(stored, look), Text(f"why    {look.plain(status.reason)}")]
    parts.append(ladder(stored, look))
    parts.append(Text(_age(stored, at, look), style="dim"))
    coming = upcoming(stored, live or Live(), at)
    if coming:
        parts.append(Text("next   " + look.sign("dot").join(coming)))
    parts += [Text(), arms_table(stored, live or Live(), look), Text(), metrics_table(stored, look)]
    moves = last_moves(live.trail if live is not None else (), look)
    parts += [Text(), moves] if moves is not None else []
    body = Group(*parts)
    title = f"[bold]{escape(spec.route)}[/] {look.sign('from')} {escape(spec.model_ref)} [dim]{spec.id}[/]"
    if look.width < _TINY:
        return Group(Text.from_markup(title), body)
    box = ASCII if look.ascii else ROUNDED
    return Panel(body, title=title, title_align="left", border_style=_colour(stored), box=box)


def head(stored: StoredRollout, look: Look) -> Text:
    """The phase with its sign and its sentence."""
    phase = stored.status.phase
    sign = look.sign(_PHASE_SIGNS.get(phase, "working"))
    said = look.plain(PHASE_SENTENCES[phase])
    return Text.assemble((f"{sign} {phase.value.upper()} ", f"bold {_colour(stored)}"), (said, "dim"))


def ladder(stored: StoredRollout, look: Look = Look()) -> Text:
    """The ramp on one line: done, current and coming steps, then the promotion."""
    spec, status = stored.spec, stored.status
    line = Text("ramp   ")
    for index, step in enumerate(spec.steps):
        mark, style = "todo", "dim"
        if status.max_weight > 0 and (index < status.step or status.decision == "promoted"):
            mark, style = "done", "green"
        elif status.max_weight > 0 and index == status.step:
            mark, style = "now", "bold " + _colour(stored)
        line.append(f"{look.sign(mark)} {sentences.percent(step.weight)}", style=style)
        line.append(look.sign("line"), style="dim")
    done = status.phase is Phase.PROMOTED
    return line.append(look.sign("done" if done else "todo") + " 100 %", style="green" if done else "dim")


def upcoming(stored: StoredRollout, live: Live, now: float) -> list[str]:
    """Countdowns: the next look, what the step still needs, and a guess of the end at the present pace."""
    spec, status = stored.spec, stored.status
    if status.phase not in (Phase.RAMPING, Phase.HELD, Phase.PAUSED):
        return []
    step = spec.steps[status.step]
    seen = status.step_counts.get("canary", ArmCounts()).n
    left = step.min_dwell_s - (now - status.step_since)
    found = [f"look in {duration(status.next_look_at - now)}"]
    if left > 0:
        found.append(f"step lasts {duration(left)} more")
    if seen < step.min_samples:
        found.append(f"{seen} of {step.min_samples} canary requests")
    found.append(_guess(pace(spec, status, live.trail, now), spec.hold_final))
    return [said for said in found if said]


def arms_table(stored: StoredRollout, live: Live, look: Look) -> Table:
    """The route as a tree: each arm with its share, its counts so far and its replicas."""
    status, narrow, tiny = stored.status, look.width < _NARROW, look.width < _TINY
    names = ["arm", "weight", "requests", "errors"] + ([] if tiny else ["graded"]) + ["wrong"]
    table = _bare(*names, *([] if narrow else ["ttft p50/p95", "e2e p50/p95"]))
    candidate = stored.spec.candidate
    arms = (("stable", status.stable, _stable_share(stored)), ("canary", candidate, status.weight))
    for place, (arm, upstream, weight) in enumerate(arms):
        c = status.total_counts.get(arm, ArmCounts())
        branch = look.sign("branch" if place == 0 else "last")
        name = "" if tiny else f" {upstream.name if upstream else look.sign('none')}"
        rates = (_rate(c.errors, c.n), _rate(c.failed(), c.graded()))
        errors, wrong = (r.partition(" (")[0] for r in rates) if tiny else rates
        row = [Text.assemble((branch, "dim"), (arm, "bold"), name), Text(sentences.percent(round(weight, 4)))]
        row += [Text(f"{c.n:,}"), Text(errors), *([] if tiny else [Text(f"{c.graded():,}")]), Text(wrong)]
        row += [] if narrow else [Text(look.plain(quantiles(b))) for b in (c.ttft, c.e2e)]
        table.add_row(*row)
        for replica in () if tiny else _replicas(upstream, live, look, last=place == 1):
            table.add_row(replica)
    return table


def _stable_share(stored: StoredRollout) -> float:
    """What the student leaves the stable arm or, while an A/B/n test runs, what all of them do."""
    status, block = stored.status, stored.status.srm_block
    if stored.spec.test is None or block is None or status.decision is not None:
        return 1.0 - status.weight
    return status.weight / block.share - status.weight


def metrics_table(stored: StoredRollout, look: Look = Look()) -> Table:
    """Every metric's two tests as bars that are full at their thresholds."""
    spec, status = stored.spec, stored.status
    to, tiny, narrow = look.sign("to"), look.width < _TINY, look.width < _NARROW
    names = ["metric"] + ([] if tiny else [f"harm {to} roll back"]) + [f"no worse {to} promote"]
    table = _bare(*names, *([] if narrow else ["step needs"]), "verdict", left=True)
    if not status.metrics:
        return table
    family = evidence.combine(spec, status.metrics)
    needed = step_evidence(spec, status.step)
    about = {m.key: _about(m, look) for m in spec.metrics}
    for m in status.metrics:
        row = [Text(m.name).append(about[m.name], style="dim")]
        row += [] if tiny else [bar(m.log_harm, family.log_harm_each_at, "red", look)]
        row.append(bar(m.log_noninferior, family.log_promote_at, "green", look))
        row += [] if narrow else [Text(f"{needed:.3g}")]
        sign, said, style = _VERDICTS[m.verdict]
        table.add_row(*row, Text(f"{look.sign(sign)} {said}", style=style))
    return table


def bar(log_e: float, log_at: float, colour: str, look: Look = Look()) -> Text:
    """An e-value on a log scale from 1 to its threshold."""
    size = 8 if look.width < _NARROW else 16
    filled = round(size * min(1.0, max(0.0, log_e / log_at)))
    text = Text(look.sign("full") * filled, style=colour)
    text.append(look.sign("empty") * (size - filled), style="dim")
    return text.append(f" {sentences.number(log_e)} of {math.exp(log_at):.3g}")


def last_moves(trail: Sequence[AuditEntry], look: Look) -> Table | None:
    """The last things that happened, newest first; None before anything did."""
    moved = [e for e in trail if e.kind == "transition"][-_LAST:]
    if not moved:
        return None
    cut: OverflowMethod = "crop" if look.ascii else "ellipsis"
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in ("at", "what", "why"):
        table.add_column(name, no_wrap=True, overflow=cut)
    for entry in reversed(moved):
        reason = Text(look.plain(str(entry.body.get("reason", ""))), no_wrap=True, overflow=cut)
        table.add_row(Text(when(entry.at)[11:], style="dim"), look.plain(_what(entry)), reason)
    return table


def line(stored: StoredRollout) -> str:
    """A rollout in one line, for logs and pipes."""
    spec, status = stored.spec, stored.status
    canary = status.total_counts.get("canary", ArmCounts())
    return (
        f"{spec.route} {spec.model_ref} {status.phase.value} {sentences.percent(status.weight)} "
        f"step {status.step + 1}/{len(spec.steps)} canary {canary.n}: {status.reason}"
    )


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
    return "/".join(_seconds(bucket_quantile(buckets, q)) for q in (0.5, 0.95)) if sum(buckets) else "–"


def duration(seconds: float) -> str:
    """Seconds for people."""
    s = max(0, int(seconds))
    if s < 120:
        return f"{s} s"
    return f"{s // 60} min" if s < 7200 else f"{s // 3600} h {s % 3600 // 60} min"


def when(at: float) -> str:
    """Local time for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _seconds(edge: float | None) -> str:
    if edge is None:
        return "≤inf"
    return f"{1000 * edge:g} ms" if edge < 1 else f"{edge:g} s"


def _what(entry: AuditEntry) -> str:
    if entry.kind == "look":
        return "look"
    moved = (entry.body.get("from"), entry.body.get("to"))
    return entry.body.get("event") or (f"{moved[0]} → {moved[1]}" if moved[0] != moved[1] else "note")


def _colour(stored: StoredRollout) -> str:
    return _COLOURS.get(stored.status.phase, "blue")


def _about(metric: MetricSpec, look: Look) -> str:
    role = "" if metric.role is Role.GUARDRAIL else f" {metric.role.value}"
    return f" margin {100 * metric.margin:g} pp{role}" if look.width >= _WIDE else ""


def _age(stored: StoredRollout, at: float, look: Look) -> str:
    old, since = at - stored.spec.created_at, at - stored.status.phase_since
    return f"since  {duration(old)} ago" + look.sign("dot") + f"in this phase for {duration(since)}"


def _guess(found: Pace, hold_final: bool) -> str:
    if found.seconds is None:
        return "" if found.said == "not ramping" else found.said
    goal = "every test is passed" if hold_final else "promotion"
    return f"about {duration(found.seconds)} to {goal} at this pace ({found.said})"


def _bare(*names: str, left: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, justify="left" if left or name == names[0] else "right", no_wrap=True)
    return table


def _replicas(upstream: Upstream | None, live: Live, look: Look, *, last: bool) -> list[Text]:
    if upstream is None:
        return []
    urls: list[str] = []
    for part in upstream.parts:
        urls += [part.url] if part.url is not None else live.replicas.get(part.app or "", ())
    start = look.sign("gap" if last else "bar")
    signs = [look.sign("branch")] * (len(urls) - 1) + [look.sign("last")]
    return [
        Text(f"{start}{sign}{look.plain(url)}", style="dim") for sign, url in zip(signs, urls, strict=False)
    ]


def _rate(k: int, n: int) -> str:
    return f"{k} ({100 * k / n:.1f} %)" if n else "0"
