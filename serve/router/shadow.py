"""Shadow requests: a sample of the answered ones is asked again elsewhere; the answer is logged and dropped.

Begins after the client has its answer, so it can neither delay nor fail it. Same body, same streaming mode;
the pair is joined by `pair_id` in the log. Knows nothing about clients.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from contracts.routes import Shadow
from contracts.traffic import Arm, Outcome, Reason
from serve.router.accounts import Accounts
from serve.router.assign import fraction_of
from serve.router.config import RouterConfig
from serve.router.errors import AttemptFailed, RequestRefused
from serve.router.exchange import EVIDENCE_ENDPOINTS, Exchange
from serve.router.guard import Deadlines, Guard
from serve.router.metrics import Metrics
from serve.router.pool import Pools
from serve.router.relay import Relay
from serve.router.table import RouteTable

_log = logging.getLogger("stillhouse.router")
_HOUR_S = 3600.0


class _Budget:
    """Counts one route's shadow requests of the running hour."""

    __slots__ = ("running", "since", "used")

    def __init__(self) -> None:
        self.running = 0
        self.since = float("-inf")
        self.used = 0

    def refusal(self, shadow: Shadow, now: float) -> str | None:
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
        accounts: Accounts,
        table: RouteTable,
        pools: Pools,
        metrics: Metrics,
        deadlines: Deadlines,
        config: RouterConfig,
    ) -> None:
        self._relay = relay
        self._accounts = accounts
        self._table = table
        self._pools = pools
        self._metrics = metrics
        self._deadlines = deadlines
        self._total_s = config.timeouts.total_s
        self._budgets: dict[str, _Budget] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def consider(self, ex: Exchange) -> None:
        """An exchange was answered: copy it if its conversation is in its route's sample."""
        shadow = ex.route.settings.shadow
        if shadow is None or ex.outcome is not Outcome.OK or ex.endpoint not in EVIDENCE_ENDPOINTS:
            return
        split = ex.route.split
        if fraction_of(f"shadow:{split.salt}", ex.assignment.unit_hash) >= shadow.share:
            return
        budget = self._budgets.setdefault(split.route, _Budget())
        refusal = budget.refusal(shadow, time.monotonic())
        if refusal is not None:
            self._metrics.shadows_dropped.labels(split.route, refusal).inc()
            return
        budget.used += 1
        budget.running += 1
        task = asyncio.get_running_loop().create_task(self._run(self._copy(ex, shadow), budget))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is running; nobody waits for it."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _copy(self, ex: Exchange, shadow: Shadow) -> Exchange:
        assignment = ex.assignment._replace(arm=Arm.SHADOW, reason=Reason.SHADOW)
        copy = Exchange(
            f"{ex.request_id}-shadow",
            ex.endpoint,
            ex.route,
            assignment,
            ex.body,
            time.perf_counter(),
            ex.trace,
        )
        copy.served, copy.pair_id, copy.cap = shadow.upstream, ex.request_id, ex.cap
        copy.log_policy, copy.key_id = ex.log_policy, ex.key_id
        copy.held = self._table.hold_upstream(shadow.upstream.name)
        copy.metrics = self._metrics.arm(ex.route.split.route, Arm.SHADOW.value, shadow.upstream.name)
        copy.metrics.in_flight.inc()
        return copy

    async def _run(self, ex: Exchange, budget: _Budget) -> None:
        total_s = ex.route.settings.timeouts.total_s or self._total_s
        guard = Guard(_nobody_leaves, total_s, self._deadlines)
        outcome, status = Outcome.CLIENT_CLOSED, 499  # what it is when we leave in the middle of it
        try:
            replica = self._pools.pick(ex.served)
            if replica is None:
                raise AttemptFailed(f"{ex.served.name}: no replica is registered", status=503)
            await self._relay.attempt(ex, ex.served, replica, guard, _nowhere, lenient=False)
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
            budget.running -= 1
            self._accounts.ended(ex, outcome, status)  # counts once; an answer was counted by the relay


async def _nobody_leaves() -> dict[str, Any]:
    await asyncio.get_running_loop().create_future()
    return {"type": "http.disconnect"}


async def _nowhere(message: dict[str, Any]) -> None:
    return
