"""The HTTP/1.1 server of the router: listens, counts what is open, drains.

uvicorn is a fine server, but it was the largest single cost on a request's path; this one does what a router
behind a load balancer needs and no more: no TLS, no WebSocket, no HTTP/2. Knows nothing about what is served.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Final, NamedTuple

from serve.router.config import RouterConfig
from serve.router.connection import Application, ServerConnection

_log = logging.getLogger("stillhouse.router")

_SWEEP_S: Final = 1.0


class Bounds(NamedTuple):
    """What a client may take of a connection."""

    keep_alive_s: float = 75.0
    """How long a connection may be idle between two requests."""
    head_s: float = 30.0
    """For a client to send its first head, or to finish one."""
    max_head_bytes: int = 32 * 1024
    """Of request line and headers together."""


def bounds_of(config: RouterConfig) -> Bounds:
    """As the router's configuration has them."""
    return Bounds(head_s=config.timeouts.header_s, max_head_bytes=config.max_header_bytes)


class HttpServer:
    """Listens, and counts what is open. Made and used in one event loop."""

    def __init__(self, app: Application, root_path: str = "", bounds: Bounds | None = None) -> None:
        bounds = bounds or Bounds()
        self.app = app
        self.root_path = root_path
        self.max_head_bytes = bounds.max_head_bytes
        self.loop = asyncio.get_running_loop()
        self.address: tuple[str, int] | None = None
        self.connections: set[ServerConnection] = set()
        self.active = 0
        """Requests whose application has not returned."""
        self.stopping = False
        self.date = b""
        self._keep_alive_s = bounds.keep_alive_s
        self._head_s = bounds.head_s
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
        now = self.loop.time()
        for connection in list(self.connections):
            connection.late(now - self._keep_alive_s, now - self._head_s)
        self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)


async def serve(
    app: Application,
    listener: socket.socket,
    startup: Callable[[], Awaitable[None]],
    shutdown: Callable[[], Awaitable[None]],
    bounds: Bounds,
    drain_s: float,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain: running requests end, then `shutdown`. A second one cuts."""
    loop = asyncio.get_running_loop()
    stop, cut = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: cut.set() if stop.is_set() else stop.set())
    await startup()
    server = HttpServer(app, bounds=bounds)
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
