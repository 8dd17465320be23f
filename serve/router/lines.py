"""Log lines about requests that failed or were slow; the others have none, metrics count them.

At most so many a second, whatever happens: a router whose upstream is away would write nothing else. Knows
nothing about formats (contracts.logs) or about why a request failed.
"""

from __future__ import annotations

import logging
import time

from contracts.logs import LogConfig, about
from serve.router.exchange import Exchange

_log = logging.getLogger(__name__)


def about_request(ex: Exchange, **facts: object) -> dict[str, object]:
    """`extra` of a line about a request: its ids, where it went, never what was said."""
    span = ex.span
    return about(
        ex.request_id,
        None if span is None else f"{span.trace_id:032x}",
        route=ex.route.split.route,
        arm=ex.assignment.arm.value,
        **facts,
    )


class RequestLines:
    """The lines of one router process. Used from its event loop alone."""

    def __init__(self, config: LogConfig) -> None:
        self._slow_s = float("inf") if config.slow_request_s is None else config.slow_request_s
        self._per_s = config.request_lines_per_s
        self._burst = max(1.0, self._per_s)
        self._left, self._at, self._skipped = self._burst, 0.0, 0

    def ended(self, ex: Exchange) -> None:
        """A request is over: a line when somebody may ask what happened to it."""
        if not ex.outcome.failed and ex.e2e_s < self._slow_s:
            return
        if not self._may():
            self._skipped += 1
            return
        facts = about_request(
            ex,
            upstream=ex.served.name,
            endpoint=ex.endpoint,
            outcome=ex.outcome.value,
            status=ex.status,
            fell_back=ex.fell_back,
            e2e_s=round(ex.e2e_s, 4),
            ttft_s=None if ex.ttft_s is None else round(ex.ttft_s, 4),
            key=ex.key_id,
            left_out=self._skipped or None,
        )
        self._skipped = 0
        if ex.outcome.failed:
            _log.warning("request failed", extra=facts)
        else:
            _log.info("request slow", extra=facts)

    def _may(self) -> bool:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
