"""The audit trail: how a tick is written down, and how the written trail is replayed through decide().

Replay proves that every stored decision follows from what was stored as seen, bit for bit. Knows nothing
about the world outside the trail.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import orjson

from contracts.metrics import ArmCounts
from contracts.rollout import RolloutSpec, RolloutStatus
from serve.rollout import evidence
from serve.rollout.decide import decide, initial, step_evidence
from serve.rollout.metrics import decided
from serve.rollout.observation import Decision, Observation
from serve.state.rollouts import AuditEntry, StoredRollout


@dataclass(frozen=True)
class Replayed:
    """How replaying a trail went."""

    rollout_id: str
    ticks: int
    mismatches: tuple[str, ...]
    final: RolloutStatus

    @property
    def exact(self) -> bool:
        """True when every decision came out the same."""
        return not self.mismatches

    def sentence(self) -> str:
        """The result for people: the first mismatch, as all later ones may follow from it."""
        if self.exact:
            end = self.final.phase.value
            return f"{self.rollout_id}: all {self.ticks} stored decisions replay bit for bit, to {end}."
        first, n = self.mismatches[0], len(self.mismatches)
        return f"{self.rollout_id}: {n} of {self.ticks} decisions differ; the first: {first}"

    def as_json(self) -> dict[str, Any]:
        """The result for machines."""
        return {
            "rollout": self.rollout_id,
            "exact": self.exact,
            "ticks": self.ticks,
            "phase": self.final.phase.value,
            "mismatches": list(self.mismatches),
        }


def canonical(status: RolloutStatus) -> str:
    """A status as JSON with sorted keys: what is stored, and what its digest is taken of."""
    return orjson.dumps(status.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS).decode()


def digest(text: str) -> str:
    """Identity of a canonical status: equal digests mean equal to the last bit of every e-value."""
    return hashlib.sha256(text.encode()).hexdigest()


def audit_entries(
    spec: RolloutSpec, before: RolloutStatus, observation: Observation, decision: Decision, text: str
) -> list[AuditEntry]:
    """The lines of one stored tick: a 'look' when windows were consumed, a 'transition' when something moved.

    The first line carries the observation and the digest of the status it led to (`text`, canonical), for
    replay.
    """
    after = decision.status
    bodies: list[tuple[str, dict[str, Any]]] = []
    if decision.looked:
        bodies.append(("look", _evidence_body(spec, after)))
    if decided(before, after) or after.phase is not before.phase or decision.notes or not decision.looked:
        bodies.append(("transition", _transition_body(before, decision)))
    bodies[0][1]["observation"] = observation.model_dump(mode="json", exclude_defaults=True)
    bodies[0][1]["status_digest"] = digest(text)
    at = observation.now
    return [
        AuditEntry(rollout_id=spec.id, tick=after.ticks, at=at, kind=kind, body=body) for kind, body in bodies
    ]


def replay(stored: StoredRollout, trail: list[AuditEntry]) -> Replayed:
    """Feed every stored observation to decide() again, from the initial status on.

    A trail that ends elsewhere than the stored status, or lacks a tick, does not replay either; lines that
    were written after the status was read are left out.
    """
    status, mismatches, ticks = initial(stored.spec), [], 0
    for entry in trail:
        if "observation" not in entry.body or entry.tick > stored.status.ticks:
            continue
        ticks += 1
        status = decide(stored.spec, status, Observation.model_validate(entry.body["observation"])).status
        if digest(canonical(status)) != entry.body["status_digest"] or status.ticks != entry.tick:
            mismatches.append(f"tick {entry.tick}: replay says {status.phase.value} ({status.reason})")
    if not mismatches and canonical(status) != canonical(stored.status):
        mismatches.append(f"the trail ends at tick {status.ticks}, the rollout is at {stored.status.ticks}")
    return Replayed(stored.spec.id, ticks, tuple(mismatches), status)


def _evidence_body(spec: RolloutSpec, after: RolloutStatus) -> dict[str, Any]:
    family = evidence.combine(spec, after.metrics)
    return {
        "phase": after.phase.value,
        "step": after.step,
        "weight": after.weight,
        "reason": after.reason,
        "counts": {arm: _brief(c) for arm, c in after.total_counts.items()},
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
        "sample_ratio": {"log_e": after.log_srm, "verdict": after.srm.value},
        **_watch_body(after),
        "thresholds": {
            "log_harm_each": family.log_harm_each_at,
            "log_harm_mean": family.log_harm_mean_at,
            "log_promote": family.log_promote_at,
            "log_srm": math.log(1.0 / spec.alpha_srm),
            "log_alarm": math.log(spec.watch_arl),
            "step_evidence": step_evidence(spec, after.step),
        },
    }


def _watch_body(after: RolloutStatus) -> dict[str, Any]:
    if after.watch is None:
        return {}
    counts = {arm: _brief(c) for arm, c in after.watch.counts.items()}
    return {"watch": {"counts": counts, "log_alarm": after.watch.log_alarm, "worst": after.watch.worst}}


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


def _brief(counts: ArmCounts) -> dict[str, int]:
    return {"n": counts.n, "errors": counts.errors}
