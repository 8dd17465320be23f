"""Upstreams that are cascades: the first is asked, its answer judged and served, or the second's turn comes.

The client sees one ordinary answer: the first's, held until it was judged, or the second's, streamed through
as ever. Whatever goes wrong with the first, or cannot be judged, goes to the second. Knows nothing about arms
or about how thresholds are found.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from contracts.cascade import Long, Signal, Why
from contracts.traffic import Cascade, Outcome, Upstream
from serve.cascade import signals
from serve.cascade.logprobs import Wish, asking
from serve.grading.graders import NamedGrader
from serve.router.cascade_metrics import SURE, UNJUDGED
from serve.router.config import Timeouts
from serve.router.errors import AttemptFailed
from serve.router.exchange import EVIDENCE_ENDPOINTS, Exchange, Step
from serve.router.guard import Cause, Guard
from serve.router.hold import Held, Holder
from serve.router.judging import Judging
from serve.router.lines import about_request
from serve.router.metrics import Metrics
from serve.router.relay import Ended, Send, start_message

_log = logging.getLogger("stillhouse.router")
_NO_WISH = Wish(False, 0)


class Cascades:
    """Every cascade of one router process."""

    def __init__(
        self,
        holder: Holder,
        graders: Mapping[str, NamedGrader],
        judging: Judging | None,
        metrics: Metrics,
        timeouts: Timeouts,
        ended: Ended,
        keep_chunks: bool,
    ) -> None:
        """`ended`, `keep_chunks`: as the relay has them."""
        self._holder = holder
        self._graders = graders
        self._judging = judging
        self._metrics = metrics
        self._timeouts = timeouts
        self._ended = ended
        self._keep_chunks = keep_chunks

    async def first(self, ex: Exchange, guard: Guard, send: Send) -> Upstream | None:
        """Who is to be asked for an exchange whose upstream is a cascade; None: the client has its answer."""
        cascade = ex.served.cascade
        assert cascade is not None
        held: Held | None = None
        if not signals.can_judge(cascade.signal, ex.endpoint, {**ex.route.settings.parameters, **ex.body}):
            step = Step(cascade.first, cascade.then, Why.NOT_JUDGED)
        else:
            own = ex.route.settings.timeouts.first_byte_s
            guard.wait_for(Cause.FIRST_BYTE, cascade.first_s or own or self._timeouts.first_byte_s)
            try:
                step, held = await self._try(ex, cascade)
            except asyncio.CancelledError:
                if guard.cause is not Cause.FIRST_BYTE:
                    raise
                guard.caught()
                step = Step(cascade.first, cascade.then, Why.TIMEOUT)
        self._decided(ex, step)
        if held is None or step.reason is not None:
            return cascade.then
        await self._deliver(ex, held, guard, send)
        return None

    def _decided(self, ex: Exchange, step: Step) -> None:
        ex.step = step
        route, arm = ex.route.split.route, ex.served_arm.value
        self._metrics.cascades.tokens(route, arm, step.first, step.prompt_tokens, step.completion_tokens)
        if ex.endpoint in EVIDENCE_ENDPOINTS:
            served = UNJUDGED if step.signal is None else SURE
            reason = served if step.reason is None else step.reason.value
            self._metrics.cascades.answered(route, arm, ex.served, step.by, reason)

    async def _try(self, ex: Exchange, cascade: Cascade) -> tuple[Step, Held | None]:
        """Ask the first, and judge what it says."""
        wish, more = _NO_WISH, dict[str, Any]()
        if cascade.signal.of_logprobs:
            body = {**ex.route.settings.parameters, **ex.body}
            more, wish = asking(ex.endpoint, body, signals.TOP.get(cascade.signal, 0))
        limit = cascade.hold_tokens if cascade.long is Long.THEN else None
        consistent = cascade.signal is Signal.SELF_CONSISTENCY
        sampling = asyncio.ensure_future(self._samples(ex, cascade)) if consistent else None
        try:
            held = await self._holder.ask(ex, cascade.first, more, wish, limit)
            if held is None:
                return Step(cascade.first, cascade.then, Why.LONG), None
            return await self._judged(ex, cascade, held, sampling)
        except AttemptFailed as err:
            facts = {"upstream": cascade.first.name, "status": err.status, "connect": err.connect}
            _log.debug("the first of a cascade failed", extra=about_request(ex, **facts))
            return Step(cascade.first, cascade.then, Why.FAILED), None
        finally:
            if sampling is not None and not sampling.done():
                sampling.cancel()
                await asyncio.wait((sampling,))

    async def _judged(
        self, ex: Exchange, cascade: Cascade, held: Held, sampling: asyncio.Future[Held | None] | None
    ) -> tuple[Step, Held]:
        prompt, completion = held.prompt_tokens, held.completion_tokens
        if completion > cascade.hold_tokens:  # only where longer answers are served unjudged
            return Step(cascade.first, cascade.first, None, None, prompt, completion), held
        if sampling is not None:
            samples = await sampling
            value = None if samples is None else agreement(held, samples)
            prompt += 0 if samples is None else samples.prompt_tokens
            completion += 0 if samples is None else samples.completion_tokens
        elif cascade.signal is Signal.GRADER:
            value = await self._graded(ex, str(cascade.grader), held)
        else:
            value = signals.of_scores(cascade.signal, held.scores)
        if value is None or math.isnan(value):
            return Step(cascade.first, cascade.then, Why.NO_SIGNAL, None, prompt, completion), held
        if value < cascade.threshold:
            return Step(cascade.first, cascade.then, Why.UNSURE, value, prompt, completion), held
        return Step(cascade.first, cascade.first, None, value, prompt, completion), held

    async def _samples(self, ex: Exchange, cascade: Cascade) -> Held | None:
        """Further answers to compare with, all in one whole body; None when there are none."""
        more = {
            "n": cascade.samples,
            "temperature": cascade.temperature,
            "stream": False,
            "stream_options": None,
        }
        try:
            return await self._holder.ask(ex, cascade.first, more, Wish(True, 0), None)
        except AttemptFailed:
            return None

    async def _graded(self, ex: Exchange, name: str, held: Held) -> float | None:
        text = held.answer().text
        if text is None:
            return None
        if self._judging is not None and name in self._judging.judges:
            return await self._judging.score(name, ex.body, text)
        grader = self._graders.get(name)
        if grader is None:
            return None
        try:
            return await asyncio.to_thread(grader.score, ex.body, text)
        except Exception as err:  # noqa: BLE001 reason: a grader is the user's code; counted and told
            self._metrics.grader_errors.labels(name).inc()
            _log.error("grader %s failed in a cascade: %s", name, type(err).__name__)
            return None

    async def _deliver(self, ex: Exchange, held: Held, guard: Guard, send: Send) -> None:
        """The first's answer is good enough: the client gets it as if it had come just now."""
        guard.ending()
        ex.take_usage(held.usage)
        length: int | None = None
        if held.watcher is not None:
            ex.watcher, ex.streamed = held.watcher, True
            ex.ttft_s = time.perf_counter() - ex.started
            if self._keep_chunks:
                ex.chunks.append(held.body)
        else:
            ex.response, length = held.response, len(held.body)
            ex.body_bytes += length
        self._ended(ex, Outcome.OK, held.status)
        content_type = held.content_type or b"application/json"
        await send(start_message(ex, held.status, content_type, held.headers, length))
        await send({"type": "http.response.body", "body": held.body})


def agreement(held: Held, samples: Held) -> float | None:
    """Share of the samples that say what the held answer says; None where either says nothing."""
    choices = (samples.response or {}).get("choices")
    said = (
        [signals.normalised(c) for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []
    )
    mine = _said(held)
    return None if mine is None else signals.agreement(mine, [one or "" for one in said])


def _said(held: Held) -> str | None:
    if held.response is not None:
        choices = held.response.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        return signals.normalised(first) if isinstance(first, dict) else None
    answer = held.answer()
    if answer.finish_reason == "tool_calls":  # calls are not put together from a stream
        return None
    return signals.normalised({"text": answer.text})
