"""A fake OpenAI-compatible upstream: instant, scriptable, and honest about usage. For tests and benchmarks.

Speaks what a vLLM server speaks on the paths the router uses. Behaviour is set by the constructor and can be
changed while it runs with POST /control. Knows nothing about models.

    python -m serve.engine.fake --port 8100 --text "hello" --tokens 8
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_PROMPT_TOKENS = 7


@dataclass
class Behaviour:
    """What the fake does. All of it can be changed while it runs."""

    text: str = "tick "
    """One token's text."""
    tokens: int = 8
    model: str = "fake"
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    status: int = 200
    """Not 200: answer every generation with this error."""
    fail_every: int = 0
    """Every n-th generation answers 500."""
    cut_after: int = -1
    """Break a stream off after this many tokens, without ending it; -1 never."""
    error_after: int = -1
    """Send an error event after this many tokens; -1 never."""
    hang: bool = False
    """Accept requests and never answer."""
    healthy: bool = True
    usage_when_asked: bool = True


class FakeEngine:
    """An ASGI application."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.requests = 0
        self.cancelled = 0
        """Streams whose client went away before their end."""
        self.running = 0
        self.last: dict[str, Any] = {}
        """Path, headers and body of the last generation."""

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        path = scope["path"]
        body = await _body(receive) if scope["method"] == "POST" else {}
        if path == "/health":
            await _json(send, 200 if self.behaviour.healthy else 503, {})
        elif path == "/v1/models":
            await _json(
                send, 200, {"object": "list", "data": [{"id": self.behaviour.model, "object": "model"}]}
            )
        elif path == "/control":
            self.behaviour = dataclasses.replace(self.behaviour, **body)
            await _json(send, 200, self._status())
        elif path == "/status":
            await _json(send, 200, self._status())
        elif path in ("/v1/chat/completions", "/v1/completions"):
            await self._generate(scope, body, receive, send)
        elif path == "/tokenize":
            await _json(send, 200, {"tokens": [1, 2, 3], "count": 3, "max_model_len": 512})
        elif path == "/v1/embeddings":
            usage = {"prompt_tokens": _PROMPT_TOKENS, "total_tokens": _PROMPT_TOKENS}
            vectors = [{"object": "embedding", "index": 0, "embedding": [0.0, 1.0]}]
            await _json(
                send, 200, {"object": "list", "data": vectors, "model": body.get("model"), "usage": usage}
            )
        else:
            await _json(send, 404, _error("Not Found", 404))

    def _status(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "cancelled": self.cancelled,
            "running": self.running,
            "pid": os.getpid(),
            "last": self.last,
            "behaviour": dataclasses.asdict(self.behaviour),
        }

    async def _generate(
        self, scope: dict[str, Any], body: dict[str, Any], receive: Receive, send: Send
    ) -> None:
        self.requests += 1
        self.running += 1
        headers = {n.decode("latin-1"): v.decode("latin-1") for n, v in scope["headers"]}
        self.last = {"path": scope["path"], "headers": headers, "body": body}
        work = asyncio.ensure_future(self._answer(scope["path"], body, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.cancelled += 1
                work.cancel()
            else:
                work.result()
        finally:
            self.running -= 1
            work.cancel()
            gone.cancel()

    async def _answer(self, path: str, body: dict[str, Any], send: Send) -> None:
        b = self.behaviour
        if b.hang:
            await asyncio.sleep(3600)
        if b.ttft_s:
            await asyncio.sleep(b.ttft_s)
        if b.status != 200:
            await _json(send, b.status, _error(f"scripted {b.status}", b.status))
        elif b.fail_every and self.requests % b.fail_every == 0:
            await _json(send, 500, _error("scripted failure", 500))
        elif body.get("stream"):
            await self._stream(path == "/v1/chat/completions", body, send)
        else:
            await self._whole(path == "/v1/chat/completions", body, send)

    async def _whole(self, chat: bool, body: dict[str, Any], send: Send) -> None:
        b = self.behaviour
        if b.tpot_s:
            await asyncio.sleep(b.tpot_s * b.tokens)
        text = b.text * b.tokens
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, "finish_reason": "stop", **said}
        kind = "chat.completion" if chat else "text_completion"
        await _json(send, 200, {**_head(body, kind), "choices": [choice], "usage": _usage(b.tokens)})

    async def _stream(self, chat: bool, body: dict[str, Any], send: Send) -> None:
        b = self.behaviour
        head = _head(body, "chat.completion.chunk" if chat else "text_completion")
        kind = b"text/event-stream; charset=utf-8"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if chat and b.error_after != 0:  # 0: break before the first event, in time for a fallback
            await _event(send, {**head, "choices": [_delta(chat, "", None)]})
        for at in range(b.tokens):
            if at == b.cut_after:
                raise ConnectionAbortedError("scripted cut")  # the server closes without the last chunk
            if at == b.error_after:
                await _event(send, _error("scripted error", 500))
                break
            if at and b.tpot_s:
                await asyncio.sleep(b.tpot_s)
            await _event(
                send, {**head, "choices": [_delta(chat, b.text, None if at + 1 < b.tokens else "stop")]}
            )
        if b.usage_when_asked and (body.get("stream_options") or {}).get("include_usage"):
            await _event(send, {**head, "choices": [], "usage": _usage(b.tokens)})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "fake-1", "object": kind, "created": 1, "model": body.get("model")}


def _delta(chat: bool, text: str, finish: str | None) -> dict[str, Any]:
    said = (
        {"delta": {"role": "assistant", "content": text} if not text else {"content": text}}
        if chat
        else {"text": text}
    )
    return {"index": 0, **said, "finish_reason": finish}


def _usage(tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": _PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": _PROMPT_TOKENS + tokens,
    }


def _error(message: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "fake_error", "param": None, "code": code}}


async def _event(send: Send, body: dict[str, Any]) -> None:
    data = b"data: " + orjson.dumps(body) + b"\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _json(send: Send, status: int, body: dict[str, Any]) -> None:
    data = orjson.dumps(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


async def _body(receive: Receive) -> dict[str, Any]:
    data = b""
    while True:
        message = await receive()
        data += message.get("body", b"")
        if not message.get("more_body"):
            break
    parsed = orjson.loads(data) if data else {}
    return parsed if isinstance(parsed, dict) else {}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    for stage in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{stage}.complete"})


def main() -> None:
    """Serve a fake engine; the port is printed."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m serve.engine.fake")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    for field in dataclasses.fields(Behaviour):
        if field.type in ("str", "int", "float"):
            kind = {"str": str, "int": int, "float": float}[str(field.type)]
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    args = vars(parser.parse_args())
    host, port = args.pop("host"), args.pop("port")
    listener = socket.create_server((host, port), backlog=2048)
    print(f"fake engine listens on http://{host}:{listener.getsockname()[1]}", flush=True)
    app = FakeEngine(Behaviour(**args))
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="none", access_log=False, log_level="critical"
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
