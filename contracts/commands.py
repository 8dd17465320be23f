"""What a person may ask of a rollout: the verbs, the phases they fit, and what each of them will do.

Read by the CLI, the admin API and the console; obeyed by serve.rollout. Knows nothing about who asks or how
a command is stored.
"""

from __future__ import annotations

from contracts.config import Record
from contracts.errors import ConfigError, ConflictError
from contracts.rollout import Phase, RolloutStatus


class Verb(Record):
    """One command."""

    phases: tuple[Phase, ...]
    """Where it can be asked for."""
    effect: str
    """What will happen, as a sentence for the person who is about to ask."""
    danger: bool = False
    """It overrules the tests or ends the rollout; whoever shows it asks twice, and for a reason."""


_TRAFFIC = (Phase.RAMPING, Phase.HELD, Phase.PAUSED)

VERBS: dict[str, Verb] = {
    "pause": Verb(
        phases=(Phase.PENDING, Phase.WARMING, Phase.RAMPING, Phase.HELD),
        effect="The canary keeps its weight and no step is left until somebody resumes. "
        "Harm is still judged and still rolls back.",
    ),
    "resume": Verb(
        phases=(Phase.PENDING, Phase.WARMING, Phase.PAUSED),
        effect="The rollout goes on from the step it is in.",
    ),
    "approve": Verb(
        phases=_TRAFFIC,
        effect="What waits for a person goes on: the gate of this step is open. "
        "Evidence is still needed, and harm still rolls back.",
    ),
    "promote": Verb(
        phases=(*_TRAFFIC, Phase.WATCHING),
        effect="The canary gets all traffic at the next tick, before its tests are done, or before its "
        "watch is over; the old stable drains. Only harm shown in that very look still stops it.",
        danger=True,
    ),
    "abort": Verb(
        phases=(Phase.PENDING, Phase.WARMING, *_TRAFFIC, Phase.WATCHING),
        effect="The canary's weight goes to zero, it drains and is removed; the route is as before. "
        "The model is not quarantined.",
        danger=True,
    ),
}


def allowed(status: RolloutStatus) -> list[str]:
    """The verbs that fit a rollout as it is now."""
    return [verb for verb in VERBS if _fits(verb, status)]


def check_verb(verb: str, status: RolloutStatus) -> None:
    """Raises: ConfigError for a verb that does not exist, ConflictError for one that does not fit now."""
    if verb not in VERBS:
        raise ConfigError(f"verb: there is no such command; there are {', '.join(VERBS)}.")
    if _fits(verb, status):
        return
    phases = (Phase.PAUSED,) if verb == "resume" else VERBS[verb].phases
    now = "paused already" if verb == "pause" and status.paused else status.phase.value
    fits = ", ".join(p.value for p in phases)
    raise ConflictError(f"{verb} is not possible: the rollout is {now}; it must be {fits}.")


def _fits(verb: str, status: RolloutStatus) -> bool:
    if verb in ("pause", "resume") and status.paused != (verb == "resume"):
        return False
    return status.phase in VERBS[verb].phases
