"""Live users of the demo: `openai` clients, streaming and not, at a rate that changes while they run.

Each conversation asks a few requests of the world's `live` split and keeps its conversation header. A failed
request is one whose client saw an error. Knows the public URL only: nothing of arms, engines or rollouts.

`python -m demo.traffic --requests 3000` is such a crowd for a stack of your own.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import time
from dataclasses import dataclass, field

from openai import AsyncOpenAI, OpenAIError

from contracts.errors import StillhouseError
from demo.console import Console
from demo.world.cases import case
from demo.world.tools import exact_match

STREAM_EVERY = 3
"""Every third request is streamed."""
CONVERSATION_LENGTH = 3
MAX_TOKENS = 96


@dataclass
class TrafficStats:
    """What the clients saw."""

    requests: int = 0
    failed: int = 0
    right: int = 0
    errors: list[str] = field(default_factory=list)
    """The first few error texts."""


class Traffic:
    """A crowd of clients in a thread of its own; start it, change its rate, stop it.

    Args:
        base_url: public URL that ends in /v1.
        route: the `model` that clients ask for.
        start: index of the first live request, so that later crowds never repeat one.
        max_in_flight: how many requests may be open at once.
    """

    def __init__(self, base_url: str, route: str, start: int = 0, max_in_flight: int = 32) -> None:
        self.stats = TrafficStats()
        self.next_index = start
        self._base_url, self._route = base_url, route
        self._limit = max_in_flight
        self._rate: float | None = 0.0
        self._burst: tuple[float, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def start(self) -> Traffic:
        """Begin; the rate is zero until `set_rate`."""
        self._thread.start()
        return self

    def set_rate(self, per_second: float | None, burst: tuple[float, float] | None = None) -> None:
        """Requests a second; None means as many as `max_in_flight` allows.

        `burst` = (seconds on, seconds off): users come in waves. An idle vLLM on a CPU sleeps, a nearly idle
        one spins on a core, which two cores cannot spare while a student is trained.
        """
        self._rate, self._burst = per_second, burst

    def stop(self, timeout_s: float = 120.0) -> TrafficStats:
        """Stop asking, wait for the answers still under way, return what was seen."""
        self._stop.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise StillhouseError(f"clients still wait for answers {timeout_s:.0f} s after the last request.")
        return self.stats

    def _run(self) -> None:
        asyncio.run(self._crowd())

    async def _crowd(self) -> None:
        client = AsyncOpenAI(base_url=self._base_url, api_key="demo", max_retries=0, timeout=60.0)
        gate = asyncio.Semaphore(self._limit)
        tasks: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not self._stop.is_set():
            rate = self._rate
            if rate == 0.0 or self._between_bursts():
                await asyncio.sleep(0.05)
                due = time.monotonic()
                continue
            if rate is not None:
                due = max(due + 1.0 / rate, time.monotonic() - 1.0)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            await gate.acquire()
            task = asyncio.create_task(self._ask(client, self.next_index))
            self.next_index += 1
            tasks.add(task)
            task.add_done_callback(lambda t: (tasks.discard(t), gate.release()))
        if tasks:
            await asyncio.wait(set(tasks))
        await client.close()

    def _between_bursts(self) -> bool:
        return self._burst is not None and time.monotonic() % sum(self._burst) > self._burst[0]

    async def _ask(self, client: AsyncOpenAI, index: int) -> None:
        one = case("live", index)
        body = {
            "model": self._route,
            "messages": [{"role": "user", "content": one.text}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "metadata": {"case": one.id},
            "extra_headers": {"x-stillhouse-conversation": f"demo-{index // CONVERSATION_LENGTH}"},
        }
        self.stats.requests += 1
        try:
            text = await (_streamed(client, body) if index % STREAM_EVERY == 0 else _whole(client, body))
        except (OpenAIError, ValueError) as err:  # ValueError: a torn body that does not parse
            self.stats.failed += 1
            if len(self.stats.errors) < 5:
                self.stats.errors.append(f"{one.id}: {type(err).__name__}: {err}"[:500])
            return
        self.stats.right += exact_match(text, one.answer)


async def _whole(client: AsyncOpenAI, body: dict[str, object]) -> str:
    answer = await client.chat.completions.create(**body)  # type: ignore[call-overload]
    return answer.choices[0].message.content or ""


async def _streamed(client: AsyncOpenAI, body: dict[str, object]) -> str:
    parts: list[str] = []
    finished = False
    stream = await client.chat.completions.create(**body, stream=True)  # type: ignore[call-overload]
    async for chunk in stream:
        if not chunk.choices:
            continue
        parts.append(chunk.choices[0].delta.content or "")
        finished = finished or chunk.choices[0].finish_reason is not None
    if not finished:
        raise ValueError("the stream ended without a finish_reason")
    return "".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Send requests to a running stack; 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m demo.traffic", description=main.__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="public URL, ending in /v1")
    parser.add_argument("--route", default="support", help="the model name to ask for")
    parser.add_argument("--requests", type=int, default=3000, help="how many")
    parser.add_argument("--rate", type=float, help="requests a second; default: what 32 clients manage")
    parser.add_argument("--start", type=int, default=0, help="first request; another number, other requests")
    args = parser.parse_args(argv)
    crowd = Traffic(args.url, args.route, start=args.start).start()
    crowd.set_rate(args.rate)
    console = Console()
    try:
        with console.progress(f"{args.route} at {args.url}", args.requests) as bar:
            while crowd.stats.requests < args.requests:
                time.sleep(0.2)
                bar.to(crowd.stats.requests, f"{crowd.stats.failed} failed, {crowd.stats.right} right")
    except KeyboardInterrupt:
        console.failed("interrupted")
    seen = crowd.stop()
    for error in seen.errors:
        console.failed(error)
    return 1 if seen.failed else 0


if __name__ == "__main__":
    sys.exit(main())
