"""A fake OpenAI-compatible server in a thread: vLLM's prompt_logprobs, chat answers, and failures on order.

Knows nothing about what is tested with it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Body = dict[str, Any]


@dataclass
class FakeOpenAI:
    """What it was asked, and what it does about it."""

    top: Callable[[list[int], int], dict[int, float]] = lambda prefix, k: {i: -1.0 - i for i in range(k)}
    """(tokens so far, k) → log-probabilities of the next token, the largest first."""
    chat: Callable[[Body], list[str]] = lambda body: ["hello"]
    """Body → texts of the choices."""
    finish_reason: str = "stop"
    max_logprobs: int = 20
    failures: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Status and headers of the next answers."""
    asked: list[Body] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    most_tokens: int = 0
    tokens: int = 0
    delay_s: float = 0.0
    url: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        """Any POST."""
        body = await request.json()
        size = len(body.get("prompt", ()))
        self.keys.append(request.headers.get("Authorization"))
        if self.failures:
            status, headers = self.failures.pop(0)
            return web.json_response({"error": {"message": "not now"}}, status=status, headers=headers)
        self.asked.append(body)
        self.in_flight, self.tokens = self.in_flight + 1, self.tokens + size
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.most_tokens = max(self.most_tokens, self.tokens)
        await asyncio.sleep(self.delay_s)
        self.in_flight, self.tokens = self.in_flight - 1, self.tokens - size
        return self._scored(body) if request.path.endswith("/v1/completions") else self._said(body)

    def _said(self, body: Body) -> web.Response:
        choices = [
            {"message": {"role": "assistant", "content": text}, "finish_reason": self.finish_reason}
            for text in self.chat(body)
        ]
        return web.json_response({"choices": choices, "usage": {"total_tokens": 10}})

    def _scored(self, body: Body) -> web.Response:
        k, ids = body["prompt_logprobs"], body["prompt"]
        if k > self.max_logprobs:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return web.json_response({"error": {"message": said}}, status=400)
        places: list[dict[str, Any] | None] = [None]
        for i in range(1, len(ids)):
            top = self.top(ids[:i], k)
            entries = {t: {"logprob": v, "rank": r} for r, (t, v) in enumerate(top.items(), start=1)}
            # As vLLM does: the actual token is there, whatever its rank, and first.
            actual = entries.pop(ids[i], {"logprob": -50.0, "rank": 300})
            places.append({str(t): e for t, e in {ids[i]: actual, **entries}.items()})
        choice = {"text": "x", "finish_reason": "length", "prompt_logprobs": places}
        return web.json_response({"choices": [choice], "usage": {"total_tokens": len(ids) + 1}})


@contextmanager
def serving(fake: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """Serve on a free port of the loopback until the block ends."""
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/{path:.*}", fake.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
