"""From the audit trail to the report's time lines: moves, evidence at every look, counts of every window.

The e-values are those the controller decided on, as the trail holds them, not computed anew. Knows nothing
about the request log or how things look.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from contracts.metrics import PAIR, ArmCounts
from contracts.rollout import Phase, RolloutSpec
from serve.rollout.observation import Observation, SeenWindow
from serve.rollout.report.model import Move, Series, TestSeries
from serve.state.rollouts import AuditEntry

_DRAINED = frozenset(phase.value for phase in Phase if phase.terminal)


@dataclass(frozen=True)
class Seen:
    """A window that was consumed, and the canary's weight while its requests were assigned."""

    seconds: float
    """When it was looked at, since the rollout was asked for."""
    weight: float | None
    """Among the units that were its own or stable's; None when the trail does not say which its split had."""
    window: SeenWindow
    look: int
    """Which look consumed it, from 0; what came in while it drained belongs to no look: -1."""


def looks(trail: Iterable[AuditEntry]) -> list[AuditEntry]:
    """Entries at which windows were consumed and judged."""
    return [e for e in trail if e.kind == "look"]


def timeline(spec: RolloutSpec, trail: Iterable[AuditEntry]) -> tuple[Move, ...]:
    """Every change of phase or step, and everything a person or an engine did, in order."""
    return tuple(_move(spec, e) for e in trail if e.kind == "transition")


def series(spec: RolloutSpec, trail: list[AuditEntry]) -> Series:
    """Weight, requests and e-values at every look."""
    looked = looks(trail)
    bodies = [e.body for e in looked]
    return Series(
        seconds=tuple(e.at - spec.created_at for e in looked),
        weight=tuple(float(b["weight"]) for b in bodies),
        requests={
            arm: tuple(int(b["counts"].get(arm, {}).get("n", 0)) for b in bodies)
            for arm in ("stable", "canary")
        },
        tests=tuple(
            TestSeries(
                metric=m.key,
                log_harm=tuple(_test(b, m.key, "log_harm") for b in bodies),
                log_noninferior=tuple(_test(b, m.key, "log_noninferior") for b in bodies),
            )
            for m in spec.metrics
        ),
    )


def windows(spec: RolloutSpec, trail: Iterable[AuditEntry]) -> Iterator[Seen]:
    """The windows in the order in which they were consumed.

    A tick between two looks is audited with what it saw but consumes nothing, so only looks and the last tick
    of a drain count; those of the watch after a promotion are another comparison, with the arms swapped.
    """
    weights: dict[int, float] = {}
    look, watching, watched = -1, False, False
    for entry in trail:
        look += entry.kind == "look"
        body, of_watch = entry.body, watching or watched
        if entry.kind == "transition":
            watching = body.get("to") == Phase.WATCHING.value
            watched = watched or watching
        if of_watch or "observation" not in body:
            continue
        seen = Observation.model_validate(body["observation"])
        if seen.split is not None:
            weights[seen.split.version] = seen.split.share_of(spec.id)
        drained = (
            entry.kind == "transition" and body.get("to") in _DRAINED and body.get("from") not in _DRAINED
        )
        if entry.kind == "look" or (drained and _was_draining(body)):
            for window in seen.windows:
                weight = weights.get(window.split_version)
                index = look if entry.kind == "look" else -1
                yield Seen(entry.at - spec.created_at, weight, window, index)


def totals(found: Iterable[Seen]) -> dict[str, ArmCounts]:
    """Counts by arm over all windows."""
    stable, canary, pairs = ArmCounts(), ArmCounts(), ArmCounts()
    for seen in found:
        stable, canary = stable.plus(seen.window.stable), canary.plus(seen.window.canary)
        pairs = pairs.plus(seen.window.pairs)
    return {"stable": stable, "canary": canary, PAIR: pairs}


def _was_draining(body: dict[str, Any]) -> bool:
    return body.get("from") in (Phase.PROMOTING.value, Phase.ROLLING_BACK.value)


def _test(body: dict[str, Any], metric: str, field: str) -> float:
    return next((float(m[field]) for m in body["metrics"] if m["metric"] == metric), 0.0)


def _move(spec: RolloutSpec, entry: AuditEntry) -> Move:
    body = entry.body
    return Move(
        at=entry.at,
        seconds=entry.at - spec.created_at,
        what=what(body),
        phase=Phase(body["to"]),
        weight=float(body.get("weight", 0.0)),
        reason=str(body.get("reason", "")),
        notes=tuple(body.get("notes", ())),
    )


def what(body: dict[str, Any]) -> str:
    """What a transition did, in words."""
    if body.get("event"):
        return str(body["event"]).replace("_", " ")
    moved = (body.get("from"), body.get("to"))
    return "note" if moved[0] == moved[1] else f"{moved[0]} → {moved[1]}".replace("_", " ")
