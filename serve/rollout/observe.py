"""Observing: what the store, the engine and the hooks say of each rollout, read in a few queries a tick.

A tick reads versions first and bodies only where they changed, and touches only rollouts that are due. Knows
nothing about what a decision does with an observation.
"""

from __future__ import annotations

from collections.abc import Callable

from contracts.errors import EngineError
from contracts.rollout import Phase, RolloutSpec, RolloutStatus
from contracts.traffic import Split, Upstream
from serve.rollout.confirmer import Confirmer
from serve.rollout.deployer import Deployer
from serve.rollout.draft import superseded
from serve.rollout.observation import Asked, Observation
from serve.rollout.queries import CURSOR, QueryReader, nobody_to_ask
from serve.rollout.rules.confirming import may_start
from serve.rollout.rules.looking import kill_switch
from serve.rollout.rules.with_traffic import WITH_TRAFFIC
from serve.rollout.tail import LedgerTail, Unread
from serve.state.rollouts import Command, RolloutState, StoredRollout
from serve.state.traffic import RouterReport, TrafficState

_DRAINING = (Phase.PROMOTING, Phase.ROLLING_BACK)


class Observer:
    """One process's view of all active rollouts, kept between ticks.

    Args:
        router_max_age_s: a router replica that has not reported for this long is not waited for.
    """

    def __init__(
        self,
        rollouts: RolloutState,
        traffic: TrafficState,
        deployer: Deployer,
        confirmer: Confirmer,
        clock: Callable[[], float],
        router_max_age_s: float,
        queries: QueryReader | None = None,
    ) -> None:
        self._rollouts, self._traffic, self._deployer = rollouts, traffic, deployer
        self._confirmer, self._clock, self._router_max_age_s = confirmer, clock, router_max_age_s
        self._queries = queries
        self._tail = LedgerTail(traffic)
        self._stored: dict[str, StoredRollout] = {}
        self._splits: dict[str, Split] = {}
        self._commands: dict[str, list[Command]] = {}
        self._routers: list[RouterReport] | None = None

    def reset(self) -> None:
        """Forget what another process may have changed."""
        self._tail.reset()
        self._stored, self._splits = {}, {}

    def begin(self) -> list[StoredRollout]:
        """Read what changed since the last tick; returns the rollouts that are due, oldest first."""
        versions = self._rollouts.active_versions()
        stale = [
            i for i, v in versions.items() if i not in self._stored or self._stored[i].status_version != v
        ]
        for rollout_id in stale:
            self._tail.forget(rollout_id)
        fresh = {one.spec.id: one for one in self._rollouts.get_many(stale)}
        self._stored = {
            i: fresh.get(i) or self._stored[i] for i in versions if i in fresh or i in self._stored
        }
        self._read_splits()
        self._commands = self._rollouts.all_pending_commands()
        self._tail.follow(self._stored.keys())
        self._routers = None
        now = self._clock()
        return [stored for stored in self._stored.values() if self._due(stored, now)]

    def saved(self, stored: StoredRollout, looked: bool, split: Split | None) -> None:
        """This tick was stored: remember it, so that the next one need not be read."""
        self._stored[stored.spec.id] = stored
        if looked:
            self._tail.consumed(stored.spec.id)
        if split is not None:
            self._splits[split.route] = split

    def lost(self, rollout_id: str) -> None:
        """Its tick was not stored: read everything about it again."""
        found = self._stored.pop(rollout_id, None)
        self._tail.forget(rollout_id)
        if found is not None:
            self._splits.pop(found.spec.route, None)

    def observe(self, stored: StoredRollout) -> Observation:
        """Everything decide() needs; asks the engine only what the phase needs."""
        spec, status = stored.spec, stored.status
        seen = Observation(
            now=self._clock(), split=self._splits.get(spec.route), commands=self._asked(spec.id)
        )
        backing_off = status.engine_errors > 0 and seen.now < status.retry_at
        try:
            if status.phase is Phase.PENDING:
                seen = self._with_answers(stored, seen)
                return seen if backing_off else self._pending(stored, seen)
            if status.phase is Phase.WARMING:
                seen = self._with_answers(stored, seen)
                return seen if backing_off else self._warming(stored, seen)
            seen = self._with_ledger(stored, seen)
            if status.phase in _DRAINING:
                return seen if backing_off else self._draining(stored, seen)
            seen = self._with_queries(stored, seen)
            return seen if status.phase is Phase.PAUSED else self._with_answers(stored, seen)
        except EngineError as err:
            return seen.model_copy(update={"engine_error": str(err)})

    # what is due --------------------------------------------------------------------------------

    def _due(self, stored: StoredRollout, now: float) -> bool:
        """False only when decide() would change nothing: a rollout that is not due is not touched."""
        spec, status = stored.spec, stored.status
        if spec.id in self._commands or status.phase not in (*WITH_TRAFFIC, Phase.WATCHING):
            return True
        split = self._splits.get(spec.route)
        if now >= status.next_look_at or split is None or not split.collects(spec.id):
            return True
        if superseded(spec, status, split) is not None:
            return True
        if status.confirm is not None and now >= status.confirm.retry_at:
            return True
        if status.watch is not None and (not status.champion or now >= status.watch.until):
            return now >= status.retry_at
        return _kill_due(spec, status, self._tail.of(spec, status))

    # parts of an observation --------------------------------------------------------------------

    def _read_splits(self) -> None:
        versions = self._traffic.split_versions()
        kept = {r: s for r, s in self._splits.items() if versions.get(r) == s.version}
        wanted = {one.spec.route for one in self._stored.values()} & versions.keys()
        self._splits = kept | self._traffic.get_splits(sorted(wanted - kept.keys()))

    def _asked(self, rollout_id: str) -> tuple[Asked, ...]:
        found = self._commands.get(rollout_id, [])
        return tuple(Asked(id=c.id, verb=c.verb, by=c.by, reason=c.reason) for c in found)

    def _with_answers(self, stored: StoredRollout, seen: Observation) -> Observation:
        if stored.status.paused:
            return seen
        answers = self._confirmer.answers(stored.spec, stored.status, seen.now)
        return seen.model_copy(update={"answers": answers}) if answers else seen

    def _pending(self, stored: StoredRollout, seen: Observation) -> Observation:
        spec = stored.spec
        if not may_start(spec, stored.status):
            return seen
        return seen.model_copy(update={"ready": self._runs(spec)})

    def _runs(self, spec: RolloutSpec) -> bool:
        """Whether its student is up; one that is not here, and is ours to deploy, is on its way then."""
        if spec.candidate.app is not None and spec.artifact_uri is not None:
            self._deployer.deploy(spec.candidate, spec.artifact_uri)
        return self._deployer.ready(spec.candidate)

    def _warming(self, stored: StoredRollout, seen: Observation) -> Observation:
        if stored.status.paused or (seen.now < stored.status.next_look_at and not seen.answers):
            return seen
        if not self._runs(stored.spec):  # lost with its node or cluster: it is waited for
            return seen
        self._deployer.probe(stored.spec.candidate)
        # Probing takes a while; the first step begins now, not when the tick began.
        return seen.model_copy(update={"warmed": True, "now": self._clock()})

    def _with_ledger(self, stored: StoredRollout, seen: Observation) -> Observation:
        unread = self._tail.of(stored.spec, stored.status)
        cursor = {replica: seq for replica, seq in unread.cursor.items() if replica != CURSOR}
        return seen.model_copy(update={"windows": unread.ordered(), "cursor": cursor})

    def _with_queries(self, stored: StoredRollout, seen: Observation) -> Observation:
        """What Prometheus says, asked only when this tick is a look."""
        spec, status, split = stored.spec, stored.status, seen.split
        due = status.phase in WITH_TRAFFIC and seen.now >= status.next_look_at
        if not due or split is None or not split.collects(spec.id):
            return seen
        if self._queries is None:
            return seen.model_copy(update={"queries": nobody_to_ask(spec)})
        readings, cursor = self._queries.read(spec, status, split, seen.now)
        return seen.model_copy(update={"queries": readings, "cursor": {**seen.cursor, **cursor}})

    def _draining(self, stored: StoredRollout, seen: Observation) -> Observation:
        loser, route = loser_of(stored), stored.spec.route
        version = 0 if seen.split is None else seen.split.version
        if self._routers is None:
            self._routers = self._traffic.routers(self._router_max_age_s)
        acknowledged = all(r.versions.get(route, 0) >= version for r in self._routers)
        in_flight = 0
        if loser is not None:
            in_flight = sum(r.in_flight.get(loser.name, 0) for r in self._routers)
            in_flight += self._deployer.in_flight(loser) if self.deployed_by_us(loser, stored) else 0
        return seen.model_copy(update={"acknowledged": acknowledged, "in_flight": in_flight})

    def deployed_by_us(self, upstream: Upstream, stored: StoredRollout) -> bool:
        """True for a Serve application that some rollout deployed; declared upstreams are somebody else's."""
        if upstream.app is None:
            return False
        if upstream == stored.spec.candidate:
            return stored.spec.artifact_uri is not None
        specs = (r.spec for r in self._rollouts.history())
        return any(s.candidate.app == upstream.app and s.artifact_uri is not None for s in specs)


def loser_of(stored: StoredRollout) -> Upstream | None:
    """Whose last requests a drain waits for."""
    return stored.status.stable if stored.status.decision == "promoted" else stored.spec.candidate


def _kill_due(spec: RolloutSpec, status: RolloutStatus, unread: Unread) -> bool:
    """The kill switch is judged at every tick, so what would trip it makes a rollout due."""
    n = errors = 0
    for window in unread.windows.values():
        arm = window.stable if status.watch is not None else window.canary
        n, errors = n + arm.n, errors + arm.errors
    if errors == 0:
        return False
    step = None if status.watch is not None else status.step_counts.get("canary")
    before = (0, 0) if step is None else (step.n, step.errors)
    return kill_switch(spec, (n, errors), before) is not None
