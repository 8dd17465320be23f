"""Language models as graders, in the background: bounded calls, never in the way of a request.

Budgets an hour, calls at once and a length limit hold per judge; what is over is dropped and counted. A reply
without exactly one verdict is no score. Owned by one event loop. Knows nothing about where scores go.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from contracts.errors import EngineError
from contracts.grading import JudgeGrader, Mode
from serve.grading.graders import paired
from serve.grading.judge import conversation, pair_prompt, parse_score, parse_verdict, score_prompt
from serve.grading.sampling import canary_first
from serve.router.judge_client import JudgeClient
from serve.router.metrics import Metrics

_log = logging.getLogger("stillhouse.router")
_HOUR_S = 3600.0
_COMPLAIN_S = 10.0


class Preference(NamedTuple):
    """What a judge said of a pair."""

    value: float
    """(canary - reference + 1) / 2."""
    canary_first: bool | None = None
    """Which order it saw, where it saw both at once."""


class _Budget:
    """One judge's places, and its calls of the running hour."""

    __slots__ = ("inside", "places", "since", "used")

    def __init__(self, judge: JudgeGrader) -> None:
        self.places = asyncio.Semaphore(judge.max_in_flight)
        self.inside = 0
        """Running and waiting."""
        self.used = 0
        self.since = float("-inf")

    def refusal(self, judge: JudgeGrader, calls: int, now: float) -> str | None:
        """Why no further calls may start, None when they may."""
        if now - self.since >= _HOUR_S:
            self.since, self.used = now, 0
        if self.inside >= judge.max_in_flight + judge.max_queued:
            return "busy"
        return "budget" if judge.per_hour is not None and self.used + calls > judge.per_hour else None


class Judging:
    """All judges of one router process."""

    def __init__(
        self,
        judges: Mapping[str, JudgeGrader],
        names: Mapping[str, str],
        client: JudgeClient,
        metrics: Metrics,
    ) -> None:
        """`names`: grader → the name, with its version, under which its scores are counted."""
        self.judges = judges
        self.names = names
        self._client = client
        self._metrics = metrics
        self._budgets = {name: _Budget(judge) for name, judge in judges.items()}
        self._complained_at = float("-inf")

    async def score(self, name: str, request: dict[str, Any], text: str) -> float | None:
        """A judge's score of one answer; None when it was not asked or said nothing readable."""
        judge = self.judges[name]
        if not await self._admit(name, 1, request, text):
            return None
        async with self._place(name):
            return await self._score(name, judge, request, text)

    async def prefer(
        self, name: str, pair_id: str, request: dict[str, Any], canary: str, reference: str
    ) -> Preference | None:
        """What a judge says of a pair: one call in an order drawn by the pair's id, or two scores."""
        judge = self.judges[name]
        both = judge.mode is Mode.PAIRWISE
        if not await self._admit(name, 1 if both else 2, request, canary, reference):
            return None
        async with self._place(name):
            if both:
                return await self._verdict(name, judge, pair_id, request, canary, reference)
            value = paired(
                await self._score(name, judge, request, canary),
                await self._score(name, judge, request, reference),
            )
            return None if value is None else Preference(value)

    async def _verdict(
        self,
        name: str,
        judge: JudgeGrader,
        pair_id: str,
        request: dict[str, Any],
        canary: str,
        reference: str,
    ) -> Preference | None:
        order = canary_first(self.names[name], pair_id)
        first, second = (canary, reference) if order else (reference, canary)
        body = await asyncio.to_thread(pair_prompt, judge, request, first, second)
        reply = await self._ask(name, judge, body)
        value = None if reply is None else parse_verdict(reply, order)
        self._told(name, reply, value)
        return None if value is None else Preference(value, order)

    async def _score(self, name: str, judge: JudgeGrader, request: dict[str, Any], text: str) -> float | None:
        reply = await self._ask(name, judge, await asyncio.to_thread(score_prompt, judge, request, text))
        value = None if reply is None else parse_score(reply)
        self._told(name, reply, value)
        return value

    async def _admit(self, name: str, calls: int, request: dict[str, Any], *texts: str) -> bool:
        judge, budget = self.judges[name], self._budgets[name]
        reason = budget.refusal(judge, calls, time.monotonic())
        if reason is None:
            budget.used += calls
            # In a thread, as the prompts are: a request of megabytes must not hold up the event loop.
            if await asyncio.to_thread(_longest, request, texts) <= judge.max_chars:
                return True
            budget.used -= calls
            reason = "too_long"
        self._metrics.judge_dropped.labels(self.names[name], reason).inc()
        return False

    @asynccontextmanager
    async def _place(self, name: str) -> AsyncIterator[None]:
        """Wait for one of the judge's places, and hold it."""
        budget = self._budgets[name]
        budget.inside += 1
        try:
            async with budget.places:
                yield
        finally:
            budget.inside -= 1

    async def _ask(self, name: str, judge: JudgeGrader, body: dict[str, Any]) -> str | None:
        try:
            return await self._client.ask(judge, body)
        except EngineError as err:
            now = time.monotonic()
            if now - self._complained_at >= _COMPLAIN_S:
                self._complained_at = now
                _log.error("grader %s: %s", name, err)
            return None

    def _told(self, name: str, reply: str | None, value: float | None) -> None:
        result = "failed" if reply is None else "ok" if value is not None else "unparsed"
        self._metrics.judge_calls.labels(self.names[name], result).inc()


def _longest(request: dict[str, Any], texts: tuple[str, ...]) -> int:
    """Characters of the longest of the conversation and the answers."""
    return max(map(len, (conversation(request), *texts)))
