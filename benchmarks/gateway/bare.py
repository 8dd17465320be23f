"""The bare proxy of the gateway benchmark: bytes in, bytes out, nothing on. What Python and a server cost.

Run alone: uvicorn on uvloop and httptools, aiohttp's client. Knows nothing of routes, logs or metrics.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import aiohttp


class BareProxy:
    """An ASGI application that passes POST bodies on to BARE_BACKEND."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
            return
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), auto_decompress=False
            )
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        url = self._backend + scope["path"].removeprefix(scope.get("root_path", ""))
        async with self._session.request(
            scope["method"], url, data=body, headers={"content-type": "application/json"}
        ) as reply:
            kind = reply.headers.get("content-type", "application/json").encode()
            await send(
                {"type": "http.response.start", "status": reply.status, "headers": [(b"content-type", kind)]}
            )
            async for chunk in reply.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class BareReplica:
    """The same as a Ray Serve deployment."""

    def __serve_build_asgi_app__(self) -> Any:
        return BareProxy(os.environ["BARE_BACKEND"])


def main() -> None:
    """Serve; the URL is printed."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(f"bare proxy listens on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    app = BareProxy(os.environ["BARE_BACKEND"])
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="none", access_log=False, log_level="critical"
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
