"""Shadow requests: a sample of the answered ones is asked again elsewhere; the answer is logged, never sent
on.

Two kinds: a route's shadow upstream, whose answers are only logged, and a split's mirror, which asks the
canary what the stable arm has answered so that graders can compare the two. Begins after the client has its
answer, so it can neither delay nor fail it. Same body, same streaming mode; the pair is joined by `pair_id`
in the log. Knows nothing about clients or grades.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

from contracts.routes import ShadowFields
from contracts.traffic import Arm, Outcome, Reason, Upstream
from serve.router.accounts import Accounts
from serve.router.assign import fraction_of
from serve.router.cascade import Cascades
from serve.router.config import RouterConfig
from serve.router.errors import AttemptFailed, RequestRefused
from serve.router.exchange import EVIDENCE_ENDPOINTS, Exchange
from serve.router.guard import Deadlines, Guard
from serve.router.lines import about_request
from serve.router.metrics import Metrics
from serve.router.pairs import PairGrading, mirrored
from serve.router.pool import Pools
from serve.router.relay import Relay
from serve.router.table import RouteTable

_log = logging.getLogger("stillhouse.router")
_HOUR_S = 3600.0


class _Budget:
    """Counts one route's shadow requests (or mirrored ones) of the running hour."""

    __slots__ = ("running", "since", "used")

    def __init__(self) -> None:
        self.running = 0
        self.since = float("-inf")
        self.used = 0

    def refusal(self, shadow: ShadowFields, now: float) -> str | None:
        """Why no further one may start, None when it may."""
        if now - self.since >= _HOUR_S:
            self.since, self.used = now, 0
        if self.running >= shadow.max_in_flight:
            return "busy"
        return "budget" if shadow.per_hour is not None and self.used >= shadow.per_hour else None


class Shadows:
    """All shadow requests of one router process."""

    def __init__(
        self,
        relay: Relay,
        cascades: Cascades,
        accounts: Accounts,
        table: RouteTable,
        pools: Pools,
        metrics: Metrics,
        deadlines: Deadlines,
        config: RouterConfig,
        pairs: PairGrading | None = None,
    ) -> None:
        """`pairs`: who compares mirrored answers; None: they are only logged."""
        self._relay = relay
        self._cascades = cascades
        self._accounts = accounts
        self._table = table
        self._pools = pools
        self._metrics = metrics
        self._deadlines = deadlines
        self._config = config
        self._pairs = pairs
        self._budgets: dict[tuple[str, str], _Budget] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def consider(self, ex: Exchange) -> None:
        """An exchange was answered: copy it if its conversation is in its route's sample, or its mirror's."""
        if ex.outcome is not Outcome.OK or ex.endpoint not in EVIDENCE_ENDPOINTS:
            return
        shadow, split = ex.route.settings.shadow, ex.route.split
        if shadow is not None and self._drawn("shadow", ex, shadow.share):
            budget = self._admit("", ex, shadow)
            if budget is not None:
                self._start(self._run(self._copy(ex, shadow.upstream, "shadow"), budget))
        if split.canary is not None and mirrored(ex) and self._drawn("mirror", ex, split.mirror):
            budget = self._admit("mirror_", ex, self._mirror_bounds(split.mirror))
            if budget is not None:
                self._start(self._mirror(ex, split.canary, budget))

    async def close(self) -> None:
        """Give up what is running; nobody waits for it."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._pairs is not None:
            self._pairs.close()

    def _drawn(self, kind: str, ex: Exchange, share: float) -> bool:
        return fraction_of(f"{kind}:{ex.route.split.salt}", ex.assignment.unit_hash) < share

    def _mirror_bounds(self, share: float) -> ShadowFields:
        config = self._config
        return ShadowFields(
            share=share, per_hour=config.mirror_per_hour, max_in_flight=config.mirror_in_flight
        )

    def _admit(self, kind: str, ex: Exchange, bounds: ShadowFields) -> _Budget | None:
        """The budget with one more in it, None (and counted) when it is spent. `kind` begins the reason."""
        route = ex.route.split.route
        budget = self._budgets.setdefault((kind, route), _Budget())
        refusal = budget.refusal(bounds, time.monotonic())
        if refusal is not None:
            self._metrics.shadows_dropped.labels(route, f"{kind}{refusal}").inc()
            return None
        budget.used += 1
        budget.running += 1
        return budget

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _copy(self, ex: Exchange, upstream: Upstream, suffix: str) -> Exchange:
        assignment = ex.assignment._replace(arm=Arm.SHADOW, reason=Reason.SHADOW)
        copy = Exchange(
            f"{ex.request_id}-{suffix}",
            ex.endpoint,
            ex.route,
            assignment,
            ex.body,
            time.perf_counter(),
            ex.trace,
        )
        copy.served, copy.pair_id, copy.cap = upstream, ex.request_id, ex.cap
        copy.log_policy, copy.key_id = ex.log_policy, ex.key_id
        copy.held = self._table.hold_upstream(upstream)
        copy.metrics = self._metrics.arm(ex.route.split.route, Arm.SHADOW.value, upstream.name)
        copy.metrics.in_flight.inc()
        return copy

    async def _run(self, copy: Exchange, budget: _Budget) -> None:
        try:
            await self._ask(copy)
        finally:
            budget.running -= 1

    async def _mirror(self, ex: Exchange, canary: Upstream, budget: _Budget) -> None:
        """Ask the canary, and whom else its answer is compared with, and have the answers graded."""
        try:
            names = [] if self._pairs is None else self._pairs.references(ex)
            mine = self._copy(ex, canary, "mirror")
            others = {name: self._copy(ex, self._config.upstreams[name], f"vs-{name}") for name in names}
            await asyncio.gather(*map(self._ask, (mine, *others.values())))
            if self._pairs is not None:
                await self._pairs.grade(ex, mine, others)
        except Exception:  # noqa: BLE001 reason: nobody waits for this task, so nobody else would hear of it
            _log.exception("the mirror of a request failed", extra=about_request(ex))
        finally:
            budget.running -= 1

    async def _ask(self, ex: Exchange) -> None:
        total_s = ex.route.settings.timeouts.total_s or self._config.timeouts.total_s
        guard = Guard(_nobody_leaves, total_s, self._deadlines)
        outcome, status = Outcome.CLIENT_CLOSED, 499  # what it is when we leave in the middle of it
        try:
            upstream: Upstream | None = ex.served
            if ex.served.cascade is not None:
                upstream = await self._cascades.first(ex, guard, _nowhere)
            if upstream is None:
                return
            replica = self._pools.pick(upstream)
            if replica is None:
                raise AttemptFailed(f"{upstream.name}: no replica is registered", status=503)
            await self._relay.attempt(ex, upstream, replica, guard, _nowhere, lenient=False)
        except AttemptFailed as err:
            outcome, status, ex.error = err.outcome, err.status, str(err)
        except RequestRefused as err:
            outcome, status, ex.error = Outcome.CLIENT_ERROR, err.status, str(err)
        except asyncio.CancelledError:
            cause = guard.caught()
            if cause is None:
                raise
            outcome, status, ex.error = Outcome.TIMEOUT, 504, cause.value
        finally:
            guard.stop()
            self._accounts.ended(ex, outcome, status)  # counts once; an answer was counted by the relay


async def _nobody_leaves() -> dict[str, Any]:
    await asyncio.get_running_loop().create_future()
    return {"type": "http.disconnect"}


async def _nowhere(message: dict[str, Any]) -> None:
    return
