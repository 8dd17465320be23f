"""Asks an upstream and keeps its whole answer, beside what it says about how likely its tokens were.

Whole bodies and event streams. Log-probabilities that the client did not ask for are taken out of what it
will see. Raises AttemptFailed whatever goes wrong. Knows nothing about what is done with the answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from contracts.traffic import Upstream
from serve.cascade.logprobs import TokenScores, Wish, read, take_out
from serve.router.answer import Answer, answer_of, answer_of_stream, parse_body, usage_tokens
from serve.router.bodies import dump
from serve.router.client import Broken, ConnectFailed, Connection, HttpClient
from serve.router.errors import AttemptFailed
from serve.router.exchange import Exchange
from serve.router.metrics import Metrics
from serve.router.pool import Pools
from serve.router.relay import Relay, asks_usage_itself, drain, upstream_body
from serve.router.sse import StreamWatcher, event_json, split_events, watcher_of

_FRAMING = 3
"""Events of a stream that carry no token: the role, the finish reason, the end."""


@dataclass(slots=True)
class Held:
    """A whole answer that nobody has seen."""

    status: int
    content_type: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    """What the client would get."""
    response: dict[str, Any] | None = None
    """The body as JSON; None of a stream."""
    watcher: StreamWatcher | None = None
    """Of a stream."""
    scores: TokenScores = field(default_factory=TokenScores)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def usage(self) -> object:
        """As the upstream told it."""
        return self.watcher.usage if self.watcher is not None else (self.response or {}).get("usage")

    def answer(self) -> Answer:
        """Its text and finish reason."""
        return answer_of(self.response) if self.watcher is None else answer_of_stream(self.body)


class Holder:
    """Asks for answers to keep, for one router process."""

    def __init__(self, relay: Relay, client: HttpClient, pools: Pools, metrics: Metrics) -> None:
        self._relay = relay
        self._client = client
        self._pools = pools
        self._metrics = metrics

    async def ask(
        self, ex: Exchange, upstream: Upstream, more: dict[str, Any], wish: Wish, limit: int | None
    ) -> Held | None:
        """The whole answer to a request, None once it is longer than `limit` tokens.

        Args:
            more: fields of ours in the request's body.
            wish: what log-probabilities the client wants to see.

        Raises: AttemptFailed; what speaks of the replica counts against it.
        """
        replica = self._pools.pick(upstream, key=ex.affinity, strict=True)
        if replica is None:
            raise AttemptFailed(f"{upstream.name}: no replica may be asked", status=503)
        replica.in_flight += 1
        connection: Connection | None = None
        try:
            if ex.overhead_s == 0.0:
                ex.overhead_s = time.perf_counter() - ex.started
            head, body = self._relay.head(ex, upstream), upstream_body(ex, upstream, more)
            connection = await self._client.ask(replica.target, "POST", ex.endpoint, head, body)
            held = await _read(ex, connection, wish, limit)
        except (ConnectFailed, Broken, AttemptFailed) as err:
            failed = err if isinstance(err, AttemptFailed) else AttemptFailed(f"{upstream.name}: {err}")
            connect = isinstance(err, ConnectFailed)
            if failed.status >= 500 and self._pools.failed(replica, connect):
                self._metrics.ejections.labels(upstream.name).inc()
            raise failed from err
        finally:
            replica.in_flight -= 1
            if connection is not None:
                self._client.release(connection)
        self._pools.succeeded(replica)
        return held


async def _read(ex: Exchange, connection: Connection, wish: Wish, limit: int | None) -> Held | None:
    if connection.status >= 400:
        await connection.read_all()
        raise AttemptFailed(f"it answered {connection.status}", status=connection.status)
    held = Held(connection.status, connection.content_type, connection.headers, b"")
    if connection.content_type.startswith(b"text/event-stream"):
        held.watcher = watcher_of(ex.endpoint, asks_usage_itself(ex))
        events = await _events(connection, held.watcher, limit)
        if events is None:
            return None
        held.body = b"".join(_cleaned(events, wish, held.scores))
    else:
        body = await connection.read_all()
        held.response = parse_body(body)
        seen = held.response is not None and _take(held.response, wish, held.scores)
        held.body = dump(held.response) if seen else body
    prompt, completion = usage_tokens(held.usage)
    held.prompt_tokens = prompt or 0
    held.completion_tokens = len(held.scores.logprobs) if completion is None else completion
    return None if limit is not None and held.completion_tokens > limit else held


async def _events(connection: Connection, watcher: StreamWatcher, limit: int | None) -> bytes | None:
    """All events of a stream, None once they are too many. Raises: AttemptFailed, Broken."""
    parts: list[bytes] = []
    seen = 0
    while not watcher.done:
        data = await connection.read()
        events = watcher.feed(data) if data else watcher.rest()
        if watcher.error:
            raise AttemptFailed(f"its stream broke off: {events[-500:].decode('utf-8', 'replace')}")
        parts.append(events)
        seen += events.count(b"data:")
        if limit is not None and seen > limit + _FRAMING:
            return None
        if not data:
            break
    if not watcher.done and watcher.ending is not None:
        raise AttemptFailed(f"its stream ended without {watcher.ending}")
    if not seen:
        raise AttemptFailed("its stream was empty")
    await drain(connection)
    return b"".join(parts)


def _cleaned(events: bytes, wish: Wish, scores: TokenScores) -> Iterator[bytes]:
    """The events as the client may see them."""
    for event in split_events(events):
        body = event_json(event) if b'"logprobs"' in event else None
        if isinstance(body, dict) and _take(body, wish, scores):
            yield b"data: " + dump(body) + b"\n\n"
        else:
            yield event


def _take(body: dict[str, Any], wish: Wish, scores: TokenScores) -> bool:
    """Move what the client did not ask for from a body to the scores; True when there was any."""
    choices = body.get("choices")
    found = [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []
    told = [c for c in found if c.get("logprobs") is not None]
    for choice in told:
        try:
            read(choice, scores)
            take_out(choice, wish)
        except ValueError:  # of no shape that is known: such an answer cannot be judged
            scores.logprobs.append(float("nan"))
            if not wish.any:
                choice["logprobs"] = None
    return bool(told)
