"""Asks a route of a stack requests of the demo's world, and grades what comes back.

Knows nothing about cascades but the headers that name who answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import aiohttp
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.gateway.processes import Failed
from benchmarks.recipes.data import MAX_NEW, body
from demo.world import grade
from demo.world.cases import Case

_AT_ONCE = 16


class Reply(NamedTuple):
    """One answered request."""

    right: bool
    passed_on: bool
    """The second upstream of a cascade answered."""
    completion_tokens: int


async def answers(url: str, route: str, cases: Sequence[Case]) -> list[Reply]:
    """A reply a case, in their order. Raises: Failed for any that is not answered."""
    places = asyncio.Semaphore(_AT_ONCE)
    bar = tqdm(total=len(cases), desc=f"route {route}", unit="request", mininterval=5)

    async def one(session: aiohttp.ClientSession, case: Case) -> Reply:
        request = {**body(case), "model": route, "temperature": 0, "max_tokens": MAX_NEW}
        async with places, session.post(f"{url}/v1/chat/completions", json=request) as reply:
            said = await reply.json()
            if reply.status != 200:
                raise Failed(f"route {route} answered {reply.status}: {said}")
        bar.update()
        text = said["choices"][0]["message"]["content"] or ""
        passed_on = reply.headers.get("x-stillhouse-cascade", "").startswith("then")
        return Reply(bool(grade(request, text)), passed_on, said["usage"]["completion_tokens"])

    limit = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=limit) as session:
        found = await asyncio.gather(*(one(session, case) for case in cases))
    bar.close()
    return found


async def first_text_ms(url: str, route: str, cases: Sequence[Case]) -> float:
    """Median milliseconds to the first text of a stream, one request at a time."""
    found = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        for case in cases:
            request = {**body(case), "model": route, "temperature": 0, "max_tokens": MAX_NEW, "stream": True}
            started = time.perf_counter()
            async with session.post(f"{url}/v1/chat/completions", json=request) as reply:
                async for line in reply.content:
                    if b'"content":"' in line and b'"content":""' not in line:
                        found.append(1000 * (time.perf_counter() - started))
                        break
                await reply.read()
    return median(found)
