"""HTTP written by hand over a socket, for requests that no client library would send."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Reply(NamedTuple):
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def closes(self) -> bool:
        """The server will say nothing more on this connection."""
        return self.headers.get("connection", "").lower() == "close"


class Wire:
    """One connection. Whatever does not come within the patience is a hang."""

    PATIENCE_S = 30.0

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> Wire:
        """Connect to a server's URL."""
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port, limit=2**20))

    def write(self, data: bytes) -> None:
        """Send bytes, whatever they are."""
        self._writer.write(data)

    def finish(self) -> None:
        """Say that nothing more will come (half-close), if anybody still listens."""
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    async def reply(self) -> Reply | None:
        """The next answer, None when the server hung up. Raises: TimeoutError when it does neither."""
        async with asyncio.timeout(self.PATIENCE_S):
            try:
                head = await self._reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as err:
                if err.partial:
                    raise AssertionError(f"half an answer: {err.partial[:200]!r}") from err
                return None
            except ConnectionError:
                return None
            first, *lines = head[:-4].decode("latin-1").split("\r\n")
            headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
            return Reply(int(first.split(" ")[1]), headers, await self._body(headers))

    def close(self) -> None:
        """Hang up."""
        self._writer.close()

    def abort(self) -> None:
        """Hang up with a reset."""
        self._writer.transport.abort()

    async def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await self._reader.readexactly(int(headers.get("content-length", "0")))
        parts = []
        while size := int(await self._reader.readline(), 16):
            parts.append(await self._reader.readexactly(size))
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)
        return b"".join(parts)


def request(body: bytes, path: str = "/v1/chat/completions", method: str = "POST", *headers: str) -> bytes:
    """The bytes of a well-framed request."""
    lines = [f"{method} {path} HTTP/1.1", "host: router", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


def chat(token: str, **more: Any) -> bytes:
    """The body of a chat that the fake engine sends back, with a token that nobody else uses."""
    messages = [{"role": "user", "content": token}]
    return json.dumps({"model": "support", "messages": messages, "echo": True, **more}).encode()
