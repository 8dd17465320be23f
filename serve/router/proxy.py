"""Who is asked, in which order, and who is charged: retries within an arm, fallback to stable, accounting.

The assigned arm is charged with its own failure even when a fallback saved the client. Knows nothing about
bytes on the wire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import orjson

from contracts.traffic import Arm, Outcome, Upstream
from serve.request_log import RequestLog
from serve.router.client import HttpClient
from serve.router.config import RouterConfig
from serve.router.errors import AttemptFailed, RequestRefused, error_body
from serve.router.exchange import Exchange
from serve.router.guard import Cause, Deadlines, Guard, Receive
from serve.router.intake import Intake, request_id_of
from serve.router.ledger import Ledger
from serve.router.metrics import Metrics
from serve.router.pool import Pools, Replica
from serve.router.relay import Relay, Send, parse_error
from serve.router.replies import send_json
from serve.router.table import RouteTable

_log = logging.getLogger("stillhouse.router")
_TRIES_PER_ARM = 2


class Proxy:
    """Answers every routed request of one router process."""

    def __init__(
        self,
        config: RouterConfig,
        table: RouteTable,
        pools: Pools,
        client: HttpClient,
        metrics: Metrics,
        ledger: Ledger,
        log: RequestLog | None,
    ) -> None:
        self._config = config
        self._table = table
        self._pools = pools
        self._metrics = metrics
        self._ledger = ledger
        self._log = log
        self._intake = Intake(config, table)
        self._deadlines = Deadlines()
        self._relay = Relay(client, pools, config.timeouts, self._ended, keep_chunks=log is not None)
        self.active = 0
        """Requests that have not been answered to the end."""

    async def handle(self, scope: dict[str, Any], receive: Receive, send: Send, endpoint: str) -> None:
        """Answer one POST. Never raises for anything a client or an upstream does."""
        headers = self._intake.headers(scope)
        request_id = request_id_of(headers)
        self.active += 1
        try:
            body = await self._intake.read_body(headers, receive)
            ex = self._intake.exchange(request_id, endpoint, headers, body)
            await self._run(ex, receive, send)
        except RequestRefused as refused:
            self._metrics.refused(refused.status, endpoint)
            await send_json(send, refused.status, refused.body, request_id)
        finally:
            self.active -= 1

    async def _run(self, ex: Exchange, receive: Receive, send: Send) -> None:
        # Held before anything is awaited: a report of this split's version always includes this request.
        ex.held = self._table.hold(ex.route, ex.assignment.arm)
        ex.metrics = self._metrics.arm(ex.route.split.route, ex.assignment.arm.value, ex.served.name)
        ex.metrics.in_flight.inc()
        guard = Guard(receive, self._config.timeouts.total_s, self._deadlines)
        try:
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
            self._release(ex)
            raise
        finally:
            guard.stop()
            if not ex.ended:
                self._ended(ex, Outcome.UPSTREAM_ERROR, 500)

    async def _arms(self, ex: Exchange, guard: Guard, send: Send) -> None:
        """Ask the assigned arm, then stable if that is allowed and was not asked yet."""
        failure = await self._ask_arm(ex, guard, send)
        if failure is None:
            return
        if ex.canary_fallback_possible and self._config.fallback:
            self._charge(ex, failure)
            failure = await self._ask_arm(ex, guard, send)
            if failure is None:
                return
        await self._fail(ex, failure, guard, send)

    async def _ask_arm(self, ex: Exchange, guard: Guard, send: Send) -> AttemptFailed | None:
        """Try the replicas of the arm that serves; None when the client has its answer."""
        lenient = ex.canary_fallback_possible and self._config.fallback
        upstream = ex.served
        tried: list[Replica] = []
        failure = AttemptFailed(f"{upstream.name}: no replica is registered", status=503)
        for attempt in range(_TRIES_PER_ARM):
            replica = self._pools.pick(upstream, tried)
            if replica is None:
                if not tried or not failure.connect or lenient:
                    break
                replica = tried[-1]  # nobody else to ask, and this one never saw the request
            if attempt:
                self._metrics.retries.labels(ex.route.split.route, ex.served_arm.value).inc()
            tried.append(replica)
            try:
                await self._attempt(ex, upstream, replica, guard, send, lenient)
                return None
            except AttemptFailed as err:
                failure = err
                _log.info("request %s: %s", ex.request_id, err)
        return failure

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

    def _charge(self, ex: Exchange, failure: AttemptFailed) -> None:
        """The canary failed: remember that, and let stable serve."""
        split = ex.route.split
        ex.outcome, ex.error = failure.outcome, str(failure)
        ex.fell_back = True
        current = self._table.get(split.route)
        ex.served_arm = Arm.STABLE
        ex.served = split.stable
        if not self._pools.replicas(split.stable) and current is not None:
            ex.served = current.split.stable  # the old stable is gone since this request was assigned
        self._metrics.fallbacks.labels(split.route).inc()

    async def _fail(self, ex: Exchange, failure: AttemptFailed, guard: Guard, send: Send) -> None:
        """Nobody could answer: say so in OpenAI's shape, with the upstream's own words where it had some."""
        guard.ending()
        ex.error = ex.error or str(failure)
        self._ended(ex, failure.outcome, failure.status)
        body: bytes | None = None
        if failure.reply is not None and parse_error(failure.reply[1]) is not None:
            body = failure.reply[1]
        if body is None:
            body = orjson.dumps(error_body(f"The model could not answer: {failure}.", "upstream_error"))
        await send_json(
            send, failure.status, body, ex.request_id, ex.route.headers[ex.assignment.arm, ex.served_arm]
        )

    async def _give_up(self, ex: Exchange, cause: Cause, guard: Guard, send: Send) -> None:
        if cause is Cause.CLIENT:
            self._ended(ex, Outcome.CLIENT_CLOSED, 499)
            return
        why = f"{ex.served.name}: {cause.value}"
        if ex.streamed:
            await self._relay.break_stream(ex, Outcome.TIMEOUT, f"The answer timed out: {why}.", guard, send)
        else:
            await self._fail(ex, AttemptFailed(why, Outcome.TIMEOUT, status=504), guard, send)

    def _ended(self, ex: Exchange, outcome: Outcome, status: int) -> None:
        """Account for a request; called once, right before its client could know that it ended."""
        if ex.ended:
            return
        self._release(ex)
        if not ex.fell_back or outcome is Outcome.CLIENT_ERROR:
            ex.outcome = outcome  # after a fallback the canary's failure stands, unless the request was bad
        ex.status = status
        ex.e2e_s = time.perf_counter() - ex.started
        metrics = ex.metrics
        metrics.ended(ex.outcome, ex.endpoint, status)
        metrics.overhead.observe(ex.overhead_s)
        if ex.outcome is Outcome.OK:
            metrics.e2e.observe(ex.e2e_s)
            if ex.ttft_s is not None:
                metrics.ttft.observe(ex.ttft_s)
                tpot = ex.tpot_s()
                if tpot is not None:
                    metrics.tpot.observe(tpot)
        self._count_tokens(ex)
        if ex.outcome.counts:
            key = ex.evidence()
            if key is not None:
                self._ledger.count(key, ex.outcome.failed, ex.ttft_s, ex.e2e_s)
        if self._log is not None:
            self._log.submit(ex)

    def _count_tokens(self, ex: Exchange) -> None:
        """Tokens are the serving arm's: it made them, whoever is charged with the request."""
        metrics = ex.metrics
        if ex.fell_back:
            metrics = self._metrics.arm(ex.route.split.route, ex.served_arm.value, ex.served.name)
        if ex.prompt_tokens:
            metrics.prompt_tokens.inc(ex.prompt_tokens)
        if ex.completion_tokens:
            metrics.completion_tokens.inc(ex.completion_tokens)

    def _release(self, ex: Exchange) -> None:
        if not ex.ended:
            ex.ended = True
            self._table.release(ex.held)
            ex.metrics.in_flight.dec()
