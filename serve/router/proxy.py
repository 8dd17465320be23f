"""Who is asked, in which order, and who is charged: places, retries within an arm, help from other arms.

The assigned arm is charged with its own failure even when a fallback saved the client. Knows nothing about
bytes on the wire.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from typing import Any

import orjson

from contracts.traffic import Arm, Outcome, Upstream
from serve.grading.graders import NamedGrader
from serve.router.accounts import Accounts
from serve.router.cascade import Cascades
from serve.router.client import HttpClient
from serve.router.config import RouterConfig
from serve.router.errors import AttemptFailed, RequestRefused, error_body, error_for
from serve.router.exchange import Exchange
from serve.router.guard import Cause, Deadlines, Guard, Receive
from serve.router.hold import Holder
from serve.router.intake import Intake, request_id_of
from serve.router.judging import Judging
from serve.router.limits import RetryBudget
from serve.router.lines import about_request
from serve.router.metrics import OTHER, Metrics
from serve.router.pairs import PairGrading
from serve.router.pool import Pools, Replica
from serve.router.relay import Relay, Send, error_bytes, parse_error
from serve.router.replies import send_json
from serve.router.shadow import Shadows
from serve.router.table import RouteTable
from serve.router.tracing import Refusal

_log = logging.getLogger("stillhouse.router")
_TRIES_PER_ARM = 2
_JITTER_S = 0.02


class Proxy:
    """Answers every routed request of one router process."""

    def __init__(
        self,
        config: RouterConfig,
        intake: Intake,
        table: RouteTable,
        pools: Pools,
        client: HttpClient,
        metrics: Metrics,
        accounts: Accounts,
        pairs: PairGrading | None = None,
        graders: Mapping[str, NamedGrader] | None = None,
        judging: Judging | None = None,
    ) -> None:
        """`graders`, `judging`: who judges answers that a cascade holds."""
        self._config = config
        self._intake = intake
        self._table = table
        self._pools = pools
        self._metrics = metrics
        self._accounts = accounts
        self._ended = accounts.ended
        self._deadlines = Deadlines()
        self._relay = Relay(client, pools, config.timeouts, accounts.ended, accounts.want_answers)
        holder = Holder(self._relay, client, pools, metrics)
        self._cascades = Cascades(
            holder, graders or {}, judging, metrics, config.timeouts, accounts.ended, accounts.want_answers
        )
        self.shadows = Shadows(
            self._relay, self._cascades, accounts, table, pools, metrics, self._deadlines, config, pairs
        )
        self._budgets: dict[str, RetryBudget] = {}
        self.active = 0
        """Requests that have not been answered to the end."""

    async def handle(self, scope: dict[str, Any], receive: Receive, send: Send, endpoint: str) -> None:
        """Answer one POST. Never raises for anything a client or an upstream does."""
        headers = self._intake.headers(scope)
        request_id = request_id_of(headers)
        arrived = time.time()
        self.active += 1
        try:
            key = self._intake.admit(scope)
            body = await self._intake.read_body(headers, receive)
            ex = self._intake.exchange(request_id, endpoint, headers, body, key)
            await self._run(ex, receive, send)
        except RequestRefused as refused:
            self._metrics.refused(refused.status, endpoint, refused.route or OTHER)
            self._accounts.refused(
                Refusal(request_id, endpoint, arrived, refused, headers.get(b"traceparent"))
            )
            said = error_for(endpoint, refused.status, refused.body)
            await send_json(send, refused.status, said, request_id, refused.headers)
        finally:
            self.active -= 1

    async def _run(self, ex: Exchange, receive: Receive, send: Send) -> None:
        # Held before anything is awaited: a report of this split's version always includes this request.
        ex.held = self._table.hold(ex.route, ex.assignment)
        ex.metrics = self._metrics.arm(ex.route.split.route, ex.assignment.arm.value, ex.served.name)
        ex.metrics.in_flight.inc()
        total_s = ex.route.settings.timeouts.total_s or self._config.timeouts.total_s
        guard = Guard(receive, total_s, self._deadlines)
        limiter = ex.route.limiter
        entered: float | None = None
        try:
            if limiter is not None:
                await limiter.enter(ex.priority)
                entered = time.perf_counter()
            await self._arms(ex, guard, send)
        except asyncio.CancelledError:
            cause = guard.caught()
            if cause is None:  # the server itself cancels: the client is gone or we are going
                self._ended(ex, Outcome.CLIENT_CLOSED, 499)
                raise
            await self._give_up(ex, cause, guard, send)
        except OSError as err:  # the client's side of the connection failed while we wrote to it
            ex.error = repr(err)
            self._ended(ex, Outcome.CLIENT_CLOSED, 499)
        except RequestRefused:
            self._accounts.release(ex)
            raise
        finally:
            guard.stop()
            if limiter is not None and entered is not None:
                limiter.leave(time.perf_counter() - entered)
            if not ex.ended:
                self._ended(ex, Outcome.UPSTREAM_ERROR, 500)
        if ex.route.settings.shadow is not None or ex.route.split.mirror:
            self.shadows.consider(ex)

    async def _arms(self, ex: Exchange, guard: Guard, send: Send) -> None:
        """Ask the assigned arm, then whoever may help it out."""
        helpers = self._helpers(ex)
        budget = self._budgets.get(ex.route.split.route)
        if budget is None:
            budget = self._budgets[ex.route.split.route] = RetryBudget(self._config.retry_ratio)
        budget.earn()
        failure = await self._ask_arm(ex, guard, send, budget, lenient=bool(helpers))
        while failure is not None and helpers:
            arm, upstream = helpers.pop(0)
            if upstream.name == ex.served.name:
                continue
            self._charge(ex, failure, arm, upstream)
            failure = await self._ask_arm(ex, guard, send, budget, lenient=bool(helpers))
        if failure is not None:
            await self._fail(ex, failure, guard, send)

    def _helpers(self, ex: Exchange) -> list[tuple[Arm, Upstream]]:
        """Who else may answer, best first."""
        if not self._config.fallback:
            return []
        others = [(Arm.FALLBACK, u) for u in ex.route.settings.fallbacks]
        if ex.assignment.arm is Arm.CANARY:
            return [(Arm.STABLE, ex.route.split.stable), *others]
        return others

    async def _ask_arm(
        self, ex: Exchange, guard: Guard, send: Send, budget: RetryBudget, lenient: bool
    ) -> AttemptFailed | None:
        """Try the replicas of the arm that serves; None when the client has its answer."""
        upstream: Upstream | None = ex.served
        ex.step = None
        if ex.served.cascade is not None:
            upstream = await self._cascades.first(ex, guard, send)
        if upstream is None:
            return None
        tried: list[Replica] = []
        failure: AttemptFailed | None = None
        for attempt in range(_TRIES_PER_ARM):
            replica = self._pools.pick(upstream, tried, ex.affinity, strict=lenient)
            if replica is None:
                if failure is None or not failure.connect or lenient:
                    break
                replica = tried[-1]  # nobody else to ask, and this one never saw the request
            if attempt:
                if not budget.spend():
                    break
                self._metrics.retries.labels(ex.route.split.route, ex.served_arm.value).inc()
                await asyncio.sleep(random.uniform(0.0, _JITTER_S))
            tried.append(replica)
            try:
                await self._attempt(ex, upstream, replica, guard, send, lenient)
            except AttemptFailed as err:
                failure = err
                if err.status >= 500 and self._pools.failed(replica, err.connect):
                    self._metrics.ejections.labels(upstream.name).inc()
                # Its words may quote the upstream's, which may quote the request's.
                facts = {"upstream": upstream.name, "status": err.status, "connect": err.connect}
                _log.debug("an attempt failed", extra=about_request(ex, **facts))
                continue
            if ex.outcome is Outcome.OK:
                self._pools.succeeded(replica)
            elif ex.outcome.failed and not ex.fell_back:
                self._pools.failed(replica)
            return None
        return failure or self._nobody(upstream, lenient)

    def _nobody(self, upstream: Upstream, lenient: bool) -> AttemptFailed:
        """No replica could even be asked."""
        why = "no replica is registered"
        if lenient and self._pools.replicas(upstream):
            why = "every replica failed just now and is left alone"
        return AttemptFailed(f"{upstream.name}: {why}", status=503)

    async def _attempt(
        self, ex: Exchange, upstream: Upstream, replica: Replica, guard: Guard, send: Send, lenient: bool
    ) -> None:
        try:
            await self._relay.attempt(ex, upstream, replica, guard, send, lenient)
        except asyncio.CancelledError:
            if guard.cause is not Cause.FIRST_BYTE:
                raise
            cause = guard.caught()
            assert cause is not None
            raise AttemptFailed(f"{upstream.name}: {cause.value}", Outcome.TIMEOUT, status=504) from None

    def _charge(self, ex: Exchange, failure: AttemptFailed, arm: Arm, upstream: Upstream) -> None:
        """The assigned arm failed: remember that, and let somebody else serve."""
        split = ex.route.split
        if not ex.fell_back:
            ex.outcome, ex.error = failure.outcome, str(failure)
            ex.fell_back = True
        current = self._table.get(split.route)
        ex.served_arm, ex.served = arm, upstream
        if arm is Arm.STABLE and current is not None and not self._pools.replicas(upstream):
            ex.served = current.split.stable  # the old stable is gone since this request was assigned
        self._metrics.fallbacks.labels(split.route).inc()

    async def _fail(self, ex: Exchange, failure: AttemptFailed, guard: Guard, send: Send) -> None:
        """Nobody could answer: say so in the API's shape, with the upstream's own words where it had some."""
        guard.ending()
        ex.error = ex.error or str(failure)
        self._ended(ex, failure.outcome, failure.status)
        body: bytes | None = None
        if failure.reply is not None and parse_error(failure.reply[1]) is not None:
            body = error_bytes(ex.endpoint, failure.status, failure.reply[1])
        if body is None:
            said = error_body(f"The model could not answer: {failure}.", "upstream_error")
            body = orjson.dumps(error_for(ex.endpoint, failure.status, said))
        told = (*ex.headers(), *ex.limits)
        await send_json(send, failure.status, body, ex.request_id, told)

    async def _give_up(self, ex: Exchange, cause: Cause, guard: Guard, send: Send) -> None:
        if cause is Cause.CLIENT:
            self._ended(ex, Outcome.CLIENT_CLOSED, 499)
            return
        why = f"{ex.served.name}: {cause.value}"
        if ex.streamed:
            await self._relay.break_stream(ex, Outcome.TIMEOUT, f"The answer timed out: {why}.", guard, send)
        else:
            await self._fail(ex, AttemptFailed(why, Outcome.TIMEOUT, status=504), guard, send)
