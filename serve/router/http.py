"""The router's side of HTTP/1.1 when it listens itself: uvicorn's protocol with bounds and better manners.

Bounds the head of a request in bytes and in seconds, answers what is not HTTP in OpenAI's error shape, and
never writes into an answer that is under way. Knows nothing about routes.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

import httptools
import orjson
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from serve.router.errors import error_body


class HeadTooLarge(ValueError):
    """Raised inside the parser's callbacks to stop it."""


class BoundedHttp(HttpToolsProtocol):
    """One connection of a client."""

    max_header_bytes: ClassVar[int] = 32 * 1024
    """For the request line and all headers together."""
    header_s: ClassVar[float] = 30.0
    """For a client to send its first head, or to finish one that it began."""

    _in_head = False
    _head_bytes = 0
    """Of the head being read, as the parser hands it out."""
    _unparsed = 0
    """Bytes that came while the parser handed nothing out: the beginning of one huge line."""
    _too_large = False
    _upgrading = False
    _timer: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connects; it has to say something."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: tell the request that is being answered, not only the last one that came."""
        self._disarm()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head or a body."""
        began_in_head = self._in_head
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:  # not logged: strangers must not be able to fill a disk
            self.send_400_response("")
            return
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
            return
        if self._in_head:
            self._unparsed += len(data) if began_in_head else 0
            if self._unparsed > self.max_header_bytes and not self.transport.is_closing():
                self._too_large = True
                self.send_400_response("")
        if self.cycle is None or self.cycle.response_complete:
            self._arm()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = True
        self._head_bytes = self._unparsed = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        self._disarm()
        self._upgrading = self.parser.should_upgrade()
        if not self._upgrading:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole."""
        if not self._upgrading:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP, or too much of it: say so once the answers under way are finished."""
        cycle = self.cycle
        if self.pipeline and cycle.more_body:
            # Its body is broken, but its turn to be answered has not come: it will be refused as empty.
            cycle.body, cycle.more_body = bytearray(), False
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            cycle.keep_alive = False
            self.flow.pause_reading()
            return
        if self._too_large:
            what = f"The request's head is larger than {self.max_header_bytes} bytes."
            self._refuse(431, what)
        else:
            self._refuse(400, msg or "Invalid HTTP request received.")

    def _decline_upgrade(self, rest: bytes) -> None:
        """Serve a request that offers another protocol (Java's client offers HTTP/2) as if it had not.

        The parser took the body for the other protocol, so the request is parsed again without the offer.
        """
        method = self.parser.get_method()
        self.parser = httptools.HttpRequestParser(self)
        if method == b"CONNECT":
            self.send_400_response("")
            return
        lines = [n + b": " + v for n, v in self.headers if n not in (b"upgrade", b"connection")]
        self.data_received(b"\r\n".join([method + b" " + self.url + b" HTTP/1.1", *lines, b"", b""]) + rest)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        self._unparsed = 0
        if self._head_bytes > self.max_header_bytes:
            self._too_large = True
            raise HeadTooLarge

    def _refuse(self, status: int, message: str) -> None:
        body = orjson.dumps(error_body(message, "invalid_request_error"))
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(
            body
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _arm(self) -> None:
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self.header_s, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._in_head:
            self._refuse(408, "The request's head did not arrive in time.")
        else:
            self.transport.close()


def bounded_http(max_header_bytes: int, header_s: float) -> type[BoundedHttp]:
    """The protocol with these bounds."""
    bounds = {"max_header_bytes": max_header_bytes, "header_s": header_s}
    return type("BoundedHttp", (BoundedHttp,), bounds)
