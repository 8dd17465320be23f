"""An HTTP/1.1 server for one ASGI application: an asyncio.Protocol on httptools, one task a request.

uvicorn is a fine server, but on this router's path it was the largest single cost; this one does what a
router behind a load balancer needs and no more: keep-alive, pipelining in order, chunked bodies both ways,
flow control, bounded heads, a drain. No TLS, no WebSocket, no HTTP/2. Knows nothing about what is served.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import unquote_to_bytes

import httptools

from serve.router.guard import Receive, Source

_log = logging.getLogger("stillhouse.router")

Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

_MAX_HEAD: Final = 64 * 1024
_MAX_UNREAD: Final = 64 * 1024
"""Body bytes kept for an application that does not ask for them yet."""
_MAX_PIPELINED: Final = 16
_SWEEP_S: Final = 1.0
_LINGER_S: Final = 2.0
_STATUS_LINES: Final = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
_BODILESS: Final = frozenset((204, 304))
_BAD_REQUEST: Final = b'{"error":{"message":"The request is not valid HTTP.","type":"invalid_request_error"}}'
_TOO_LARGE: Final = b'{"error":{"message":"The request head is too large.","type":"invalid_request_error"}}'
_BROKE: Final = b'{"error":{"message":"Internal error.","type":"server_error"}}'


class Request(Source):
    """One request and its answer: the application calls it to receive, and its `send` to answer."""

    __slots__ = (
        "_chunked", "_close", "_connection", "_content", "_head", "_on_disconnect", "_parts", "_unread",
        "_waiter", "answered", "arrived", "gone", "keep_alive", "scope", "started",
    )  # fmt: skip

    def __init__(self, connection: ServerConnection, scope: dict[str, Any], keep_alive: bool) -> None:
        self._connection = connection
        self.scope = scope
        self.keep_alive = keep_alive
        self.arrived = False
        """All of its body is here."""
        self.gone = False
        """Its client left."""
        self.started = False
        """The head of the answer was written."""
        self.answered = False
        self._parts: list[bytes] = []
        self._unread = 0
        self._waiter: asyncio.Future[None] | None = None
        self._on_disconnect: Callable[[], None] | None = None
        self._head = b""
        self._content = True
        self._chunked = False

    # what comes ------------------------------------------------------------------------------------

    async def __call__(self) -> dict[str, Any]:
        """ASGI's `receive`."""
        while not self._parts and not self.arrived and not self.gone and not self.answered:
            await self._wait()
        if self._parts or (self.arrived and not self.answered and self._unread >= 0):
            more = not self.arrived
            return {"type": "http.request", "body": self._take(), "more_body": more}
        while not self.gone and not self.answered:
            await self._wait()
        return {"type": "http.disconnect"}

    def whole_body(self) -> bytes | None:
        """The body when all of it is here and nobody took any of it; None otherwise."""
        return self._take() if self.arrived and self._unread >= 0 else None

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the client leaves before its answer is whole."""
        self._on_disconnect = callback
        if self.gone:
            callback()

    def feed(self, data: bytes) -> bool:
        """A piece of the body; False when the application does not keep up."""
        if self.answered:
            return True
        self._parts.append(data)
        self._unread += len(data)
        self._wake()
        return self._unread <= _MAX_UNREAD

    def whole(self) -> None:
        """The body ended."""
        self.arrived = True
        self._wake()

    def leave(self) -> None:
        """The client is gone."""
        self.gone = True
        self._wake()
        if self._on_disconnect is not None and not self.answered:
            self._on_disconnect()

    def _take(self) -> bytes:
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        # Taken to the end: from now on there is only a disconnect to hear of.
        self._unread = -1 if self.arrived else 0
        self._connection.read_on()
        return data

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # what goes -------------------------------------------------------------------------------------

    async def send(self, message: dict[str, Any]) -> None:
        """ASGI's `send`. What a client that left will not see is dropped."""
        if self.gone or self.answered:
            return
        if message["type"] == "http.response.start":
            self._begin(message["status"], message["headers"])
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        self._connection.write(self._framed(body, more))
        if not more:
            self.answered = True
            self._connection.answer_ended(self)
        elif self._connection.full:
            await self._connection.drained()

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status]
        sized = False
        for name, value in headers:
            sized = sized or name == b"content-length"
            lines.append(b"%b: %b\r\n" % (name, value))
        self._content = self.scope["method"] != "HEAD" and status not in _BODILESS
        if not sized and self._content:
            if self.scope["http_version"] == "1.0":
                self.keep_alive = False
            else:
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
        if not (self.keep_alive and self.arrived and self._connection.stays):
            self.keep_alive = False
            lines.append(b"connection: close\r\n")
        elif self.scope["http_version"] == "1.0":
            lines.append(b"connection: keep-alive\r\n")
        lines.append(self._connection.date)
        self._head = b"".join(lines)

    def _framed(self, body: bytes, more: bool) -> bytes:
        if not self._content:
            body = b""
        elif self._chunked:
            if body:
                body = (b"%x\r\n%b\r\n" if more else b"%x\r\n%b\r\n0\r\n\r\n") % (len(body), body)
            elif not more:
                body = b"0\r\n\r\n"
        if self.started:
            return body
        self.started = True
        return self._head + body


class ServerConnection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._loop = server.loop
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._client: tuple[str, int] | None = None
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._reading: Request | None = None
        """The request whose body is being read."""
        self._current: Request | None = None
        """The request that is being answered; only `_queued` comes after it."""
        self._queued: deque[Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._refused = False
        self._drain_waiter: asyncio.Future[None] | None = None
        self.full = False
        """The client does not take what we write as fast as we write it."""
        self.idle_since = server.loop.time()

    # asyncio.Protocol --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._client = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._transport = None
        self._queued.clear()
        self.resume_writing()
        if self._current is not None:
            self._current.leave()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # An offer we do not take (Java's client makes it with every request): what follows is HTTP/1.1.
            self._parser = httptools.HttpRequestParser(self)
            if rest := data[upgrade.args[0] :]:
                self.data_received(rest)
        except httptools.HttpParserError:
            too_large = self._head_bytes > _MAX_HEAD
            self._refuse(431 if too_large else 400, _TOO_LARGE if too_large else _BAD_REQUEST)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        if self._drain_waiter is not None and not self._drain_waiter.done():
            self._drain_waiter.set_result(None)

    # httptools callbacks -----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._url = b""
        self._headers = []
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """The request target, or a piece of it."""
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._headers.append((name.lower(), value))
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """The head is whole: the request can begin."""
        parser = self._parser
        version = parser.get_http_version()
        path, _, query = self._url.partition(b"?")
        if not path.startswith(b"/"):
            path = _path_of(path)
        request = Request(
            self,
            {
                "type": "http",
                "asgi": {"version": "3.0", "spec_version": "2.3"},
                "http_version": version,
                "server": self._server.address,
                "client": self._client,
                "scheme": "http",
                "method": parser.get_method().decode("ascii"),
                "root_path": self._server.root_path,
                "path": (unquote_to_bytes(path) if b"%" in path else path).decode("utf-8", "replace"),
                "raw_path": path,
                "query_string": query,
                "headers": self._headers,
            },
            parser.should_keep_alive(),
        )
        self._reading = request
        if self._current is None:
            self._start(request)
            if version == "1.1" and (b"expect", b"100-continue") in self._headers:
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        else:  # pipelined: answered in its turn
            self._queued.append(request)
            if len(self._queued) >= _MAX_PIPELINED:
                self._pause_reading()

    def on_body(self, body: bytes) -> None:
        """A piece of a request's body."""
        if self._reading is not None and not self._reading.feed(body):
            self._pause_reading()

    def on_message_complete(self) -> None:
        """A request is whole."""
        request, self._reading = self._reading, None
        if request is not None:
            request.whole()

    # for its requests --------------------------------------------------------------------------

    @property
    def stays(self) -> bool:
        """True while another request may come over it."""
        return not self._server.stopping and not self._refused

    @property
    def date(self) -> bytes:
        """The header line with the time."""
        return self._server.date

    @property
    def busy(self) -> bool:
        """True while a request is being answered."""
        return self._current is not None

    def write(self, data: bytes) -> None:
        """Write bytes, if there is anybody left."""
        if self._transport is not None and data:
            self._transport.write(data)

    async def drained(self) -> None:
        """Wait until the client took most of what was written."""
        if self._drain_waiter is None or self._drain_waiter.done():
            self._drain_waiter = self._loop.create_future()
        await self._drain_waiter

    def read_on(self) -> None:
        """The application took what had come."""
        if self._paused and self._transport is not None and len(self._queued) < _MAX_PIPELINED:
            self._paused = False
            self._transport.resume_reading()

    def answer_ended(self, request: Request) -> None:
        """The last byte of an answer was written."""
        if not request.keep_alive and self._transport is not None:
            if request.arrived:
                self._transport.close()
            else:  # closing on unread bytes would reset the connection, and the answer with it
                self._refused = True
                self._linger()

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    # inside ------------------------------------------------------------------------------------

    def _start(self, request: Request) -> None:
        self._current = request
        self._server.active += 1
        self._task = self._loop.create_task(self._run(request))

    async def _run(self, request: Request) -> None:
        try:
            await self._server.app(request.scope, request, request.send)
        except asyncio.CancelledError:
            self._abort()
            raise
        except Exception:  # noqa: BLE001 reason: a bug in the application costs one request, not the process
            _log.exception("%s %s failed", request.scope["method"], request.scope["path"])
        finally:
            self._server.active -= 1
            await self._close_answer(request)
            self._ended(request)

    async def _close_answer(self, request: Request) -> None:
        """Leave no client waiting for an answer that the application did not give."""
        if request.answered or request.gone:
            return
        if request.started:
            self._abort()
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BROKE))]
        await request.send({"type": "http.response.start", "status": 500, "headers": headers})
        await request.send({"type": "http.response.body", "body": _BROKE})

    def _ended(self, request: Request) -> None:
        if request is not self._current or (not request.arrived and not request.gone):
            return
        self._current = None
        self.idle_since = self._loop.time()
        if self._queued and request.keep_alive:
            self._start(self._queued.popleft())
        self.read_on()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > _MAX_HEAD:
            raise ValueError("request head is too large")

    def _refuse(self, status: int, body: bytes) -> None:
        """Answer what cannot be parsed, and hang up; an answer that is under way is broken off."""
        self._refused = True
        if self._current is not None:
            self._abort()
            return
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        self.write(_STATUS_LINES[status] + head + self.date + b"\r\n" + body)
        self._linger()

    def _linger(self) -> None:
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()
        self._loop.call_later(_LINGER_S, self.close)

    def _pause_reading(self) -> None:
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class HttpServer:
    """Listens, and counts what is open. Made and used in one event loop."""

    def __init__(self, app: Application, root_path: str = "", keep_alive_s: float = 75.0) -> None:
        self.app = app
        self.root_path = root_path
        self.loop = asyncio.get_running_loop()
        self.address: tuple[str, int] | None = None
        self.connections: set[ServerConnection] = set()
        self.active = 0
        """Requests whose application has not returned."""
        self.stopping = False
        self.date = b""
        self._keep_alive_s = keep_alive_s
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, listener: socket.socket) -> None:
        """Take requests from a bound socket."""
        self.address = listener.getsockname()[:2]
        self._sweep()
        self._server = await self.loop.create_server(
            lambda: ServerConnection(self), sock=listener, backlog=2048
        )

    async def stop(self, drain_s: float) -> bool:
        """Take no new requests, finish those that run; False when some had to be cut off."""
        self.stopping = True
        if self._server is not None:
            self._server.close()
        deadline = self.loop.time() + drain_s
        while True:
            for connection in [c for c in self.connections if not c.busy]:
                connection.close()
            if not self.active or self.loop.time() > deadline:
                break
            await asyncio.sleep(0.02)
        finished = not self.active
        for connection in list(self.connections):
            connection.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        return finished

    def _sweep(self) -> None:
        """Once a second, instead of a timer for each request: the date, and connections idle too long."""
        self.date = f"date: {formatdate(time.time(), usegmt=True)}\r\n\r\n".encode()
        oldest = self.loop.time() - self._keep_alive_s
        for connection in [c for c in self.connections if not c.busy and c.idle_since < oldest]:
            connection.close()
        self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)


async def serve(
    app: Application,
    listener: socket.socket,
    startup: Callable[[], Awaitable[None]],
    shutdown: Callable[[], Awaitable[None]],
    drain_s: float,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain: running requests end, then `shutdown`. A second one cuts."""
    loop = asyncio.get_running_loop()
    stop, cut = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: cut.set() if stop.is_set() else stop.set())
    await startup()
    server = HttpServer(app)
    await server.start(listener)
    await stop.wait()
    draining = asyncio.ensure_future(server.stop(drain_s))
    cutting = asyncio.ensure_future(cut.wait())
    await asyncio.wait({draining, cutting}, return_when=asyncio.FIRST_COMPLETED)
    if not (draining.done() and draining.result()):
        _log.error("%d requests were cut off", server.active)
    draining.cancel()
    cutting.cancel()
    await shutdown()


def _path_of(target: bytes) -> bytes:
    """The path of an absolute-form target; anything that is neither form leads nowhere."""
    try:
        return httptools.parse_url(target).path or b"/"
    except httptools.HttpParserInvalidURLError:
        return b""
