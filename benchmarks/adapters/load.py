"""The same load on one engine with many names, or on many engines with one each.

Closed loop: each client asks its next question when the last was answered. Knows nothing about adapters.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import aiohttp

TOKENS = 32


class Target(NamedTuple):
    """An engine and the model name to ask it for."""

    url: str
    model: str


@dataclass
class Seen:
    """What the clients saw."""

    answered: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        """Answers per second."""
        return self.answered / self.seconds if self.seconds else 0.0


async def drive(targets: list[Target], clients: int, seconds: float) -> Seen:
    """`clients` for every target, for so long; answers that come later than that are awaited."""
    end = time.monotonic() + seconds
    return await _drive(targets, clients, lambda: time.monotonic() < end)


async def drive_while(targets: list[Target], clients: int, work: Callable[[], None]) -> Seen:
    """The same load for as long as `work` takes, which runs in a thread of its own."""
    task = asyncio.create_task(asyncio.to_thread(work))
    seen = await _drive(targets, clients, lambda: not task.done())
    await task
    return seen


async def _drive(targets: list[Target], clients: int, more: Callable[[], bool]) -> Seen:
    seen, start = Seen(), time.monotonic()
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        every = [(target, number) for target in targets for number in range(clients)]
        await asyncio.gather(*(_client(session, *one, more, seen) for one in every))
    seen.seconds = time.monotonic() - start
    return seen


async def _client(
    session: aiohttp.ClientSession, target: Target, number: int, more: Callable[[], bool], seen: Seen
) -> None:
    asked = 0
    while more():
        asked += 1
        body = {
            "model": target.model,
            "messages": [{"role": "user", "content": f"Question {number}.{asked}: what time is it?"}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        try:
            async with session.post(f"{target.url}/v1/chat/completions", json=body) as reply:
                said = await reply.json()
                if reply.status == 200 and said["usage"]["completion_tokens"] == TOKENS:
                    seen.answered += 1
                else:
                    seen.failures.append(f"{target.model}: {reply.status} {said}")
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as err:
            seen.failures.append(f"{target.model}: {err!r}")
