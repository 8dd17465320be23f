"""The door of the admin API: an admin key for everything, before a byte of the body is read.

Knows nothing about what is behind it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable

from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracts.errors import ConfigError
from contracts.keys import ApiKey
from serve.admin.errors import reply
from serve.router.keys import secret_of
from serve.state.keys import digest_of

MAX_BODY_BYTES = 2**20
HEALTH = "/health"
_LOCAL_HOSTS = frozenset(("127.0.0.1", "localhost", "::1"))

_TOO_LARGE = f"The body is larger than {MAX_BODY_BYTES} bytes."

HeaderList = list[tuple[bytes, bytes]]
Refusal = JSONResponse | None
Find = Callable[[str], ApiKey | None]


class AdminOnly:
    """ASGI middleware. `find`: digest → key; None only on loopback, for `--insecure`."""

    def __init__(self, app: ASGIApp, find: Find | None, open_paths: frozenset[str]) -> None:
        self._app = app
        self._find = find
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http" or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        refusal = await self._refusal(scope, headers) if self._find else _not_local(headers)
        refusal = refusal or _declared_too_large(headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)

    async def _refusal(self, scope: Scope, headers: HeaderList) -> Refusal:
        assert self._find is not None
        secret = secret_of(headers)
        if secret is None:
            return reply(
                401, "The admin API needs an admin key: 'Authorization: Bearer KEY'.", "invalid_api_key"
            )
        try:
            key = await asyncio.to_thread(self._find, digest_of(secret))
        except SQLAlchemyError:
            return reply(503, "The state store cannot be reached at the moment.", "state_unavailable")
        expired = key is not None and key.expires_at is not None and time.time() >= key.expires_at
        if key is None or key.disabled or expired:
            return reply(401, "This API key is unknown, disabled or expired.", "invalid_api_key")
        if not key.admin:
            return reply(403, "This API key is not an admin key.", "not_admin")
        scope.setdefault("state", {})["admin"] = key.id
        return None


def check_insecure(host: str) -> None:
    """Raises: ConfigError unless only this machine can reach the host."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise ConfigError(
            f"--insecure lets everybody in who reaches {host!r}; it works on a loopback address only. "
            "Leave it out and make an admin key: stillhouse keys create NAME --admin."
        )


def _not_local(headers: HeaderList) -> Refusal:
    """Without keys, a browser's page from elsewhere must not get in by pointing its name at this machine."""
    host = dict(headers).get(b"host", b"").decode("latin-1")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name in _LOCAL_HOSTS:
        return None
    return reply(403, "Started with --insecure: ask for localhost or 127.0.0.1.", "not_local")


def _declared_too_large(headers: HeaderList) -> Refusal:
    declared = dict(headers).get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) <= MAX_BODY_BYTES:
        return None
    return reply(413, _TOO_LARGE, "too_large")


def _bounded(receive: Receive) -> Callable[[], Awaitable[Message]]:
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return bounded
