"""What cascades count: who answered and why, and whose tokens they were.

A cascade's requests, latency and grades are counted as any upstream's, under its own name; its tokens under
the names of the two that made them, because those have prices. Knows nothing about requests.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from contracts.cascade import Why
from contracts.traffic import Upstream
from serve.router.batch import Batch, Counted

SURE, UNJUDGED = "sure", "unjudged"
"""Why the first's answer was served: the signal, or because it was longer than what is held."""


class CascadeMetrics:
    """The counters of one router process."""

    def __init__(self, reg: CollectorRegistry, batch: Batch, prompt: Counter, completion: Counter) -> None:
        """`prompt`, `completion`: the counters of all arms' tokens."""
        self._batch = batch
        self._prompt, self._completion = prompt, completion
        self._counted: dict[tuple[Counter, tuple[str, ...]], Counted] = {}
        self.answers = Counter(
            "stillhouse_cascade_answers_total",
            "Requests of cascades by who answered (by) and why; all but reason sure and unjudged were passed "
            "on from the first to the second.",
            ["route", "arm", "upstream", "by", "reason"],
            registry=reg,
        )

    def know(self, route: str, arm: str, upstream: Upstream) -> None:
        """An arm is in force: start its series at zero, where it is a cascade."""
        if upstream.cascade is None:
            return
        first, then = upstream.parts
        for by, reasons in ((first, (SURE,)), (then, tuple(w.value for w in Why))):
            for reason in reasons:
                self.answers.labels(route, arm, upstream.name, by.name, reason)
        for part in (first, then):
            self.tokens(route, arm, part, 0, 0)

    def answered(self, route: str, arm: str, upstream: Upstream, by: Upstream, reason: str) -> None:
        """It is known who answers a request."""
        self._of(self.answers, route, arm, upstream.name, by.name, reason).inc()

    def tokens(
        self, route: str, arm: str, made_by: Upstream, prompt: int | None, completion: int | None
    ) -> None:
        """Count tokens for the upstream that made them."""
        self._of(self._prompt, route, arm, made_by.name).inc(prompt or 0)
        self._of(self._completion, route, arm, made_by.name).inc(completion or 0)

    def _of(self, counter: Counter, *labels: str) -> Counted:
        found = self._counted.get((counter, labels))
        if found is None:
            found = self._counted[counter, labels] = Counted(self._batch, counter.labels(*labels))
        return found
