"""A fake OpenAI-compatible upstream: instant, scriptable, and honest about usage. For tests and benchmarks.

Serves what a vLLM server serves on the paths the router uses; what it says there is in fake_apis.py.
Behaviour is set by the constructor and can be changed while it runs with POST /control. Knows nothing about
models.

    python -m serve.engine.fake --port 8100 --text "hello" --tokens 8
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from serve.engine.fake_apis import APIS, PROMPT_TOKENS, Api, Behaviour, Speech, error_of

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


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
        elif path in APIS:
            await self._generate(scope, body, receive, send)
        elif path == "/v1/messages/count_tokens":
            await _json(send, 200, {"input_tokens": PROMPT_TOKENS})
        elif path == "/tokenize":
            await _json(send, 200, {"tokens": [1, 2, 3], "count": 3, "max_model_len": 512})
        elif path == "/v1/embeddings":
            usage = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS}
            vectors = [{"object": "embedding", "index": 0, "embedding": [0.0, 1.0]}]
            await _json(
                send, 200, {"object": "list", "data": vectors, "model": body.get("model"), "usage": usage}
            )
        else:
            await _json(send, 404, error_of("Not Found", 404))

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
        api = APIS[path]
        if b.hang:
            await asyncio.sleep(3600)
        if b.ttft_s:
            await asyncio.sleep(b.ttft_s)
        if b.status != 200:
            await _json(send, b.status, api.error(f"scripted {b.status}", b.status))
        elif b.fail_every and self.requests % b.fail_every == 0:
            await _json(send, 500, api.error("scripted failure", 500))
        else:
            try:
                said = api.stream(body, b) if body.get("stream") else api.whole(body, b)
            except (TypeError, ValueError, AttributeError, KeyError) as err:
                await _json(send, 400, api.error(f"wrong type: {err}", 400))
                return
            if isinstance(said, Speech):
                await self._stream(api, said, send)
                return
            if b.tpot_s:
                await asyncio.sleep(b.tpot_s * b.tokens)
            await _json(send, 200, said)

    async def _stream(self, api: Api, speech: Speech, send: Send) -> None:
        b = self.behaviour
        kind = b"text/event-stream; charset=utf-8"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if b.error_after != 0:  # 0: break before the first event, in time for a fallback
            for event in speech.opening:
                await _more(send, event)
        failed = False
        for at in range(b.tokens):
            if at == b.cut_after:
                raise ConnectionAbortedError("scripted cut")  # the server closes without the last chunk
            if at == b.error_after:
                await _more(send, api.error_event("scripted error", 500))
                failed = True
                break
            if at and b.tpot_s:
                await asyncio.sleep(b.tpot_s)
            await _more(send, speech.token(at))
        for event in speech.closing() if not failed or api.ends_after_error else ():
            await _more(send, event)
        await send({"type": "http.response.body", "body": b""})


async def _more(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": True})


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
