"""Served tokens a second of several engines under the same load, in alternating turns.

The same prompts, the same concurrency, greedy, not streaming, straight at each engine; turns alternate so
that noise of the machine hits all of them alike. Knows OpenAI-compatible URLs only.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

import aiohttp

from contracts.errors import EngineError

CONCURRENCY = 32
MAX_TOKENS = 96


@dataclass(frozen=True)
class Target:
    """One engine: its URL (without /v1) and the model name it answers to."""

    name: str
    url: str
    model: str


@dataclass(frozen=True)
class Served:
    """Medians over the turns of one target."""

    tokens_per_s: float
    requests_per_s: float
    turns: list[float]


def measure(
    targets: list[Target], prompts: list[str], turns: int = 3, seconds: float = 6.0
) -> dict[str, Served]:
    """Tokens a second of every target: `turns` turns of `seconds` each, alternating; medians over turns."""
    seen: dict[str, list[tuple[float, float]]] = {t.name: [] for t in targets}
    for target in targets:
        asyncio.run(_turn(target, prompts, 1.5))  # the first requests pay for warming
    for _ in range(turns):
        for target in targets:
            seen[target.name].append(asyncio.run(_turn(target, prompts, seconds)))
    return {
        name: Served(
            tokens_per_s=statistics.median(t for t, _ in rows),
            requests_per_s=statistics.median(r for _, r in rows),
            turns=[round(t, 1) for t, _ in rows],
        )
        for name, rows in seen.items()
    }


async def _turn(target: Target, prompts: list[str], seconds: float) -> tuple[float, float]:
    """One turn of load; tokens and requests a second, counted until the last answer arrived."""
    started, tokens, requests = time.perf_counter(), 0, 0
    turn = iter(range(1_000_000))

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal tokens, requests
        while time.perf_counter() - started < seconds:
            prompt = prompts[next(turn) % len(prompts)]
            answered = await _one(session, target, prompt)
            tokens += answered  # not `tokens += await …`: that adds to what tokens was before the wait
            requests += 1

    connector = aiohttp.TCPConnector(limit=CONCURRENCY)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
        await asyncio.gather(*(worker(session) for _ in range(CONCURRENCY)))
    elapsed = time.perf_counter() - started
    return tokens / elapsed, requests / elapsed


async def _one(session: aiohttp.ClientSession, target: Target, prompt: str) -> int:
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    async with session.post(f"{target.url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise EngineError(f"{target.name} answered {answer.status}: {(await answer.text())[:200]}")
        return int((await answer.json())["usage"]["completion_tokens"])
