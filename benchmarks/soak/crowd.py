"""Paced clients: every third request streams, each conversation asks a few times. Knows public URLs only."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import dataclass, field

import aiohttp
import orjson

from demo.world.cases import case

MAX_TOKENS = 8
_SAMPLE = 20_000


@dataclass
class Seen:
    """What the clients saw."""

    sent: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """A reservoir of latencies."""

    def p99_s(self) -> float:
        """99th percentile of the latencies."""
        ordered = sorted(self.seconds)
        return ordered[int(0.99 * (len(ordered) - 1))] if ordered else 0.0


class Crowd:
    """A thread of clients at a fixed rate over several URLs."""

    def __init__(self, urls: list[str], secret: str, rate: float) -> None:
        self.seen = Seen()
        self._urls, self._secret, self._rate = urls, secret, rate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> Seen:
        """No further requests; wait for the answers under way."""
        self._stop.set()
        self._thread.join(120)
        return self.seen

    async def _run(self) -> None:
        headers = {"authorization": f"Bearer {self._secret}", "content-type": "application/json"}
        tasks: set[asyncio.Task[None]] = set()
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=60)) as session:
            due, index = time.monotonic(), 0
            while not self._stop.is_set():
                due += 1 / self._rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                task = asyncio.create_task(self._ask(session, index))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                index += 1
            if tasks:
                await asyncio.wait(tasks)

    async def _ask(self, session: aiohttp.ClientSession, index: int) -> None:
        stream = index % 3 == 0
        body = {
            "model": "support",
            "messages": [{"role": "user", "content": case("live", index).text}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": stream,
        }
        url = f"{self._urls[index % len(self._urls)]}/v1/chat/completions"
        conversation = {"x-stillhouse-conversation": f"soak-{index // 3}"}
        self.seen.sent += 1
        began = time.perf_counter()
        try:
            async with session.post(url, data=orjson.dumps(body), headers=conversation) as answer:
                data = await answer.read()
            right = data.rstrip().endswith(b"data: [DONE]") if stream else b'"choices"' in data
            if answer.status != 200 or not right:
                raise ValueError(f"{answer.status}: {data[-200:]!r}")
        except (aiohttp.ClientError, TimeoutError, ValueError) as err:
            self.seen.failed += 1
            if len(self.seen.errors) < 10:
                self.seen.errors.append(f"{index}: {err!r}"[:400])
            return
        self._note(time.perf_counter() - began)

    def _note(self, seconds: float) -> None:
        kept = self.seen.seconds
        if len(kept) < _SAMPLE:
            kept.append(seconds)
        else:
            at = random.randrange(self.seen.sent)
            if at < _SAMPLE:
                kept[at] = seconds
