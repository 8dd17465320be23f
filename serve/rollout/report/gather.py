"""Gathers one rollout's facts: spec, status and audit trail from the state store, texts from the request log.

Reads only; works on running and on finished rollouts, with and without a request log. Knows nothing about how
a report looks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from contracts.metrics import ArmCounts, Role
from contracts.price import Price
from contracts.rollout import RolloutSpec
from contracts.traffic import RequestRow
from serve.rollout import evidence
from serve.rollout.replay import canonical, digest, replay
from serve.rollout.report import alike, confidence, measures, trail, words
from serve.rollout.report.cost import Served, cost
from serve.rollout.report.model import (
    Answer,
    ArmReport,
    Audit,
    Example,
    Examples,
    MetricReport,
    Report,
    SampleRatio,
    Series,
    Thresholds,
)
from serve.rollout.report.requests import KINDS, Match, Scan, right, scan
from serve.rollout.stats import srm
from serve.rollout.stats.combine import Family
from serve.state.rollouts import AuditEntry, RolloutState, StoredRollout

EXAMPLES_EACH = 3
"""Examples of every kind that a report shows at most."""


@dataclass(frozen=True)
class Sources:
    """Where a report's facts come from besides the rollout itself."""

    request_log: Path | None = None
    """Folder of the request log; None, or a folder that is not there: no tokens, no examples."""
    prices: Mapping[str, Price] = field(default_factory=dict)
    """Upstream → what it costs."""
    student_price: Price | None = None
    """For candidates that are no declared upstream."""


def gather(
    rollouts: RolloutState,
    rollout_id: str,
    sources: Sources,
    *,
    examples: int = EXAMPLES_EACH,
    now: float | None = None,
) -> Report:
    """The report of one rollout as it is now.

    Args:
        examples: how many of every kind are shown; 0 leaves texts out altogether.
        now: Unix seconds.

    Raises: NotFoundError when there is no such rollout.
    """
    stored, entries = rollouts.get(rollout_id), rollouts.audit(rollout_id)
    return report(stored, entries, sources, examples=examples, now=time.time() if now is None else now)


def report(
    stored: StoredRollout, entries: list[AuditEntry], sources: Sources, *, examples: int, now: float
) -> Report:
    """The same from what the store holds."""
    spec, status = stored.spec, stored.status
    seen = list(trail.windows(spec, entries))
    series = trail.series(spec, entries)
    ends = entries[-1].at if status.phase.terminal and entries else now
    logged = _scan(sources.request_log, spec, ends, examples)
    family = evidence.combine(spec, status.metrics)
    return Report(
        made_at=now,
        id=spec.id,
        route=spec.route,
        model_ref=spec.model_ref,
        ab_test=spec.hold_final,
        stable=_stable(stored),
        candidate=spec.candidate.name,
        phase=status.phase,
        decision=status.decision,
        headline=words.headline(stored),
        sentence=words.sentence(stored, _decided_at(entries, ends) - spec.created_at),
        started_at=spec.created_at,
        seconds=ends - spec.created_at,
        weight=status.weight,
        max_weight=status.max_weight,
        timeline=trail.timeline(spec, entries),
        series=series,
        thresholds=Thresholds(
            log_harm_each=family.log_harm_each_at,
            log_harm_mean=family.log_harm_mean_at,
            log_promote=family.log_promote_at,
        ),
        metrics=_metrics(stored, seen),
        arms=_arms(stored, series, logged, sources),
        sample_ratio=sample_ratio(spec, seen),
        examples=_examples(logged, sources.request_log, examples),
        spec=spec,
        audit=_audit(stored, entries),
        reproduce=(
            f"stillhouse rollout history --id {spec.id} --looks",
            f"stillhouse rollout replay {spec.id}",
            f"stillhouse rollout report --id {spec.id}",
        ),
        notes=_notes(stored, seen, logged, entries),
    )


def sample_ratio(spec: RolloutSpec, seen: list[trail.Seen]) -> SampleRatio:
    """Requests by arm against the shares that their splits promised, over all steps together.

    Requests of one conversation are assigned together and count as one, as in the rules.
    """
    state, stages = srm.start(), []
    for each in seen:
        if each.weight is None or not 0.0 < each.weight < 1.0:
            continue
        stages.append((each.weight, each.window.stable.n, each.window.canary.n))
        state = srm.look(state, stages[-1][2], sum(stages[-1][1:]), each.weight)
    unit = spec.srm_unit_requests
    units = srm.State(tuple(srm.Block(b.share, b.canary / unit, b.other / unit) for b in state.blocks))
    log_e, log_at = srm.log_e(units), math.log(1.0 / spec.alpha_srm)
    return SampleRatio(
        canary=sum(canary for _, _, canary in stages),
        expected=measures.promised(stages),
        log_e=log_e,
        log_at=log_at,
        mismatch=log_e >= log_at,
    )


def _metrics(stored: StoredRollout, seen: list[trail.Seen]) -> tuple[MetricReport, ...]:
    looked = confidence.merged(seen)
    counts, known = stored.status.total_counts, {m.name: m for m in stored.status.metrics}
    family = evidence.combine(stored.spec, stored.status.metrics)
    return tuple(
        MetricReport(
            name=m.key,
            kind=m.kind,
            role=m.role,
            question=measures.question(m),
            margin=m.margin,
            tolerance=m.harm_tolerance,
            better=m.better,
            verdict=known[m.key].verdict,
            log_harm=known[m.key].log_harm,
            log_harm_at=_harm_at(m.role, family, stored.spec.alpha_harm),
            log_noninferior=known[m.key].log_noninferior,
            comparisons=confidence.with_intervals(
                m, measures.comparisons(m, known[m.key], counts), looked, stored.spec.alpha_harm
            ),
        )
        for m in stored.spec.metrics
    )


def _harm_at(role: Role, family: Family, alpha: float) -> float:
    each = {Role.GUARDRAIL: family.log_harm_each_at, Role.OBJECTIVE: family.log_objective_each_at}
    return each.get(role, math.log(1.0 / alpha))


def _arms(stored: StoredRollout, series: Series, logged: Scan, sources: Sources) -> tuple[ArmReport, ...]:
    counts = stored.status.total_counts
    candidate, stable = stored.spec.candidate, stored.status.stable
    upstreams = {"stable": _stable(stored), "canary": candidate.name}
    cascades = {u.name for u in (candidate, stable) if u is not None and u.cascade is not None}
    student_price = sources.student_price if candidate.cascade is None else None
    prices: dict[str, Price | None] = {candidate.name: student_price, **sources.prices}
    if stable is not None and stable.digest is not None:  # an earlier student
        prices.setdefault(stable.name, sources.student_price)
    everything = sum(counts.get(arm, ArmCounts()).n for arm in upstreams)
    ramp = series.seconds[-1] - series.seconds[0] + stored.spec.look_s if series.seconds else 0.0
    return tuple(
        ArmReport(
            arm=arm,
            upstream=upstream,
            requests=(c := counts.get(arm, ArmCounts())).n,
            errors=c.errors,
            ttft=measures.latency(c.ttft),
            e2e=measures.latency(c.e2e),
            cost=cost(
                arm, upstream, logged.usage, prices, Served(c.n, everything, ramp), upstream in cascades
            ),
        )
        for arm, upstream in upstreams.items()
    )


def _scan(folder: Path | None, spec: RolloutSpec, ends: float, each: int) -> Scan:
    return Scan() if folder is None or not folder.is_dir() else scan(folder, spec, ends, each)


def _examples(logged: Scan, folder: Path | None, each: int) -> Examples:
    if logged.rows == 0:
        where = "no request log is configured here" if folder is None else f"no rows in {folder.name}/"
        return Examples(said=f"No examples: {where} of this rollout.")
    if each == 0:
        return Examples(rows=logged.rows, said="Texts were left out (--examples 0).")
    shown = tuple(_example(m) for kind in KINDS for m in _best(logged.worst, kind, each))
    broken = f" {logged.broken} lines of the log could not be read." if logged.broken else ""
    return Examples(
        shown=shown, rows=logged.rows, said=f"Out of {logged.rows:,} logged requests of this rollout.{broken}"
    )


def _best(worst: list[Match], kind: str, each: int) -> list[Match]:
    """Those with the best counterpart first, none twice; the slowest are what they are, in order."""
    mine = [m for m in worst if m.kind == kind]
    if kind != "slowest":
        mine.sort(key=lambda m: m.rank, reverse=True)
    distinct = {
        (alike.prompt(m.row.request) or m.row.request_id, m.row.response_text): m for m in reversed(mine)
    }
    return [m for m in mine if m in distinct.values()][:each]


def _example(match: Match) -> Example:
    canary, other = _answer(match.row), None if match.other is None else _answer(match.other)
    texts = (None if other is None else other.text, canary.text)
    relation = match.relation
    if other is None and canary.prompt is None:
        relation = "its request is not kept, so nothing can be held beside it"
    return Example(
        why=match.kind,
        canary=canary,
        other=other,
        relation=relation,
        similarity=None if other is None else match.rank[1],
        diff=alike.diff(texts[0], texts[1]) if texts[0] is not None and texts[1] is not None else (),
    )


def _answer(row: RequestRow) -> Answer:
    missing = ""
    if row.response_text is None:
        length = "" if row.response_chars is None else f", it had {row.response_chars:,} characters"
        kept = (
            "it gave no text" if row.outcome.failed else f"not kept (log mode {row.log_mode.value}{length})"
        )
        missing = kept
    asked = alike.prompt(row.request)
    return Answer(
        request_id=row.request_id,
        arm=row.arm.value,
        upstream=row.upstream,
        status=row.status,
        outcome=row.outcome.value,
        grade=right(row),
        ttft_s=row.ttft_s,
        e2e_s=row.e2e_s,
        completion_tokens=row.completion_tokens,
        prompt=None if asked is None else alike.cut(asked),
        text=None if row.response_text is None else alike.cut(row.response_text),
        missing=missing,
        error=None if row.error is None else alike.cut(row.error),
    )


def _audit(stored: StoredRollout, entries: list[AuditEntry]) -> Audit:
    replayed = replay(stored, entries)
    return Audit(
        entries=len(entries),
        ticks=replayed.ticks,
        exact=replayed.exact,
        mismatches=replayed.mismatches[:10],
        digest=digest(canonical(stored.status)),
    )


def _notes(
    stored: StoredRollout, seen: list[trail.Seen], logged: Scan, entries: list[AuditEntry]
) -> tuple[str, ...]:
    notes = []
    if not entries:
        notes.append("Nothing has happened yet: the audit trail is empty.")
    found, status = trail.totals(seen), stored.status.total_counts
    if any(found[arm] != status.get(arm, ArmCounts()) for arm in found):
        notes.append("The windows in the audit trail do not add up to the counts in the status.")
    if entries and logged.rows == 0:
        notes.append("The request log has no rows of this rollout: no examples, no tokens.")
    return tuple(notes)


def _decided_at(entries: list[AuditEntry], otherwise: float) -> float:
    decided = (e.at for e in entries if e.body.get("decision") and e.body.get("event") == e.body["decision"])
    return next(decided, otherwise)


def _stable(stored: StoredRollout) -> str:
    return (
        stored.status.stable.name if stored.status.stable is not None else "not known before the first step"
    )
