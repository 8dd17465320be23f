"""One HTTP request that is being answered: what the application receives of it, and what it sends.

The two sides of ASGI over one connection. Knows nothing about parsing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final, Protocol

from serve.router.guard import Source

Send = Callable[[dict[str, Any]], Awaitable[None]]

MAX_UNREAD: Final = 64 * 1024
"""Body bytes kept for an application that does not ask for them yet."""
STATUS_LINES: Final = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
_BODILESS: Final = frozenset((204, 304))


class Wire(Protocol):
    """The connection a request came over."""

    full: bool
    """The client does not take what we write as fast as we write it."""

    @property
    def stays(self) -> bool:
        """True while another request may come over it."""
        ...

    @property
    def date(self) -> bytes:
        """The header line with the time, and the end of the head."""
        ...

    def write(self, data: bytes) -> None:
        """Write bytes, if there is anybody left."""
        ...

    async def drained(self) -> None:
        """Wait until the client took most of what was written."""
        ...

    def read_on(self) -> None:
        """The application took what had come."""
        ...

    def answer_ended(self, request: Request) -> None:
        """The last byte of an answer was written."""
        ...


class Request(Source):
    """One request and its answer: the application calls it to receive, and its `send` to answer."""

    __slots__ = (
        "_chunked", "_close", "_connection", "_content", "_head", "_on_disconnect", "_parts", "_unread",
        "_waiter", "answered", "arrived", "gone", "keep_alive", "scope", "started",
    )  # fmt: skip

    def __init__(self, connection: Wire, scope: dict[str, Any], keep_alive: bool) -> None:
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
        return self._unread <= MAX_UNREAD

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

    def write(self, body: bytes) -> bool:
        """As `send` with more to come, without a task to wait in."""
        if self.gone or self.answered:
            return True
        self._connection.write(self._framed(body, True))
        return not self._connection.full

    async def drained(self) -> None:
        """Wait until the client took most of what was written."""
        if self._connection.full and not self.gone:
            await self._connection.drained()

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        lines = [STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status]
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
