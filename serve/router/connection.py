"""One client's HTTP/1.1 connection: an asyncio.Protocol on httptools that turns bytes into requests.

Keep-alive, pipelining in order, bounded heads, answers to what is not HTTP. One task a request. Knows nothing
about what is served.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, cast
from urllib.parse import unquote_to_bytes

import httptools
import orjson

from contracts.logs import about
from serve.router.errors import error_body
from serve.router.guard import Receive
from serve.router.request import STATUS_LINES, Request, Send

_log = logging.getLogger("stillhouse.router")

Application = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

_MAX_PIPELINED: Final = 16
_LINGER_S: Final = 2.0
_BROKE: Final = orjson.dumps(error_body("Internal error.", "server_error"))


class Owner(Protocol):
    """The server that a connection belongs to."""

    app: Application
    loop: asyncio.AbstractEventLoop
    address: tuple[str, int] | None
    root_path: str
    max_head_bytes: int
    connections: set[ServerConnection]
    active: int
    """Requests whose application has not returned."""
    stopping: bool
    date: bytes


class ServerConnection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, server: Owner) -> None:
        self._server = server
        self._loop = server.loop
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._client: tuple[str, int] | None = None
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._in_head = False
        self._head_bytes = 0
        """Of the head being read, as the parser hands it out."""
        self._unparsed = 0
        """Bytes that came while the parser handed nothing out: the beginning of one huge line."""
        self._reading: Request | None = None
        """The request whose body is being read."""
        self._current: Request | None = None
        """The request that is being answered; only `_queued` comes after it."""
        self._queued: deque[Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._refusal: tuple[int, str] | None = None
        """Why no further request of this connection is read."""
        self._drain_waiter: asyncio.Future[None] | None = None
        self.full = False
        self.since = server.loop.time()
        """When it began to be idle, or its head began."""
        self._served = False
        self._lingering = False

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
        if self._refusal is not None:
            return
        began_in_head = self._in_head
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:  # not logged: strangers must not be able to fill a disk
            too_large = self._head_bytes > self._server.max_head_bytes
            self._refuse(*(self._too_large() if too_large else (400, "Invalid HTTP request received.")))
        else:
            if self._in_head and began_in_head:
                self._unparsed += len(data)
                if self._unparsed > self._server.max_head_bytes:
                    self._refuse(*self._too_large())

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
        self._in_head = True
        self.since = self._loop.time()
        self._head_bytes = self._unparsed = 0

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
        self._in_head = False
        parser = self._parser
        if parser.should_upgrade():
            return  # the parser stops here; see `_decline_upgrade`
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
        return not self._server.stopping and self._refusal is None

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
        if request.keep_alive or self._transport is None:
            return
        if request.arrived:
            self._transport.close()
        else:
            self._refusal = self._refusal or (400, "")
            self._linger()

    def late(self, oldest_idle: float, oldest_head: float) -> None:
        """Close what is idle too long, refuse a head that does not arrive."""
        if self._current is not None or self._refusal is not None:
            return
        if self._in_head and self.since < oldest_head:
            self._refuse(408, "The request's head did not arrive in time.")
        elif self.since < (oldest_idle if self._served else oldest_head):
            self.close()

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
            given = dict(request.scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
            what = (request.scope["method"], request.scope["path"])
            _log.exception("%s %s failed", *what, extra=about(given or None))
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
        self._served = True
        self.since = self._loop.time()
        if self._queued and request.keep_alive:
            self._start(self._queued.popleft())
        elif self._refusal is not None:
            self._say_refusal(*self._refusal)
        self.read_on()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        self._unparsed = 0
        if self._head_bytes > self._server.max_head_bytes:
            raise ValueError("request head is too large")

    def _too_large(self) -> tuple[int, str]:
        return 431, f"The request's head is larger than {self._server.max_head_bytes} bytes."

    def _decline_upgrade(self, rest: bytes) -> None:
        """Serve a request that offers another protocol (Java's client offers HTTP/2) as if it had not.

        The parser took the body for the other protocol, so the request is parsed again without the offer.
        """
        method = self._parser.get_method()
        self._parser = httptools.HttpRequestParser(self)
        if method == b"CONNECT":
            self._refuse(400, "Invalid HTTP request received.")
            return
        lines = [n + b": " + v for n, v in self._headers if n not in (b"upgrade", b"connection")]
        self.data_received(b"\r\n".join([method + b" " + self._url + b" HTTP/1.1", *lines, b"", b""]) + rest)

    def _refuse(self, status: int, why: str) -> None:
        """Take no more requests. It is said at once, or after the answers that are under way."""
        self._refusal = (status, why)
        broken, self._reading = self._reading, None
        if broken is not None and broken is not self._current:
            self._queued.remove(broken)  # its turn has not come, and it will never be whole
        elif broken is not None:
            if not broken.started:
                self._say_refusal(status, why)
            else:
                self._abort()
            broken.leave()
        elif self._current is None:
            self._say_refusal(status, why)

    def _say_refusal(self, status: int, why: str) -> None:
        if self._lingering:
            return
        body = orjson.dumps(error_body(why, "invalid_request_error"))
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        self.write(STATUS_LINES[status] + head + self.date + body)
        self._linger()

    def _linger(self) -> None:
        """Close, but read on for a moment: closing on unread bytes would take back what was written."""
        self._lingering = True
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


def _path_of(target: bytes) -> bytes:
    """The path of an absolute-form target; anything that is neither form leads nowhere."""
    try:
        return httptools.parse_url(target).path or b"/"
    except httptools.HttpParserInvalidURLError:
        return b""
