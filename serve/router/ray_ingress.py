"""Puts the router's own HTTP server behind Ray Serve's HAProxy, instead of the one Ray starts in a replica.

Ray wraps every request of a replica in uvicorn, two tasks, a queue and its own accounting, which together
cost more than routing it. Here Ray still chooses the port, tells HAProxy of it, asks for health and drains;
only the bytes go straight to the router. This is the one place that touches Ray's private names: where they
are not as expected the replica is served by Ray's own server, slower and otherwise the same. Knows nothing
about routes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

from serve.router.connection import Application
from serve.router.guard import Receive
from serve.router.request import Send
from serve.router.server import Bounds, HttpServer

_log = logging.getLogger("stillhouse.router")
_RAYS_OWN = "/-/"
"""Paths that Ray answers: health and routes."""


def serve_directly(app: Application, bounds: Bounds, listens: Callable[[str], None]) -> bool:
    """Have the replica of this process answer by `app` directly; False when this Ray cannot.

    To be called in the replica, before Ray starts its HTTP server. `listens` hears at which host:port.
    """
    from ray.serve._private import replica

    original = getattr(replica, "start_asgi_http_server", None)
    if original is None:
        _log.warning("this version of Ray starts its HTTP servers in another way; the router runs behind it")
        return False

    async def start(
        rays_app: Any, options: Any, *, event_loop: asyncio.AbstractEventLoop, **more: Any
    ) -> tuple[asyncio.Task[None], Any]:
        if _needs_ray(rays_app, options, event_loop):
            started: tuple[asyncio.Task[None], Any] = await original(
                rays_app, options, event_loop=event_loop, **more
            )
            return started
        server = DirectServer(app, rays_app, options.root_path or "", bounds)
        await server.start(str(options.host), int(options.port))
        listens(_reachable(str(options.host), int(options.port)))
        return event_loop.create_task(server.run()), server

    replica.start_asgi_http_server = start
    return True


def _needs_ray(rays_app: Any, options: Any, event_loop: asyncio.AbstractEventLoop) -> bool:
    """True for what only Ray's own server does: TLS, middlewares, a path prefix, another event loop."""
    prefix = getattr(getattr(rays_app, "__self__", None), "_route_prefix", None)
    return bool(
        prefix not in (None, "", "/")
        or options.ssl_certfile
        or not hasattr(rays_app, "__self__")
        or event_loop is not asyncio.get_running_loop()
    )


def _reachable(host: str, port: int) -> str:
    """Where a process of this machine connects to."""
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class DirectServer:
    """What Ray holds in the place of its uvicorn server: it sets `should_exit`, and awaits the task."""

    def __init__(self, app: Application, rays_app: Application, root_path: str, bounds: Bounds) -> None:
        self._app = app
        self._rays_app = rays_app
        self._exit = asyncio.Event()
        self._server = HttpServer(self._answer, root_path, bounds)

    @property
    def should_exit(self) -> bool:
        """True once Ray wants it to end."""
        return self._exit.is_set()

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value:
            self._exit.set()

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises RuntimeError from OSError, by which Ray knows to try another port."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            await self._server.start(listener)
        except OSError as err:
            listener.close()
            raise RuntimeError(f"Failed to bind to address '{host}:{port}'.") from err

    async def run(self) -> None:
        """Until Ray says so, then until the last request has its answer; Ray bounds that time."""
        try:
            await self._exit.wait()
        finally:
            await self._server.stop(float("inf") if self._exit.is_set() else 0.0)

    async def _answer(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        app = self._rays_app if scope["path"].startswith(_RAYS_OWN) else self._app
        await app(scope, receive, send)
