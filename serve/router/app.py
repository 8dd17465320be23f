"""The router as one raw ASGI application: what is served where, and the life of its parts.

No web framework, because everything here is either five fixed paths or bytes passed through. Knows nothing
about how it is hosted.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from contracts.errors import ConfigError
from serve.request_log import RequestLog, SegmentWriter, recover
from serve.request_log.log import Grader
from serve.router.client import HttpClient
from serve.router.config import RouterConfig
from serve.router.errors import error_body
from serve.router.guard import Receive
from serve.router.ledger import Ledger
from serve.router.metrics import CONTENT_TYPE, OTHER, Metrics
from serve.router.pool import Pools
from serve.router.proxy import Proxy
from serve.router.readiness import Readiness
from serve.router.relay import Send
from serve.router.replies import send_bytes, send_json
from serve.router.sync import StateSync
from serve.router.table import RouteTable
from serve.router.verdicts import Verdicts

_log = logging.getLogger("stillhouse.router")

ROUTED = frozenset(
    (
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings",
        "/v1/score", "/v1/rerank", "/rerank", "/score", "/pooling", "/classify", "/tokenize", "/detokenize",
    )
)  # fmt: skip
"""Paths passed to upstreams: a fixed list, so that no client can reach an upstream's other doors."""
_LOCAL = ("/v1/models", "/health", "/ready", "/metrics")
_SWITCH_INTERVAL_S = 0.0001


class RouterApp:
    """One router process. Its parts live between the lifespan's startup and shutdown."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.replica = replica_name()
        self._grader = load_grader(config.grader) if config.grader is not None else None
        self._draining = False
        self._proxy: Proxy | None = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            raise ConfigError(f"the router speaks HTTP, not {scope['type']}")

    # HTTP ------------------------------------------------------------------------------------------

    async def _http(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        path = _path(scope)
        if self._proxy is None:
            await send_json(send, 503, error_body("The router is not started.", "server_error"))
        elif path in ROUTED and scope["method"] == "POST":
            await self._proxy.handle(scope, receive, send, path)
        elif scope["method"] in ("GET", "HEAD") and (path in _LOCAL or path.startswith("/v1/models/")):
            await self._local(path, send)
        else:
            known = path in ROUTED or path in _LOCAL
            status = 405 if known else 404
            what = f"{scope['method']} is not allowed here." if known else "There is nothing at this path."
            self._metrics.refused(status, path if known else OTHER)
            await send_json(send, status, error_body(what, "invalid_request_error", "not_found"))

    async def _local(self, path: str, send: Send) -> None:
        if path == "/metrics":
            if self._request_log is not None:
                self._metrics.log_queue.set(len(self._request_log))
            await send_bytes(send, 200, CONTENT_TYPE, await self._metrics.scrape())
        elif path == "/health":
            await send_json(send, 200, {"status": "ok", "replica": self.replica})
        elif path == "/ready":
            missing = ["the router is draining"] if self._draining else await self._readiness.missing()
            status = "ready" if not missing else "not ready"
            await send_json(send, 503 if missing else 200, {"status": status, "missing": missing})
        elif path == "/v1/models":
            models = [_model(name) for name in self._table.names()]
            await send_json(send, 200, {"object": "list", "data": models})
        else:
            name = path.removeprefix("/v1/models/")
            if self._table.get(name) is None:
                why = f"The model {name[:128]!r} does not exist."
                await send_json(
                    send, 404, error_body(why, "invalid_request_error", "model_not_found", "model")
                )
            else:
                await send_json(send, 200, _model(name))

    # life ------------------------------------------------------------------------------------------

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.startup()
        except Exception as err:  # reason: the server must hear of it in its own protocol, then it is raised
            await send({"type": "lifespan.startup.failed", "message": str(err)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.shutdown()
        await send({"type": "lifespan.shutdown.complete"})

    async def startup(self) -> None:
        """Make the parts, look at the state store once, and take requests."""
        # The log's threads share the interpreter with the event loop; let it have it back quickly.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        config = self.config
        self._metrics = Metrics()
        self._table = RouteTable(self._metrics)
        self._pools = Pools(config.eject_s, config.endpoint_max_age_s)
        self._client = HttpClient(config.timeouts.connect_s)
        self._ledger = Ledger(self.replica)
        self._request_log = await self._open_log()
        self._sync = StateSync(config, self.replica, self._table, self._pools, self._ledger, self._metrics)
        self._readiness = Readiness(config.routes, self._table, self._pools, self._client)
        await self._sync.start()
        gc.collect()
        gc.freeze()  # what is here stays; not walking it again keeps collections off the slowest percent
        self._proxy = Proxy(
            config, self._table, self._pools, self._client, self._metrics, self._ledger, self._request_log
        )
        _log.info("router %s started with routes %s", self.replica, self._table.names())

    async def shutdown(self) -> None:
        """Finish what is running, then store all evidence and rows."""
        self._draining = True
        assert self._proxy is not None
        deadline = time.monotonic() + self.config.drain_s
        while self._proxy.active and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._proxy.active:
            _log.error("router %s leaves with %d requests running", self.replica, self._proxy.active)
        if self._request_log is not None and not await asyncio.to_thread(self._request_log.close):
            _log.error("router %s leaves with %d log rows unwritten", self.replica, len(self._request_log))
        await self._sync.stop()  # after the log: the last grades are evidence too
        self._client.close()
        self._metrics.batch.flush()
        _log.info("router %s stopped", self.replica)

    async def _open_log(self) -> RequestLog | None:
        log = self.config.log
        if log is None:
            return None
        folder = Path(log.dir)
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        await asyncio.to_thread(recover, folder, self.replica.rsplit("-", 2)[0])
        writer = SegmentWriter(folder, self.replica, log.rotate_bytes, log.rotate_s)
        hooks = Verdicts(self._metrics, self._ledger)
        request_log = RequestLog(writer, hooks, log.queue_rows, self._grader)
        request_log.start()
        return request_log


def create_app(config: RouterConfig) -> RouterApp:
    """The ASGI application of one router process."""
    return RouterApp(config)


def replica_name() -> str:
    """host-pid-random: unique for every start of every process."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64] or "host"
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def load_grader(spec: str) -> Grader:
    """Import 'module:function'. Raises ConfigError."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as err:
        raise ConfigError(f"grader {spec!r} cannot be imported: {err}") from err
    if not callable(found):
        raise ConfigError(f"grader {spec!r} is not a function")
    return cast(Callable[[dict[str, Any], str], bool | None], found)


def _path(scope: dict[str, Any]) -> str:
    """The path below where the application is mounted."""
    path, root = cast(str, scope["path"]), cast(str, scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "stillhouse"}
