"""One try at one replica: ask it, and carry its answer to the client as it comes.

Raises AttemptFailed as long as the client has seen nothing, so that somebody else may be asked. Knows
nothing about who that would be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from contracts.traffic import Outcome, Upstream
from serve.router.answer import parse_body
from serve.router.bodies import dump
from serve.router.client import Broken, ConnectFailed, Connection, HttpClient
from serve.router.config import Timeouts
from serve.router.errors import AttemptFailed, error_body, error_for
from serve.router.exchange import Exchange
from serve.router.guard import Cause, Guard, Source
from serve.router.pool import Pools, Replica
from serve.router.sse import StreamWatcher, watcher_of

Send = Callable[[dict[str, Any]], Awaitable[None]]
Ended = Callable[[Exchange, Outcome, int], None]

_STREAMS_OPENAI = frozenset(("/v1/chat/completions", "/v1/completions"))
_PASSED_BACK = frozenset((b"retry-after", b"cache-control", b"openai-processing-ms"))
_DRAIN_S = 1.0
_OURS_TO_SOLVE = frozenset((401, 403, 404, 408, 409, 425, 429))
"""4xx that speak of the upstream (its key, its model name, its load) rather than of the client's request."""


class Relay:
    """Carries answers from replicas to clients."""

    def __init__(
        self, client: HttpClient, pools: Pools, timeouts: Timeouts, ended: Ended, keep_chunks: bool
    ) -> None:
        """`ended` is called once an exchange, right before the client can see its end."""
        self._client = client
        self._pools = pools
        self._timeouts = timeouts
        self._ended = ended
        self._keep_chunks = keep_chunks

    async def attempt(
        self, ex: Exchange, upstream: Upstream, replica: Replica, guard: Guard, send: Send, lenient: bool
    ) -> None:
        """Ask a replica and deliver its answer.

        `lenient`: another arm could still be asked, so 4xx that speak of the upstream are failures too.
        Raises: AttemptFailed before the first byte went to the client.
        """
        body = upstream_body(ex, upstream)
        headers = self.head(ex, upstream)
        own = ex.route.settings.timeouts
        guard.wait_for(Cause.FIRST_BYTE, own.first_byte_s or self._timeouts.first_byte_s)
        replica.in_flight += 1
        connection: Connection | None = None
        try:
            if ex.overhead_s == 0.0:
                ex.overhead_s = time.perf_counter() - ex.started
            connection = await self._client.ask(replica.target, "POST", ex.endpoint, headers, body)
            if connection.status >= 400:
                await self._refusal(ex, connection, lenient, guard, send)
            elif connection.content_type.startswith(b"text/event-stream"):
                await self._stream(ex, connection, guard, send)
            else:
                await self._whole(ex, connection, await connection.read_all(), guard, send)
        except ConnectFailed as err:
            raise AttemptFailed(f"{upstream.name}: cannot connect to {err}", connect=True) from err
        except Broken as err:
            raise AttemptFailed(f"{upstream.name}: {err}") from err
        finally:
            replica.in_flight -= 1
            if connection is not None:
                self._client.release(connection)

    async def _refusal(
        self, ex: Exchange, connection: Connection, lenient: bool, guard: Guard, send: Send
    ) -> None:
        status = connection.status
        body = await connection.read_all()
        if status >= 500 or (lenient and status in _OURS_TO_SOLVE):
            content_type = connection.content_type or b"application/json"
            raise AttemptFailed(f"upstream answered {status}", status=status, reply=(content_type, body))
        ex.error = body[:1000].decode("utf-8", "replace")
        await self._whole(ex, connection, body, guard, send, Outcome.CLIENT_ERROR)

    async def _whole(
        self,
        ex: Exchange,
        connection: Connection,
        body: bytes,
        guard: Guard,
        send: Send,
        outcome: Outcome = Outcome.OK,
    ) -> None:
        """A whole answer, sent once all of it is here: a replica that dies midway costs nothing."""
        status = connection.status
        ex.body_bytes += len(body)
        if outcome is Outcome.OK:
            ex.response = parse_body(body)
            if ex.response is not None:
                ex.take_usage(ex.response.get("usage"))
        else:
            body = error_bytes(ex.endpoint, status, body)
        guard.ending()
        self._ended(ex, outcome, status)
        content_type = connection.content_type or b"application/json"
        await send(start_message(ex, status, content_type, connection.headers, len(body)))
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, ex: Exchange, connection: Connection, guard: Guard, send: Send) -> None:
        watcher = ex.watcher = watcher_of(ex.endpoint, asks_usage_itself(ex))
        first = await self._first_events(connection, watcher)
        now = time.perf_counter()
        ex.ttft_s = now - ex.started
        ex.streamed = True
        guard.wait_for(Cause.BETWEEN, self._between_s(ex))
        await send(start_message(ex, connection.status, connection.content_type, connection.headers, None))
        try:
            await self._events(ex, connection, watcher, first, guard, send)
        except Broken as err:
            await self.break_stream(ex, Outcome.BROKEN_STREAM, f"The upstream broke off: {err}.", guard, send)

    async def _first_events(self, connection: Connection, watcher: StreamWatcher) -> bytes:
        """The first whole events. Raises AttemptFailed when there are none, or the first one is an error."""
        events = b""
        while not events:
            data = await connection.read()
            events = watcher.feed(data) if data else watcher.rest()
            if not data:
                break
        if watcher.error:
            raise AttemptFailed(f"the stream began with an error: {events[:500].decode('utf-8', 'replace')}")
        if not events:
            raise AttemptFailed("the stream was empty")
        return events

    async def _events(
        self,
        ex: Exchange,
        connection: Connection,
        watcher: StreamWatcher,
        events: bytes,
        guard: Guard,
        send: Send,
    ) -> None:
        between = self._between_s(ex)
        source = guard.source
        while True:
            if events and self._keep_chunks:
                ex.chunks.append(events)
            if watcher.done or watcher.error:
                break
            if events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
            if source is not None:
                events = await self._pass_on(ex, connection, watcher, guard, source)
                if events:
                    continue
            data = await connection.read()
            guard.extend(between)
            if not data:
                events = watcher.rest()
                if events and self._keep_chunks:
                    ex.chunks.append(events)
                break
            events = watcher.feed(data)
        ex.take_usage(watcher.usage)
        outcome = Outcome.OK
        if watcher.error:
            outcome, ex.error = Outcome.BROKEN_STREAM, events[-500:].decode("utf-8", "replace")
        elif not watcher.done and watcher.ending is not None:
            # Ended politely but without its last event: the answer is cut off, whatever the framing says.
            raise Broken(f"its stream ended without {watcher.ending}")
        guard.ending()
        self._ended(ex, outcome, connection.status)
        await send({"type": "http.response.body", "body": events})
        await drain(connection)

    async def _pass_on(
        self, ex: Exchange, connection: Connection, watcher: StreamWatcher, guard: Guard, source: Source
    ) -> bytes:
        """Carry events over as they come, a callback each; returns the last ones, b"" when they are not here.

        Most of a stream goes this way: waking this task for every token would cost as much as all the rest.
        """
        between = self._between_s(ex)
        keep = ex.chunks.append if self._keep_chunks else None
        last = b""

        def take(data: bytes) -> bool:
            nonlocal last
            guard.extend(between)
            events = watcher.feed(data)
            if watcher.done or watcher.error:
                last = events
                return False
            if not events:
                return True
            if keep is not None:
                keep(events)
            return source.write(events)

        await connection.pump(take)
        if not last:
            await source.drained()
        return last

    async def break_stream(self, ex: Exchange, outcome: Outcome, why: str, guard: Guard, send: Send) -> None:
        """End a stream that has begun with an error event: never silence, never half an event."""
        guard.ending()
        ex.error = why
        assert ex.watcher is not None
        ex.take_usage(ex.watcher.usage)
        self._ended(ex, outcome, 200)
        await send({"type": "http.response.body", "body": ex.watcher.failure(why, outcome.value)})

    def _between_s(self, ex: Exchange) -> float:
        return ex.route.settings.timeouts.between_chunks_s or self._timeouts.between_chunks_s

    def head(self, ex: Exchange, upstream: Upstream) -> bytes:
        """Header lines of a request to an upstream."""
        accept = b"text/event-stream" if ex.stream else b"application/json"
        return (
            b"content-type: application/json\r\naccept: " + accept
            + b"\r\nx-request-id: " + ex.request_id.encode() + b"\r\n"
            + ex.trace + self._pools.authorization(upstream)
        )  # fmt: skip


def error_bytes(endpoint: str, status: int, body: bytes) -> bytes:
    """An upstream's error in the shape that the endpoint's clients expect, untouched if it has it."""
    parsed = parse_error(body)
    if parsed is None:
        parsed = error_body(body[:500].decode("utf-8", "replace"), "invalid_request_error")
    elif error_for(endpoint, status, parsed) is parsed:
        return body
    return orjson.dumps(error_for(endpoint, status, parsed))


def parse_error(body: bytes) -> dict[str, Any] | None:
    """The body if it already is an error in OpenAI's shape."""
    parsed = parse_body(body)
    return parsed if parsed is not None and isinstance(parsed.get("error"), dict) else None


def asks_usage_itself(ex: Exchange) -> bool:
    """True when the router asks for usage on its own account, so the client must not see it."""
    return ex.stream and ex.endpoint in _STREAMS_OPENAI and not ex.client_wants_usage


def upstream_body(ex: Exchange, upstream: Upstream, more: dict[str, Any] | None = None) -> bytes:
    """The client's body with the upstream's model name in it; every other field stays as it is.

    `more`: fields of ours, over the client's.
    """
    body = {**ex.route.settings.parameters, **ex.body, "model": upstream.model}
    if ex.cap is not None:
        body[ex.cap[0]] = ex.cap[1]
    if asks_usage_itself(ex):
        body["stream_options"] = {**(ex.body.get("stream_options") or {}), "include_usage": True}
    return dump(body if more is None else {**body, **more})


def start_message(
    ex: Exchange,
    status: int,
    content_type: bytes,
    upstream_headers: list[tuple[bytes, bytes]],
    length: int | None,
) -> dict[str, Any]:
    """The head of an answer: who gave it, and what of the upstream's own headers is passed on."""
    headers = [
        (b"content-type", content_type),
        (b"x-request-id", ex.request_id.encode()),
        *ex.headers(),
        *ex.limits,
    ]
    for name, value in upstream_headers:
        # With limits of its own a client is not told those of our key at the upstream, under the same names.
        if name in _PASSED_BACK or (not ex.limits and name.startswith(b"x-ratelimit-")):
            headers.append((name, value))
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": headers}


async def drain(connection: Connection) -> None:
    """Read what comes after the end, so that the connection can be used again; it is only a few bytes."""
    if connection.complete:
        return
    try:
        async with asyncio.timeout(_DRAIN_S):
            await connection.read_all()
    except (Broken, TimeoutError):
        return  # the client has its answer; this connection is simply not kept
