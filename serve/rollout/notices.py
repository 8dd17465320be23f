"""What webhooks are told: the event of a tick and its message, made before the tick is stored.

Pure. Knows nothing about HTTP or about how a message is delivered.
"""

from __future__ import annotations

import json
from typing import Any

from contracts.hooks import HookPoint
from contracts.rollout import Phase, RolloutSpec, RolloutStatus
from serve.state.outbox import Notice


def event_of(before: RolloutStatus, after: RolloutStatus) -> str | None:
    """The event of a tick (one of `contracts.hooks.EVENTS`), or None when nothing moved."""
    if before.phase is Phase.WATCHING and after.phase is Phase.ROLLING_BACK:
        return "restored"
    if after.phase is Phase.RAMPING and (after.step, after.max_weight) != (before.step, before.max_weight):
        return "step"
    if after.phase is before.phase:
        return None
    if before.phase is Phase.PAUSED and after.phase in (Phase.RAMPING, Phase.HELD):
        return "resumed"
    return after.phase.value


def notices(
    spec: RolloutSpec, before: RolloutStatus, after: RolloutStatus, at: float, notes: tuple[str, ...] = ()
) -> list[Notice]:
    """One message for every hook that wants to hear of what this tick did."""
    event = event_of(before, after)
    return [] if event is None else _notices(spec, after, event, at, {"from": before.phase, "notes": notes})


def started(spec: RolloutSpec, status: RolloutStatus) -> list[Notice]:
    """The messages that go with a rollout's creation."""
    return _notices(spec, status, "started", spec.created_at, {"by": spec.created_by})


def question(spec: RolloutSpec, status: RolloutStatus, point: HookPoint, key: str) -> str:
    """The body of a confirming hook's request: the move it is asked about, and where the rollout stands."""
    return _json({"question": point, "move": key, **_facts(spec, status)})


def _notices(
    spec: RolloutSpec, after: RolloutStatus, event: str, at: float, more: dict[str, Any]
) -> list[Notice]:
    found = []
    for index, hook in enumerate(spec.hooks):
        if event not in hook.on and "*" not in hook.on:
            continue
        event_id = f"{spec.id}.{after.ticks}.{index}"
        body = {"id": event_id, "event": event, "at": at, **_facts(spec, after), **more}
        found.append(
            Notice(
                event_id=event_id,
                rollout_id=spec.id,
                hook_index=index,
                hook=hook,
                event=event,
                body=_json(body),
                at=at,
            )
        )
    return found


def _facts(spec: RolloutSpec, status: RolloutStatus) -> dict[str, Any]:
    return {
        "rollout": spec.id,
        "route": spec.route,
        "model": spec.model_ref,
        "phase": status.phase,
        "step": status.step + 1,
        "steps": len(spec.steps),
        "weight": status.weight,
        "decision": status.decision,
        "reason": status.reason,
    }


def _json(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
