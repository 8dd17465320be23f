"""The control loop: observe every active rollout, decide, act, remember. The only module that does things.

Kill-safe by construction: what it knows is in the state store; what it does is derived from the stored phase
and is idempotent, so doing it again after a kill is harmless. Status, audit, split, quarantine and consumed
commands of a tick are one transaction; a second controller is kept out by the lease, and by the status
version if the lease was lost in mid-tick. Does not know Ray (see Deployer), MLflow (see the hooks) or
statistics.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from contracts.errors import ConflictError, EngineError, StillhouseError
from contracts.rollout import Phase, RolloutSpec
from contracts.traffic import Upstream
from serve.rollout import evidence
from serve.rollout.decide import decide
from serve.rollout.deployer import Deployer
from serve.rollout.metrics import ControllerMetrics
from serve.rollout.observation import Action, Asked, Decision, Observation, SeenWindow
from serve.rollout.replay import audit_entries
from serve.state.rollouts import CONTROLLER_LEASE, RolloutState, StoredRollout
from serve.state.traffic import TrafficState

log = logging.getLogger(__name__)

Hook = Callable[[RolloutSpec], None]


class Controller:
    """One controller process's view of all rollouts.

    Args:
        engine: the state store (`serve.state.tables.open_state`).
        deployer: whoever runs engines.
        on_promoted, on_rolled_back: called before the terminal phase is stored, and again after a kill in
            between, so they must be idempotent; e.g. move the registry's `champion` alias. What they raise is
            retried within the error budget.
        tick_s: seconds between ticks.
        lease_ttl_s: after a crash another controller takes over when this has passed; keep it above the
            longest deployer call.
        router_max_age_s: a router replica that has not reported for this long is not waited for.
        clock: wall clock in Unix seconds.
    """

    def __init__(
        self,
        engine: Engine,
        deployer: Deployer,
        *,
        on_promoted: Hook | None = None,
        on_rolled_back: Hook | None = None,
        tick_s: float = 0.5,
        lease_ttl_s: float = 15.0,
        router_max_age_s: float = 10.0,
        holder: str | None = None,
        metrics: ControllerMetrics | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rollouts, self._traffic = RolloutState(engine), TrafficState(engine)
        self._deployer = deployer
        self._hooks = {Action.NOTIFY_PROMOTED: on_promoted, Action.NOTIFY_ROLLED_BACK: on_rolled_back}
        self._tick_s, self._lease_ttl_s, self._router_max_age_s = tick_s, lease_ttl_s, router_max_age_s
        self.holder = holder or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._metrics = metrics
        self._clock = clock

    def run_forever(self, stop: threading.Event) -> None:
        """Tick until `stop` is set, then hand the lease back."""
        while not stop.is_set():
            started = time.monotonic()
            try:
                self.tick()
            except (StillhouseError, SQLAlchemyError) as err:  # a store that is away comes back
                log.warning("tick skipped, the state store did not answer: %s", err)
            stop.wait(max(0.01, self._tick_s - (time.monotonic() - started)))
        self._rollouts.release_lease(CONTROLLER_LEASE, self.holder)

    def tick(self) -> bool:
        """One pass over all active rollouts; False when another controller holds the lease."""
        started = time.monotonic()
        leading = self._rollouts.acquire_lease(CONTROLLER_LEASE, self.holder, self._lease_ttl_s)
        if self._metrics is not None:
            self._metrics.leader.set(1.0 if leading else 0.0)
        if not leading:
            return False
        for stored in self._rollouts.active():
            try:
                self.advance(stored)
            except ConflictError as err:
                log.info("rollout %s: %s Looking again at the next tick.", stored.spec.id, err)
            except Exception:
                # One rollout's trouble must not stop the others from being judged and rolled back.
                log.exception("rollout %s: tick failed, trying again", stored.spec.id)
        if self._metrics is not None:
            self._metrics.tick_seconds.observe(time.monotonic() - started)
        return True

    def advance(self, stored: StoredRollout) -> StoredRollout:
        """Observe, decide, act and store one rollout once; returns it as it is stored then."""
        spec, before = stored.spec, stored.status
        seen = self._observe(stored)
        decision = decide(spec, before, seen)
        if decision.actions:
            failure = self._act(stored, decision.actions)
            if failure is not None:
                seen = seen.model_copy(update={"engine_error": failure})
                decision = decide(spec, before, seen)
        if decision.status.ticks == before.ticks:
            return stored
        after = self._rollouts.save_tick(
            stored,
            decision.status,
            audit_entries(spec, before, seen, decision),
            split=decision.split,
            done_commands=list(decision.done_commands),
            quarantined=decision.quarantine,
        )
        self._tell(stored, decision)
        return after

    # observing ----------------------------------------------------------------------------------

    def _observe(self, stored: StoredRollout) -> Observation:
        """Everything decide() needs; asks the engine only what the phase needs."""
        spec, status = stored.spec, stored.status
        pending = self._rollouts.pending_commands(spec.id)
        commands = tuple(Asked(id=c.id, verb=c.verb, by=c.by, reason=c.reason) for c in pending)
        seen = Observation(now=self._clock(), split=self._traffic.get_split(spec.route), commands=commands)
        if status.engine_errors > 0 and seen.now < status.next_look_at:
            return seen  # backing off
        try:
            if status.phase is Phase.PENDING:
                return self._observe_pending(spec, seen)
            if status.phase is Phase.WARMING:
                return self._observe_warming(stored, seen)
            seen = self._with_ledger(stored, seen)
            if status.phase in (Phase.PROMOTING, Phase.ROLLING_BACK):
                return self._observe_drain(stored, seen)
            return seen
        except EngineError as err:
            return seen.model_copy(update={"engine_error": str(err)})

    def _observe_pending(self, spec: RolloutSpec, seen: Observation) -> Observation:
        if spec.candidate.app is not None and spec.artifact_uri is not None:
            self._deployer.deploy(spec.candidate, spec.artifact_uri)
        return seen.model_copy(update={"ready": self._deployer.ready(spec.candidate)})

    def _observe_warming(self, stored: StoredRollout, seen: Observation) -> Observation:
        if stored.status.paused:
            return seen
        self._deployer.probe(stored.spec.candidate)
        # Probing takes a while; the first step begins now, not when the tick began.
        return seen.model_copy(update={"warmed": True, "now": self._clock()})

    def _with_ledger(self, stored: StoredRollout, seen: Observation) -> Observation:
        spec, cursor = stored.spec, dict(stored.status.cursor)
        windows: dict[int, SeenWindow] = {}
        for entry in self._traffic.read_ledger(spec.route, spec.id, cursor):
            version = entry.split_version
            window = windows.get(version) or SeenWindow(split_version=version)
            windows[version] = window.plus(entry.arm, entry.counts)
            cursor[entry.replica] = max(entry.seq, cursor.get(entry.replica, 0))
        ordered = tuple(windows[version] for version in sorted(windows))
        return seen.model_copy(update={"windows": ordered, "cursor": cursor})

    def _observe_drain(self, stored: StoredRollout, seen: Observation) -> Observation:
        loser = self._loser(stored)
        version = 0 if seen.split is None else seen.split.version
        routers = self._traffic.routers(self._router_max_age_s)
        acknowledged = all(r.versions.get(stored.spec.route, 0) >= version for r in routers)
        in_flight = 0
        if loser is not None:
            in_flight = sum(r.in_flight.get(loser.name, 0) for r in routers)
            in_flight += self._deployer.in_flight(loser) if self._ours(loser, stored) else 0
        return seen.model_copy(update={"acknowledged": acknowledged, "in_flight": in_flight})

    @staticmethod
    def _loser(stored: StoredRollout) -> Upstream | None:
        return stored.status.stable if stored.status.decision == "promoted" else stored.spec.candidate

    # acting -------------------------------------------------------------------------------------

    def _act(self, stored: StoredRollout, actions: tuple[Action, ...]) -> str | None:
        """Carry actions out in order; returns what failed. They run again at a later tick then."""
        for action in actions:
            try:
                if action in self._hooks:
                    hook = self._hooks[action]
                    if hook is not None:
                        hook(stored.spec)
                else:
                    self._retire(stored)
            except Exception as err:
                # Hooks are code from outside (a registry, a network): retried within the error budget.
                log.exception("rollout %s: %s failed", stored.spec.id, action.value)
                return f"{action.value}: {err}"
        return None

    def _retire(self, stored: StoredRollout) -> None:
        loser = self._loser(stored)
        if loser is not None and self._ours(loser, stored) and not self._used_elsewhere(loser, stored):
            self._deployer.retire(loser)

    def _ours(self, upstream: Upstream, stored: StoredRollout) -> bool:
        """True for a Serve application that some rollout deployed; declared upstreams are somebody else's."""
        if upstream.app is None:
            return False
        if upstream == stored.spec.candidate:
            return stored.spec.artifact_uri is not None
        specs = (r.spec for r in self._rollouts.history())
        return any(s.candidate.app == upstream.app and s.artifact_uri is not None for s in specs)

    def _used_elsewhere(self, upstream: Upstream, stored: StoredRollout) -> bool:
        """True when a split, or another active rollout, still needs the application."""
        named = (up for s in self._traffic.splits().values() for up in (s.stable, s.canary))
        in_split = any(up is not None and up.app == upstream.app for up in named)
        others = (r.spec for r in self._rollouts.active() if r.spec.id != stored.spec.id)
        return in_split or any(spec.candidate.app == upstream.app for spec in others)

    def _tell(self, stored: StoredRollout, decision: Decision) -> None:
        spec, before, after = stored.spec, stored.status, decision.status
        if after.phase is not before.phase or after.step != before.step:
            log.info("rollout %s of %s: %s: %s", spec.id, spec.route, after.phase.value, after.reason)
        for note in decision.notes:
            log.warning("rollout %s of %s: %s", spec.id, spec.route, note)
        if self._metrics is not None:
            self._metrics.observe(spec, before, decision)
            family = evidence.combine(spec, after.metrics)
            self._metrics.thresholds(spec.route, family.log_harm_each_at, family.log_promote_at)
