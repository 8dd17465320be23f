"""The rules of a rollout, as one pure function: (spec, status, observation) → what to do and to remember.

No clock, no storage, no engine: the same three arguments give the same decision bit for bit, which is how a
killed controller resumes to the same decision and how replay checks the audit trail. Phases and what moves
between them (each phase's rules are a module of `rules`):

    pending → warming → ramping ⇄ held → watching → promoting → promoted
                           ⇅ paused      (watch_s > 0)
    any of these before promoting → rolling_back → rolled_back or aborted

What a failure does depends on the phase:

| failure                    | pending, warming  | ramping, held, paused  | watching          | draining     |
|----------------------------|-------------------|------------------------|-------------------|---------------|
| harm shown on a guardrail  | (no traffic)      | rolled back,           | restored,         | (decided)    |
|                            |                   | quarantined            | quarantined       |              |
| harm shown on an objective | (no traffic)      | held for a person      | nothing           | (decided)    |
| kill switch                | (no traffic)      | rolled back,           | restored,         | (decided)    |
|                            |                   | quarantined            | quarantined       |              |
| no canary data             | (no traffic)      | rolled back after its  | nothing: it is    | (decided)    |
|                            |                   | deadline; paused: no   | the stable arm    |              |
| sample-ratio mismatch      | (no traffic)      | held, rolled back or   | nothing           | (decided)    |
|                            |                   | ignored, by `srm`      |                   |              |
| engine or registry error   | retried, then     | (none is asked)        | retried, then     | retried, then|
|                            | aborted           |                        | noted; goes on    | noted; ends  |
| confirming hook: refused   | waits, asked      | held, asked again      | (none is asked)   | (none asked) |
|                            | again             |                        |                   |              |
| confirming hook: error     | retried, then     | retried, then paused   | (none is asked)   | (none asked) |
|                            | aborted; before   |                        |                   |              |
|                            | step 1: paused    |                        |                   |              |
| outside the schedule       | warming waits     | held; harm rolls back  | watches on        | drains       |
| split changed by another   | (not ours yet)    | aborted                | ends as it stands | nothing      |
"""

from __future__ import annotations

from contracts.rollout import Phase, RolloutSpec, RolloutStatus
from serve.rollout import evidence
from serve.rollout.draft import Draft
from serve.rollout.observation import Decision, Observation
from serve.rollout.rules.before_traffic import pending, warming
from serve.rollout.rules.draining import draining
from serve.rollout.rules.ladder import step_evidence
from serve.rollout.rules.watching import watching
from serve.rollout.rules.with_traffic import with_traffic

__all__ = ["decide", "initial", "step_evidence"]

_RULES = {
    Phase.PENDING: pending,
    Phase.WARMING: warming,
    Phase.RAMPING: with_traffic,
    Phase.HELD: with_traffic,
    Phase.PAUSED: with_traffic,
    Phase.WATCHING: watching,
    Phase.PROMOTING: draining,
    Phase.ROLLING_BACK: draining,
}


def initial(spec: RolloutSpec) -> RolloutStatus:
    """The status a rollout is created with."""
    return RolloutStatus(
        id=spec.id,
        reason=f"asked for by {spec.created_by}",
        phase_since=spec.created_at,
        metrics=evidence.fresh(spec),
    )


def decide(spec: RolloutSpec, status: RolloutStatus, observation: Observation) -> Decision:
    """Apply the rules of the status's phase to what was observed; a terminal one never moves again."""
    draft = Draft(spec, status, observation)
    rules = _RULES.get(status.phase)
    if rules is not None:
        rules(draft)
    return draft.decision()
