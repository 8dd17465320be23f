"""The instant upstream of the gateway benchmark: OpenAI's answers at once, from a process of its own.

Prints the URL it listens on. A stream is 34 chunks (a role, 32 tokens, a finish) with nothing between, then
usage when it was asked for, then `[DONE]`. Answers are made beforehand and each is one write, because a
backend as heavy as a gateway would be what is measured. Knows nothing about who asks.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, cast

import httptools
import uvloop

TOKENS = 32
TEXT = "tick "
_USAGE = {"prompt_tokens": 7, "completion_tokens": TOKENS, "total_tokens": 7 + TOKENS}
_MODELS = {"object": "list", "data": [{"id": name, "object": "model"} for name in ("bench", "bench-next")]}


def _head(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-bench", "object": kind, "created": 1, "model": "bench"}


def _chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {**_head("chat.completion.chunk"), "choices": [choice]}


def _event(data: bytes) -> bytes:
    line = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(line), line)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _reply(value: Any, status: bytes = b"200 OK") -> bytes:
    body = _json(value)
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status, len(body), body
    )  # fmt: skip


_MESSAGE = {"role": "assistant", "content": TEXT * TOKENS}
WHOLE = _reply(
    {
        **_head("chat.completion"),
        "choices": [{"index": 0, "message": _MESSAGE, "finish_reason": "stop"}],
        "usage": _USAGE,
    }
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_CHUNKS = b"".join(
    _event(_json(chunk))
    for chunk in (
        _chunk({"role": "assistant", "content": ""}),
        *[_chunk({"content": TEXT})] * TOKENS,
        _chunk({}, "stop"),
    )
)
_USAGE_CHUNK = _event(_json({**_head("chat.completion.chunk"), "choices": [], "usage": _USAGE}))
_DONE = _event(b"[DONE]") + b"0\r\n\r\n"
STREAM = _STREAM_HEAD + _CHUNKS + _DONE
STREAM_WITH_USAGE = _STREAM_HEAD + _CHUNKS + _USAGE_CHUNK + _DONE


class Backend(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        """The path."""
        self._url = url

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer."""
        url, body = self._url, self._body
        self._body = b""
        write = self._transport.write
        if not url.endswith(b"/chat/completions"):
            # What gateways ask before they send traffic: health, models and whatever else.
            write(_reply(_MODELS if url.endswith(b"/models") else {"status": "ok"}))
            return
        request = json.loads(body)
        if not request.get("stream"):
            write(WHOLE)
            return
        asked = (request.get("stream_options") or {}).get("include_usage")
        write(STREAM_WITH_USAGE if asked else STREAM)


async def _serve() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = await asyncio.get_running_loop().create_server(Backend, sock=listener, backlog=2048)
    print(f"backend listens on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
