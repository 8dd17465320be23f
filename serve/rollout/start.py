"""Starting a rollout and asking things of a running one: what the CLI (and the demo) call.

Only writes requests into the state store; the controller does the rest. Knows nothing about terminals.
"""

from __future__ import annotations

import getpass
import time

from contracts.commands import check_verb
from contracts.errors import ConfigError, ConflictError, GateError, NotFoundError
from contracts.gates import Verdict
from contracts.model import ModelRecord
from contracts.rollout import Phase, RolloutSpec
from contracts.traffic import Split, Upstream
from registry.store import Registry, parse_ref
from serve.rollout.aliases import CHALLENGER
from serve.rollout.decide import initial
from serve.rollout.notices import started
from serve.rollout.policy import BUILT_IN, RolloutPolicy, make_spec
from serve.rollout.sources import Sources
from serve.state.rollouts import RolloutState, StoredRollout
from serve.state.traffic import TrafficState


def start_rollout(
    rollouts: RolloutState,
    traffic: TrafficState,
    registry: Registry,
    policy: RolloutPolicy,
    route: str,
    model: str,
    *,
    by: str | None = None,
    reason: str = "",
    force: bool = False,
    force_quarantined: bool = False,
    sources: Sources | None = None,
    on: str | None = None,
) -> RolloutSpec:
    """Check that the model may be tried on the route, and hand the rollout to the controller.

    Args:
        on: the declared upstream that serves the model already, e.g. a cascade in which it is the first; None
            deploys it as an application of its own.

    Raises:
        NotFoundError: the route or the model does not exist.
        ConfigError: a metric's grader or query can have no data on the route.
        GateError: the model's offline gates did not pass and nobody overrode them at its publication, or a
            judge that decides was not checked against people (`force` goes over that).
        ConflictError: the digest is quarantined or serves the route already, a rollout is active there, or
            one was thrown back a moment ago (`force` does not wait).
    """
    split = split_of(traffic, route)
    record = registry.get(model)
    check_model(rollouts, split, record, force_quarantined)
    check_route(rollouts, route, force)
    if sources is not None:
        policy, reason = sources.prepare(policy, split, reason, force)
    upstream = None if on is None else _declared(on, split, sources)
    record = record if upstream is not None else downloaded(registry, record)
    spec = make_spec(policy, route, record, upstream, by=who(by, reason))
    status = initial(spec)
    rollouts.create(spec, status, started(spec, status))
    registry.set_alias(
        record.name, CHALLENGER, record.version, f"rollout {spec.id}", reason or "rollout started"
    )
    return spec


def split_of(traffic: TrafficState, route: str) -> Split:
    """The split of a route. Raises NotFoundError listing those there are."""
    split = traffic.get_split(route)
    if split is None:
        known = ", ".join(sorted(traffic.splits())) or "none; start the stack with 'stillhouse up'"
        raise NotFoundError(f"no route {route!r}; there are: {known}.")
    return split


def check_model(rollouts: RolloutState, split: Split, record: ModelRecord, force_quarantined: bool) -> None:
    """Raises GateError or ConflictError unless this model may be tried on this route."""
    check_gates(record)
    if split.stable.digest == record.artifact.digest:
        raise ConflictError(f"{record.ref} is the stable upstream of route {split.route!r} already.")
    why = rollouts.quarantined(record.artifact.digest)
    if why is not None and not force_quarantined:
        raise ConflictError(
            f"{record.ref} is quarantined because it was thrown back before: {why}. "
            "Publish a better one, or say --force-quarantined to try the same one again."
        )


def _declared(name: str, split: Split, sources: Sources | None) -> Upstream:
    """The upstream that serves a candidate. Raises: NotFoundError; ConflictError when it is stable."""
    known = {} if sources is None else sources.upstreams
    if name not in known:
        raise NotFoundError(
            f"--on: there is no upstream {name!r}; there are: {', '.join(sorted(known)) or 'none'}."
        )
    if split.stable.name == name:
        raise ConflictError(f"--on: {name!r} is the stable upstream of route {split.route!r} already.")
    return known[name]


def check_route(rollouts: RolloutState, route: str, force: bool) -> None:
    """Raises ConflictError unless the route may take a new rollout now."""
    _check_free(rollouts, route)
    if not force:
        _check_cooldown(rollouts, route, time.time())


def downloaded(registry: Registry, record: ModelRecord) -> ModelRecord:
    """The record with its artifact as a folder of this host."""
    folder = registry.download(record.ref)
    return record.model_copy(update={"artifact": record.artifact.model_copy(update={"uri": str(folder)})})


def who(by: str | None, reason: str) -> str:
    """Who asks, and why, as it goes into the audit trail."""
    return (by or getpass.getuser()) + (f" ({reason})" if reason else "")


def _check_free(rollouts: RolloutState, route: str) -> None:
    """Raises ConflictError with the way out while a rollout is active on the route."""
    for stored in rollouts.active(route):
        status, what = stored.status, f"rollout {stored.spec.id} of {stored.spec.model_ref}"
        if status.phase is Phase.WATCHING and status.watch is not None:
            left = max(0.0, status.watch.until - time.time())
            raise ConflictError(
                f"route {route!r} is still watched for late harm of {what} (another {left:.0f} s). "
                "'stillhouse rollout promote' ends the watch now, 'stillhouse rollout abort' restores the "
                "former stable; then start again."
            )
        raise ConflictError(
            f"route {route!r} already has an active rollout: {what} is {status.phase.value}. "
            "'stillhouse rollout status' says why, 'stillhouse rollout abort' ends it."
        )


def _check_cooldown(rollouts: RolloutState, route: str, now: float) -> None:
    """Raises ConflictError with the remaining time when the route's last rollout was thrown back just now."""
    last = rollouts.latest(route)
    if last is None or last.status.phase is not Phase.ROLLED_BACK:
        return
    left = last.status.phase_since + last.spec.cooldown_s - now
    if left > 0:
        raise ConflictError(
            f"route {route!r} cools down for another {left:.0f} s: {last.spec.model_ref} was thrown back "
            f"({last.status.reason}). Wait, or say --force to start all the same."
        )


def check_gates(record: ModelRecord) -> None:
    """Raises GateError unless the offline gates passed, or a named person let the model through."""
    if record.evaluation is None:
        raise GateError(
            f"{record.ref} was never evaluated; run 'stillhouse distill' up to its evaluate stage."
        )
    gates = record.evaluation.gates
    if gates.verdict is Verdict.PASS or gates.overridden_by is not None:
        return
    failed = (
        "; ".join(r.reason for r in gates.results if r.verdict is not Verdict.PASS) or "no gates were set"
    )
    raise GateError(
        f"{record.ref} did not pass its offline gates ({gates.verdict.value}): {failed}. "
        "Publish it with a gate override if it shall see traffic all the same."
    )


def ask(
    rollouts: RolloutState,
    route: str,
    verb: str,
    *,
    by: str | None = None,
    reason: str = "",
    model: str | None = None,
) -> StoredRollout:
    """Ask the controller for one of contracts.commands.VERBS; returns the rollout it was asked of.

    Args:
        model: which student of an A/B/n test, as 'name:version'.

    Raises: ConflictError when the rollout's phase does not allow it or several are active, NotFoundError
    without an active one.
    """
    stored = active_rollout(rollouts, route, model)
    check_verb(verb, stored.status)
    rollouts.add_command(stored.spec.id, verb, by or getpass.getuser(), reason)
    return stored


def active_rollout(rollouts: RolloutState, route: str, model: str | None = None) -> StoredRollout:
    """The active rollout of a route or, in an A/B/n test, of one of its students.

    Raises: NotFoundError saying where the finished ones are, ConflictError when `model` must say which one.
    """
    found = rollouts.active(route)
    if not found:
        raise NotFoundError(
            f"route {route!r} has no active rollout; see 'stillhouse rollout history {route}' for past ones."
        )
    running = ", ".join(stored.spec.model_ref for stored in found)
    if model is None and len(found) > 1:
        raise ConflictError(f"route {route!r} tests several students; say --model with one of: {running}.")
    if model is not None:
        found = [stored for stored in found if stored.spec.model_ref == model]
        if not found:
            raise NotFoundError(f"route {route!r} has no active rollout of {model!r}; it has: {running}.")
    return found[0]


def pick_policy(policies: dict[str, RolloutPolicy], name: str | None) -> RolloutPolicy:
    """The named policy; without a name: 'default', or the only one there is, or the built-in one."""
    if name is not None:
        if name not in policies:
            raise ConfigError(
                f"no rollout policy {name!r}; the configuration has: {', '.join(policies) or 'none'}."
            )
        return policies[name]
    if "default" in policies:
        return policies["default"]
    if len(policies) == 1:
        return next(iter(policies.values()))
    if policies:
        raise ConfigError(
            f"several policies and none is called 'default'; say --policy {' | '.join(policies)}."
        )
    return BUILT_IN


def check_model_ref(model: str) -> None:
    """Raises ConfigError with the accepted forms when this cannot be a model reference."""
    parse_ref(model)
