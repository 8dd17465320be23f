"""The audit trail: how a tick is written down, and how the written trail is replayed through decide().

Replay proves that every stored decision follows from what was stored as seen, bit for bit. Knows nothing
about the world outside the trail.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from contracts.config import canonical_json
from contracts.rollout import RolloutSpec, RolloutStatus
from serve.rollout import evidence
from serve.rollout.decide import decide, initial, step_evidence
from serve.rollout.metrics import decided
from serve.rollout.observation import Decision, Observation
from serve.state.rollouts import AuditEntry


@dataclass(frozen=True)
class Replayed:
    """How replaying a trail went."""

    ticks: int
    mismatches: tuple[str, ...]
    final: RolloutStatus

    @property
    def exact(self) -> bool:
        """True when every decision came out the same."""
        return not self.mismatches


def digest(status: RolloutStatus) -> str:
    """Identity of a status: equal digests mean equal to the last bit of every e-value."""
    return hashlib.sha256(canonical_json(status.model_dump(mode="json")).encode()).hexdigest()


def audit_entries(
    spec: RolloutSpec, before: RolloutStatus, observation: Observation, decision: Decision
) -> list[AuditEntry]:
    """The lines of one stored tick: a 'look' when windows were consumed, a 'transition' when something moved.

    The first line carries the observation and the digest of the status it led to, for replay.
    """
    after = decision.status
    bodies: list[tuple[str, dict[str, Any]]] = []
    if decision.looked:
        bodies.append(("look", _evidence_body(spec, after)))
    if decided(before, after) or after.phase is not before.phase or decision.notes or not decision.looked:
        bodies.append(("transition", _transition_body(before, decision)))
    bodies[0][1]["observation"] = observation.model_dump(mode="json", exclude_defaults=True)
    bodies[0][1]["status_digest"] = digest(after)
    at = observation.now
    return [
        AuditEntry(rollout_id=spec.id, tick=after.ticks, at=at, kind=kind, body=body) for kind, body in bodies
    ]


def replay(spec: RolloutSpec, trail: list[AuditEntry]) -> Replayed:
    """Feed every stored observation to decide() again, from the initial status on."""
    status, mismatches, ticks = initial(spec), [], 0
    for entry in trail:
        if "observation" not in entry.body:
            continue
        ticks += 1
        status = decide(spec, status, Observation.model_validate(entry.body["observation"])).status
        if digest(status) != entry.body["status_digest"] or status.ticks != entry.tick:
            mismatches.append(f"tick {entry.tick}: replay says {status.phase.value} ({status.reason})")
    return Replayed(ticks=ticks, mismatches=tuple(mismatches), final=status)


def _evidence_body(spec: RolloutSpec, after: RolloutStatus) -> dict[str, Any]:
    family = evidence.combine(spec, after.metrics)
    return {
        "phase": after.phase.value,
        "step": after.step,
        "weight": after.weight,
        "reason": after.reason,
        "counts": {arm: _brief(c.model_dump()) for arm, c in after.total_counts.items()},
        "metrics": [
            {
                "metric": m.name,
                "log_harm": m.log_harm,
                "log_noninferior": m.log_noninferior,
                "verdict": m.verdict.value,
            }
            for m in after.metrics
        ],
        "log_mean_harm": family.log_mean_harm,
        "thresholds": {
            "log_harm_each": family.log_harm_each_at,
            "log_harm_mean": family.log_harm_mean_at,
            "log_promote": family.log_promote_at,
            "step_evidence": step_evidence(spec, after.step),
        },
    }


def _transition_body(before: RolloutStatus, decision: Decision) -> dict[str, Any]:
    after = decision.status
    return {
        "from": before.phase.value,
        "to": after.phase.value,
        "step": after.step,
        "weight": after.weight,
        "decision": after.decision,
        "event": decided(before, after),
        "reason": after.reason,
        "notes": list(decision.notes),
        "split_version": None if decision.split is None else decision.split.version,
    }


def _brief(counts: dict[str, Any]) -> dict[str, int]:
    return {k: v for k, v in counts.items() if isinstance(v, int)}
