"""A small HTTP/1.1 client: one request, one streamed answer, connections kept and reused.

aiohttp's client alone costs about 0.1 ms a request; this costs a quarter of it. It does no redirects,
cookies or compression, because nothing between a router and its replicas needs them. Knows nothing about
arms, events or OpenAI.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import httptools

from contracts.errors import ConfigError

_HIGH_WATER: Final = 256 * 1024
_MAX_HEAD: Final = 64 * 1024


class Target(NamedTuple):
    """Where a base URL points: connections are pooled by it."""

    host: str
    port: int
    tls: bool
    prefix: str
    authority: str


def target_of(url: str) -> Target:
    """Split a base URL. Raises ConfigError when it has no host."""
    parts = urlsplit(url)
    if parts.hostname is None:
        raise ConfigError(f"upstream URL {url!r} has no host.")
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Target(parts.hostname, port, tls, parts.path.rstrip("/"), f"{host}:{port}")


@lru_cache(maxsize=1024)
def _first_lines(target: Target, method: str, path: str) -> bytes:
    """Request line and host; the paths are a fixed few."""
    return f"{method} {target.prefix}{path} HTTP/1.1\r\nhost: {target.authority}\r\n".encode("ascii")


class ConnectFailed(ConnectionError):
    """No connection could be made: the peer never saw the request."""


class Broken(ConnectionError):
    """The peer closed the connection, or spoke something that is not HTTP, before its answer was whole."""


class Connection(asyncio.Protocol):
    """One connection and the answer that is being read from it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.content_type = b""
        self.complete = False
        self.reused = False
        self.silent = True
        """Nothing came back since the request was written."""
        self._keep_alive = False
        self._head_done = False
        self._closed = False
        self._why = "the connection was closed before the answer was whole"
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._head_bytes = 0
        self._paused = False
        self._framed = False
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[bytes], bool] | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)

    # asyncio.Protocol --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.complete:  # bytes nobody asked for: this connection cannot be trusted with another request
            self.close()
            return
        self.silent = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as err:
            self._why = f"the answer is not HTTP: {err}"
            self.close()
        if self._take is None or self._handed_on():
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        if self._head_done and not self._framed and exc is None:
            self.complete = True  # an answer without a length ends with its connection
        self._wake()

    # httptools callbacks -----------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of the answer."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > _MAX_HEAD:
            raise ValueError("response headers are too large")
        lower = name.lower()
        if lower == b"content-length" or lower == b"transfer-encoding":
            self._framed = True
        elif lower == b"content-type" and not self.content_type:
            self.content_type = value
        self.headers.append((lower, value))

    def on_headers_complete(self) -> None:
        """The head is whole, unless it was an interim (1xx) answer."""
        if self.complete:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self.headers.clear()
            self.content_type = b""
            return
        self.status = status
        self._head_done = True

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self.complete:  # a second answer nobody asked for must not be mixed into this one
            self._keep_alive = False
            return
        self._chunks.append(body)
        self._buffered += len(body)
        if self._buffered > _HIGH_WATER and not self._paused and self._transport is not None:
            self._transport.pause_reading()
            self._paused = True

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if self.complete:
            self._keep_alive = False
        elif self._head_done:
            self.complete = True
            self._keep_alive = self._parser.should_keep_alive()

    # for the client ----------------------------------------------------------------------------

    @property
    def reusable(self) -> bool:
        """True when another request may be written to it."""
        return self.complete and self._keep_alive and not self._closed and not self._chunks

    @property
    def closed(self) -> bool:
        """True when the peer is gone."""
        return self._closed

    def ask(self, head: bytes, body: bytes) -> None:
        """Write a request; the answer is read with `head()` and `read()`."""
        assert self._transport is not None
        if not self._keep_alive:  # a parser whose answer asked for more goes on with the next one
            self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers = []
        self.content_type = b""
        self.complete = self._keep_alive = self._head_done = self._framed = False
        self.silent = True
        self._head_bytes = self._buffered = 0
        self._chunks.clear()
        self._transport.write(head + body)

    async def head(self) -> int:
        """Wait for status and headers. Raises Broken."""
        while not self._head_done:
            if self._closed:
                raise Broken(self._why)
            await self._wait()
        return self.status

    async def read(self) -> bytes:
        """The next bytes of the body, b"" at its end. Raises Broken when it ends too early."""
        while not self._chunks:
            if self.complete:
                return b""
            if self._closed:
                raise Broken(self._why)
            await self._wait()
        return self._taken()

    async def pump(self, take: Callable[[bytes], bool]) -> None:
        """Call `take` with every piece of the body the moment it comes, without waking a task for each.

        Returns when `take` says False, or when there is nothing more to come: `read` tells which end it is.
        """
        if self._chunks and not take(self._taken()):
            return
        if self.complete or self._closed:
            return
        self._take = take
        try:
            await self._wait()
        finally:
            self._take = None

    async def read_all(self) -> bytes:
        """The whole body."""
        parts = []
        while data := await self.read():
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def header(self, name: bytes) -> bytes:
        """A header's value, b"" when it is absent."""
        return next((v for n, v in self.headers if n == name), b"")

    def close(self) -> None:
        """Hang up at once; the peer sees it and stops working for us."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    def _taken(self) -> bytes:
        """What has come of the body."""
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        if self._paused and self._transport is not None:
            self._transport.resume_reading()
            self._paused = False
        return data

    def _handed_on(self) -> bool:
        """Give what came to whoever pumps; True when that has to be woken."""
        assert self._take is not None
        if self._chunks and not self._take(self._taken()):
            self._take = None
            return True
        return self.complete or self._closed

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class HttpClient:
    """Connections to all upstreams of one router process, used from one event loop."""

    def __init__(self, connect_s: float, idle_per_target: int = 256) -> None:
        self._connect_s = connect_s
        self._idle_per_target = idle_per_target
        self._idle: dict[Target, deque[Connection]] = {}
        self._tls: ssl.SSLContext | None = None

    async def ask(
        self, target: Target, method: str, path: str, headers: bytes, body: bytes = b""
    ) -> Connection:
        """Send a request and wait for the answer's head; hand the connection back with `release`.

        `headers` are whole lines, each with its CRLF. Raises ConnectFailed, Broken.
        """
        head = b"%bcontent-length: %d\r\n%b\r\n" % (_first_lines(target, method, path), len(body), headers)
        while True:
            connection = self._take_idle(target) or await self._connect(target)
            try:
                connection.ask(head, body)
                await connection.head()
                return connection
            except Broken:
                connection.close()
                # A kept connection that its peer closed before a single byte came back was most likely
                # closed for idleness while we wrote; a fresh one tells which it is.
                if not (connection.reused and connection.silent):
                    raise
            except BaseException:  # reason: cancelled; hang up so that the upstream stops, and re-raise
                connection.close()
                raise

    def release(self, connection: Connection) -> None:
        """Give a connection back: kept when its answer was read to the end, closed otherwise."""
        if connection.reusable:
            idle = self._idle.setdefault(connection.target, deque())
            if len(idle) < self._idle_per_target:
                idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close every kept connection."""
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()

    def _take_idle(self, target: Target) -> Connection | None:
        idle = self._idle.get(target)
        while idle:
            connection = idle.pop()
            if not connection.closed:
                connection.reused = True
                return connection
        return None

    async def _connect(self, target: Target) -> Connection:
        loop = asyncio.get_running_loop()
        context = self._context() if target.tls else None
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(target), target.host, target.port, ssl=context
                )
        except (OSError, TimeoutError) as err:
            raise ConnectFailed(f"{target.authority}: {err or 'no connection in time'}") from err
        return connection

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls
