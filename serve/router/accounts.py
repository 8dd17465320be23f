"""The end of every exchange: metrics, evidence and the log row, each exactly once.

Called right before the client could know that its request ended, so that a scrape after an answer includes
it. Knows nothing about bytes or about who is asked.
"""

from __future__ import annotations

import time

from contracts.traffic import Arm, Outcome
from serve.request_log import RequestLog
from serve.router.exchange import Exchange
from serve.router.keys import KeyTable
from serve.router.ledger import Ledger
from serve.router.lines import RequestLines
from serve.router.metrics import Metrics
from serve.router.served import ServedIds
from serve.router.table import RouteTable
from serve.router.tracing import Refusal, Tracer


class Accounts:
    """The books of one router process."""

    def __init__(
        self,
        table: RouteTable,
        metrics: Metrics,
        ledger: Ledger,
        keys: KeyTable,
        served: ServedIds | None,
        log: RequestLog | None,
        tracer: Tracer | None,
        lines: RequestLines,
    ) -> None:
        self._table = table
        self._keys = keys
        self._served = served
        self._metrics = metrics
        self._ledger = ledger
        self._log = log
        self._tracer = tracer
        self._lines = lines
        self.want_answers = log is not None or tracer is not None or keys.on
        """Somebody reads the answers afterwards."""

    def ended(self, ex: Exchange, outcome: Outcome, status: int) -> None:
        """Account for an exchange; further calls for the same one change nothing."""
        if ex.ended:
            return
        self.release(ex)
        if not ex.fell_back or outcome is Outcome.CLIENT_ERROR:
            ex.outcome = outcome  # after a fallback the arm's failure stands, unless the request was bad
        ex.status = status
        ex.e2e_s = time.perf_counter() - ex.started
        if ex.streamed and ex.completion_tokens is None:
            ex.completion_tokens = ex.tokens_seen()
        self._measure(ex)
        self._count_tokens(ex)
        if ex.assignment.arm is not Arm.SHADOW:
            self._keys.ended(ex.key_id, ex.prompt_tokens, ex.completion_tokens)
        if ex.outcome.counts:
            for key in ex.evidence():
                self._ledger.count(key, ex.outcome.failed, ex.ttft_s, ex.e2e_s)
        if self._served is not None and ex.assignment.arm is not Arm.SHADOW:
            self._served.note(ex)
        if self._log is not None:
            self._log.submit(ex)
        if self._tracer is not None:
            self._tracer.submit(ex)
        self._lines.ended(ex)

    def refused(self, refusal: Refusal) -> None:
        """A request that no arm was asked for; the metrics have counted it."""
        if self._tracer is not None:
            self._tracer.refuse(refusal)

    def release(self, ex: Exchange) -> None:
        """It runs no longer; nothing else is noted."""
        if not ex.ended:
            ex.ended = True
            self._table.release(ex.held)
            ex.metrics.in_flight.dec()

    def _measure(self, ex: Exchange) -> None:
        metrics = ex.metrics
        metrics.ended(ex.outcome, ex.endpoint)
        if ex.assignment.arm is not Arm.SHADOW:  # a shadow has no client
            self._metrics.response(ex.route.split.route, ex.status)
            metrics.overhead.observe(ex.overhead_s)
        if ex.outcome is not Outcome.OK:
            return
        metrics.e2e.observe(ex.e2e_s)
        if ex.ttft_s is not None:
            metrics.ttft.observe(ex.ttft_s)
            tpot = ex.tpot_s()
            if tpot is not None:
                metrics.tpot.observe(tpot)

    def _count_tokens(self, ex: Exchange) -> None:
        """Tokens are the serving arm's: it made them, whoever is charged with the request."""
        metrics = ex.metrics
        if ex.step is not None:
            if ex.step.reason is not None:  # the first's were counted when it was decided
                asked = (ex.route.split.route, ex.served_arm.value, ex.step.by)
                self._metrics.cascades.tokens(*asked, ex.prompt_tokens, ex.completion_tokens)
            return
        if ex.fell_back:
            metrics = self._metrics.arm(ex.route.split.route, ex.served_arm.value, ex.served.name)
        if ex.prompt_tokens:
            metrics.prompt_tokens.inc(ex.prompt_tokens)
        if ex.completion_tokens:
            metrics.completion_tokens.inc(ex.completion_tokens)
