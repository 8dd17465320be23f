"""Small whole replies of the router's own. Knows nothing about why they are sent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from serve.router.relay import Send


async def send_json(
    send: Send,
    status: int,
    body: dict[str, Any] | list[Any] | bytes,
    request_id: str | None = None,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Send one JSON reply."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    await send_bytes(send, status, b"application/json", data, request_id, headers)


async def send_bytes(
    send: Send,
    status: int,
    content_type: bytes,
    body: bytes,
    request_id: str | None = None,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Send one reply of any type."""
    lines = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers]
    if request_id is not None:
        lines.append((b"x-request-id", request_id.encode()))
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
