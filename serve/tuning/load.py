"""Closed-loop load on one engine: so many requests at once, each answer as long as it was in the log.

Times are the client's. Both sides of a comparison get the same requests in the same order. Knows nothing
about settings or what is compared.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson

from contracts.config import Record
from contracts.errors import EngineError
from serve.tuning.traffic import Work

_TIMEOUT_S = 600.0


class Timed(NamedTuple):
    """One answered request, in seconds from its start."""

    ttft_s: float
    e2e_s: float
    tokens: int
    text: str

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first."""
        return (self.e2e_s - self.ttft_s) / max(1, self.tokens - 1)


class Turn(Record):
    """What an engine did with some requests at one concurrency."""

    concurrency: int
    requests: int
    seconds: float
    tokens: int
    p95: dict[str, float]
    """Of ttft, tpot and e2e, seconds."""

    @property
    def requests_per_s(self) -> float:
        """Answered requests a second."""
        return self.requests / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second."""
        return self.tokens / self.seconds


def turn(url: str, model: str, work: Sequence[Work], concurrency: int, fixed: bool = True) -> Turn:
    """Ask everything once, `concurrency` at a time. Raises: EngineError for any that is not answered."""
    return asyncio.run(_timed_turn(url, model, work, concurrency, fixed))[0]


def answers(url: str, model: str, work: Sequence[Work], concurrency: int) -> tuple[Turn, list[str]]:
    """As turn, greedily to each answer's own end, and the texts."""
    found, timed = asyncio.run(_timed_turn(url, model, work, concurrency, fixed=False))
    return found, [one.text for one in timed]


async def _timed_turn(
    url: str, model: str, work: Sequence[Work], concurrency: int, fixed: bool
) -> tuple[Turn, list[Timed]]:
    places = asyncio.Semaphore(concurrency)
    limit = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(asked: Work) -> Timed:
            async with places:
                return await _ask(session, url, model, asked, fixed)

        began = time.perf_counter()
        tasks = [asyncio.ensure_future(one(asked)) for asked in work]
        try:
            timed = await asyncio.gather(*tasks)
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            raise EngineError(f"{url} did not answer under load: {err!r}.") from err
        finally:
            for task in tasks:
                task.cancel()
    return summary(timed, concurrency, time.perf_counter() - began), timed


def summary(timed: Sequence[Timed], concurrency: int, seconds: float) -> Turn:
    """A turn's figures."""
    names = {
        "ttft": [t.ttft_s for t in timed],
        "tpot": [t.tpot_s for t in timed],
        "e2e": [t.e2e_s for t in timed],
    }
    return Turn(
        concurrency=concurrency,
        requests=len(timed),
        seconds=seconds,
        tokens=sum(t.tokens for t in timed),
        p95={name: float(np.quantile(values, 0.95)) for name, values in names.items()},
    )


def body_of(model: str, work: Work, fixed: bool) -> dict[str, Any]:
    """The request: greedy, streamed, and where `fixed` exactly as long as it was in the log."""
    length = {"max_tokens": work.completion_tokens, "ignore_eos": fixed}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {**work.body, "model": model, "temperature": 0, **length, **stream}


async def _ask(session: aiohttp.ClientSession, url: str, model: str, work: Work, fixed: bool) -> Timed:
    began = time.perf_counter()
    first, tokens, parts = None, 0, []
    async with session.post(url + work.endpoint, json=body_of(model, work, fixed)) as reply:
        if reply.status != 200:
            said = (await reply.read())[:300]
            raise EngineError(f"{url} answered a request of the log with {reply.status}: {said!r}.")
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            event = orjson.loads(line[6:])
            if "error" in event:
                raise EngineError(f"{url} broke a stream off: {event['error']}.")
            for choice in event.get("choices") or ():
                text = choice.get("text") or (choice.get("delta") or {}).get("content")
                if text:
                    first = first or time.perf_counter()
                    parts.append(text)
            if event.get("usage"):
                tokens = int(event["usage"]["completion_tokens"])
    ended = time.perf_counter()
    return Timed((first or ended) - began, ended - began, tokens, "".join(parts))
