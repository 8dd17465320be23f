"""The control loop: observe what is due, decide, act, remember. The only module that does things.

Kill-safe by construction: what it knows is in the state store; what it does is derived from the stored phase
and is idempotent, so doing it again after a kill is harmless. Status, audit, split, quarantine, consumed
commands and messages to webhooks of a tick are one transaction; a second controller is kept out by the lease,
and by the status version if the lease was lost in mid-tick. Does not know Ray (see Deployer), MLflow (see the
hooks) or statistics.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from contracts.errors import ConflictError, StillhouseError
from contracts.rollout import RolloutSpec
from contracts.traffic import Upstream
from serve.rollout import evidence
from serve.rollout.confirmer import Confirmer
from serve.rollout.courier import Courier
from serve.rollout.decide import decide
from serve.rollout.deployer import Deployer
from serve.rollout.metrics import ControllerMetrics
from serve.rollout.notices import notices
from serve.rollout.observation import Action, Decision, Observation
from serve.rollout.observe import Observer, loser_of
from serve.rollout.queries import QueryReader
from serve.rollout.replay import audit_entries, canonical
from serve.rollout.sweep import LedgerSweep
from serve.state.rollouts import CONTROLLER_LEASE, RolloutState, StoredRollout, Tick
from serve.state.traffic import TrafficState

log = logging.getLogger(__name__)

Hook = Callable[[RolloutSpec], None]
_Decided = tuple[Tick, Observation, Decision]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Of a thousand rollouts a tick makes a hundred thousand objects without a cycle; walking them all again
    and again would be a sixth of it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Controller:
    """One controller process's view of all rollouts.

    Args:
        engine: the state store (`serve.state.tables.open_state`).
        deployer: whoever runs engines.
        on_promoted, on_rolled_back, on_restored: called before the status that says so is stored, and again
            after a kill in between, so they must be idempotent; e.g. move the registry's `champion` alias.
            What they raise is retried within the error budget.
        tick_s: seconds between ticks.
        lease_ttl_s: after a crash another controller takes over when this has passed; keep it above the
            longest deployer call.
        router_max_age_s: a router replica that has not reported for this long is not waited for.
        clock: wall clock in Unix seconds.
        confirmer, courier: who asks and who tells webhooks; None makes the real ones.
        queries: who asks the external Prometheus; None: metrics of kind `query` have no data.
    """

    def __init__(
        self,
        engine: Engine,
        deployer: Deployer,
        *,
        on_promoted: Hook | None = None,
        on_rolled_back: Hook | None = None,
        on_restored: Hook | None = None,
        tick_s: float = 0.5,
        lease_ttl_s: float = 15.0,
        router_max_age_s: float = 10.0,
        holder: str | None = None,
        metrics: ControllerMetrics | None = None,
        clock: Callable[[], float] = time.time,
        confirmer: Confirmer | None = None,
        courier: Courier | None = None,
        queries: QueryReader | None = None,
    ) -> None:
        self._rollouts, self._traffic = RolloutState(engine), TrafficState(engine)
        self._deployer = deployer
        self._hooks = {
            Action.NOTIFY_PROMOTED: on_promoted,
            Action.NOTIFY_ROLLED_BACK: on_rolled_back,
            Action.NOTIFY_RESTORED: on_restored,
        }
        self._tick_s, self._lease_ttl_s = tick_s, lease_ttl_s
        self.holder = holder or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._metrics = metrics
        self._leads_until, self._lapsed = 0.0, True
        self._confirmer = confirmer or Confirmer()
        self._courier = courier or Courier(engine, leading=self.leading)
        self._observer = Observer(
            self._rollouts, self._traffic, deployer, self._confirmer, clock, router_max_age_s, queries
        )
        self._sweep = LedgerSweep(self._rollouts, self._traffic, clock)

    def run_forever(self, stop: threading.Event) -> None:
        """Tick until `stop` is set, then hand the lease back. Webhooks are told from a thread beside it."""
        telling = threading.Thread(
            target=self._courier.run_forever, args=(stop,), name="courier", daemon=True
        )
        telling.start()
        while not stop.is_set():
            started = time.monotonic()
            try:
                self.tick()
            except (StillhouseError, SQLAlchemyError) as err:  # a store that is away comes back
                log.warning("tick skipped, the state store did not answer: %s", err)
                self._observer.reset()
            stop.wait(max(0.01, self._tick_s - (time.monotonic() - started)))
        self._leads_until, self._lapsed = 0.0, True
        telling.join(10)
        self._confirmer.close()
        self._rollouts.release_lease(CONTROLLER_LEASE, self.holder)

    def leading(self) -> bool:
        """True while this process may act: it holds the lease and has not sat on it for too long."""
        return time.monotonic() < self._leads_until

    def tick(self) -> bool:
        """One pass over all active rollouts that are due; False when another controller holds the lease."""
        started = time.monotonic()
        leading = self._lead()
        if self._metrics is not None:
            self._metrics.leader.set(1.0 if leading else 0.0)
        if not leading:
            return False
        with _no_garbage_collection():
            finished = self._pass()
        if finished and self._metrics is not None:
            self._metrics.tick_seconds.observe(time.monotonic() - started)
        return finished

    def _pass(self) -> bool:
        """Step every rollout that is due and store what was decided; False when the lease went meanwhile."""
        waiting: list[_Decided] = []
        for stored in self._observer.begin():
            if not self.leading() and not self._renew():
                log.info("another controller took over in mid-tick")
                return False
            try:
                self._step(stored, waiting)
            except ConflictError as err:
                self._lost(stored, err)
            except Exception:
                # One rollout's trouble must not stop the others from being judged and rolled back.
                log.exception("rollout %s: tick failed, trying again", stored.spec.id)
                self._observer.lost(stored.spec.id)
        self._save_all(waiting)
        self._sweep.sweep()
        return True

    def _lead(self) -> bool:
        """Take or renew the lease between ticks; what another one may have changed is read again."""
        held = self.leading() and not self._lapsed
        if not self._renew():
            return False
        if not held:
            self._observer.reset()
            self._lapsed = False
        return True

    def _renew(self) -> bool:
        """Take or renew the lease. In mid-tick the view stays as it is: the status versions guard it."""
        self._lapsed = self._lapsed or not self.leading()
        asked_at = time.monotonic()
        if not self._rollouts.acquire_lease(CONTROLLER_LEASE, self.holder, self._lease_ttl_s):
            self._leads_until = 0.0
            return False
        # Counted from before it was asked for, and shorter than the store says: this clock gives up first.
        self._leads_until = asked_at + 0.8 * self._lease_ttl_s
        return True

    def _step(self, stored: StoredRollout, waiting: list[_Decided]) -> None:
        """Observe, decide and act once; ticks without an action are stored together at the end."""
        spec, before = stored.spec, stored.status
        seen = self._observer.observe(stored)
        decision = decide(spec, before, seen)
        if decision.actions:
            failure = self._act(stored, decision.actions)
            if failure is not None:
                seen = seen.model_copy(update={"engine_error": failure})
                decision = decide(spec, before, seen)
        if decision.status.ticks == before.ticks:
            return
        made = (_tick_of(stored, seen, decision), seen, decision)
        if decision.actions or decision.split is not None:
            self._rollouts.save_tick(made[0])
            self._stored(made)
        else:
            waiting.append(made)

    def _save_all(self, waiting: list[_Decided]) -> None:
        lost = self._rollouts.save_ticks([tick for tick, _, _ in waiting]) if waiting else {}
        for made in waiting:
            conflict = lost.get(made[0].before.spec.id)
            if conflict is None:
                self._stored(made)
            else:
                self._lost(made[0].before, conflict)

    def _lost(self, stored: StoredRollout, err: ConflictError) -> None:
        log.info("rollout %s: %s Looking again at the next tick.", stored.spec.id, err)
        self._observer.lost(stored.spec.id)

    def _stored(self, made: _Decided) -> None:
        tick, _, decision = made
        self._observer.saved(tick.after(), decision.looked, decision.split)
        self._tell(tick.before, decision)

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
        loser = loser_of(stored)
        if (
            loser is not None
            and self._observer.deployed_by_us(loser, stored)
            and not self._used_elsewhere(loser, stored)
        ):
            self._deployer.retire(loser)

    def _used_elsewhere(self, upstream: Upstream, stored: StoredRollout) -> bool:
        """True when a split, or another active rollout, still needs the application."""
        named = (up for split in self._traffic.splits().values() for up in split.upstreams)
        in_split = any(up.app == upstream.app for up in named)
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
            self._metrics.thresholds(spec.place, family.log_harm_each_at, family.log_promote_at)


def _tick_of(stored: StoredRollout, seen: Observation, decision: Decision) -> Tick:
    """Everything the tick writes."""
    spec, before, after = stored.spec, stored.status, decision.status
    text = canonical(after)
    return Tick(
        before=stored,
        status=after,
        entries=audit_entries(spec, before, seen, decision, text),
        split=decision.split,
        done_commands=decision.done_commands,
        quarantined=decision.quarantine,
        notices=notices(spec, before, after, seen.now, decision.notes),
        status_json=text,
    )
