"""The router's metrics, `stillhouse_*`, exact over all router processes of a host.

With PROMETHEUS_MULTIPROC_DIR set (before prometheus_client is imported) every process counts in its own
memory-mapped file there and a scrape of any of them sums all files, those of killed processes included.
Without it one process counts for itself. Labels are bounded: routes and upstreams come from splits, never
from clients. Knows nothing about requests.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Collection, Mapping
from itertools import product
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import mark_process_dead

from contracts.errors import ConfigError
from contracts.price import Price
from contracts.traffic import Arm, Outcome, Split
from serve.router.batch import FLUSH_S, Batch, Counted, Level, Observed
from serve.router.cascade_metrics import CascadeMetrics
from serve.router.exposition import HostExposition
from serve.router.split_metrics import SplitMetrics

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
OTHER: Final = "other"
NONE: Final = "none"
SHADOW_DROPS: Final = ("budget", "busy")
"""Reasons whose series begin at zero; those of mirrored requests come when there are any."""

SECONDS_BUCKETS: Final = (0.01, 0.02, 0.04, 0.1, 0.2, 0.4, 1.0, 2.0, 3.0, 6.0, 15.0, 60.0)
"""Edges of latency histograms: every third or so of the ledger's, by which rollouts are judged. They are
multiplied by arms, so each costs sixty series where twenty routes have three."""
TPOT_BUCKETS_S: Final = (0.001, 0.002, 0.004, 0.008, 0.015, 0.030, 0.060, 0.100, 0.200, 0.400)
OVERHEAD_BUCKETS_S: Final = (0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.005, 0.010, 0.050, 0.100)

_LIVE_FILE = re.compile(r"^gauge_live\w*_(\d+)\.db$")
_GENERATION = ("/v1/chat/completions", "/v1/completions")


class ArmMetrics:
    """Bound children of one (route, arm, upstream), so that the hot path looks up no labels."""

    def __init__(self, metrics: Metrics, route: str, arm: str, upstream: str) -> None:
        labels = (route, arm, upstream)
        batch = metrics.batch
        self._metrics = metrics
        self._labels = labels
        self._by_outcome: dict[tuple[str, str], Counted] = {}
        for endpoint in _GENERATION:
            for outcome in Outcome:
                self._requests(outcome, endpoint)
        self.ttft = Observed(batch, metrics.ttft.labels(*labels), SECONDS_BUCKETS)
        self.tpot = Observed(batch, metrics.tpot.labels(*labels), TPOT_BUCKETS_S)
        self.e2e = Observed(batch, metrics.e2e.labels(*labels), SECONDS_BUCKETS)
        self.overhead = metrics.overhead_of(route)
        self.prompt_tokens = Counted(batch, metrics.prompt_tokens.labels(*labels))
        self.completion_tokens = Counted(batch, metrics.completion_tokens.labels(*labels))
        self.in_flight = Level(batch, metrics.in_flight.labels(*labels))

    def ended(self, outcome: Outcome, endpoint: str) -> None:
        """Count a request."""
        child = self._by_outcome.get((outcome, endpoint)) or self._requests(outcome, endpoint)
        child.inc()

    def _requests(self, outcome: Outcome, endpoint: str) -> Counted:
        child = self._metrics.requests.labels(*self._labels, outcome.value, endpoint)
        made = self._by_outcome[outcome, endpoint] = Counted(self._metrics.batch, child)
        return made


class Metrics:
    """Every metric of one router process."""

    def __init__(
        self,
        graders: Collection[str] = (),
        prices: Mapping[str, Price] | None = None,
        student_price: Price | None = None,
    ) -> None:
        """`graders`: names whose series of grades begin at zero. `prices`: by upstream; a student that has
        none has `student_price`."""
        self._graders = graders
        self._dir = _multiproc_dir()
        self._host = None if self._dir is None else HostExposition(self._dir, _alive)
        self.batch = Batch()
        self._registry = reg = CollectorRegistry()
        arm = ["route", "arm", "upstream"]
        self.requests = Counter(
            "stillhouse_requests_total",
            "Requests by how they ended for the arm they were assigned to.",
            [*arm, "outcome", "endpoint"],
            registry=reg,
        )
        self.responses = Counter(
            "stillhouse_responses_total",
            "Replies by the status code the client got.",
            ["route", "code"],
            registry=reg,
        )
        self.ttft = Histogram(
            "stillhouse_ttft_seconds",
            "Streaming requests: arrival to the first byte of the answer.",
            arm,
            buckets=SECONDS_BUCKETS,
            registry=reg,
        )
        self.tpot = Histogram(
            "stillhouse_tpot_seconds",
            "Streaming requests: time per output token after the first.",
            arm,
            buckets=TPOT_BUCKETS_S,
            registry=reg,
        )
        self.e2e = Histogram(
            "stillhouse_e2e_seconds",
            "Arrival to the end of the answer.",
            arm,
            buckets=SECONDS_BUCKETS,
            registry=reg,
        )
        self.prompt_tokens = Counter("stillhouse_prompt_tokens_total", "Prompt tokens.", arm, registry=reg)
        self.completion_tokens = Counter(
            "stillhouse_completion_tokens_total", "Completion tokens.", arm, registry=reg
        )
        self.in_flight = Gauge(
            "stillhouse_in_flight",
            "Requests assigned and not ended.",
            arm,
            registry=reg,
            multiprocess_mode="livesum",
        )
        self.splits = SplitMetrics(reg, prices, student_price)
        self.overhead = Histogram(
            "stillhouse_router_overhead_seconds",
            "Time spent in the router between a request's last byte and asking the upstream.",
            ["route"],
            buckets=OVERHEAD_BUCKETS_S,
            registry=reg,
        )
        self.cascades = CascadeMetrics(reg, self.batch, self.prompt_tokens, self.completion_tokens)
        self._help(reg)
        self._log(reg)
        self._grading(reg)
        self._keys_and_state(reg)
        self._arms: dict[tuple[str, str, str], ArmMetrics] = {}
        self._responses: dict[tuple[str, int], Counted] = {}
        self._overheads: dict[str, Observed] = {}

    def _help(self, reg: CollectorRegistry) -> None:
        self.fallbacks = Counter(
            "stillhouse_fallbacks_total",
            "Requests that another arm was asked for because theirs failed.",
            ["route"],
            registry=reg,
        )
        self.shadows_dropped = Counter(
            "stillhouse_shadows_dropped_total",
            "Shadow and mirrored requests that were not sent: the hour's budget was spent, or too many ran.",
            ["route", "reason"],
            registry=reg,
        )
        self.ejections = Counter(
            "stillhouse_ejections_total",
            "Times a replica of an upstream failed so often that it is left alone.",
            ["upstream"],
            registry=reg,
        )
        self.retries = Counter(
            "stillhouse_retries_total",
            "Requests tried again within their arm.",
            ["route", "arm"],
            registry=reg,
        )

    def _log(self, reg: CollectorRegistry) -> None:
        self.log_rows = Counter("stillhouse_log_rows_total", "Rows written to the request log.", registry=reg)
        self.log_dropped = Counter(
            "stillhouse_log_dropped_total", "Rows lost before they were written.", registry=reg
        )
        self.log_unredacted = Counter(
            "stillhouse_log_unredacted_total",
            "Rows written without their texts because a detector failed.",
            registry=reg,
        )
        self.log_uploads = Counter(
            "stillhouse_log_uploads_total",
            "Log segments sent to the remote folder, by result (ok, error).",
            ["result"],
            registry=reg,
        )
        self.log_queue = Gauge(
            "stillhouse_log_queue",
            "Rows waiting to be written.",
            registry=reg,
            multiprocess_mode="livesum",
        )

    def _grading(self, reg: CollectorRegistry) -> None:
        self.feedback = Counter(
            "stillhouse_feedback_total",
            "Judgements of users, each once.",
            ["route", "arm", "verdict"],
            registry=reg,
        )
        self.served_dropped = Counter(
            "stillhouse_served_ids_dropped_total",
            "Request ids that were not stored, so that feedback on them is refused.",
            registry=reg,
        )
        self.grader_errors = Counter(
            "stillhouse_grader_errors_total", "Exceptions of a grader.", ["grader"], registry=reg
        )
        self.grades = Counter(
            "stillhouse_grades_total",
            "Answers (arm 'pair': pairs of answers) by a grader's score: pass 1, fail 0, partial between.",
            ["route", "arm", "grader", "verdict"],
            registry=reg,
        )
        self.ungraded = Counter(
            "stillhouse_ungraded_total", "Answers a grader gave no score.", ["grader", "reason"], registry=reg
        )
        self.judge_calls = Counter(
            "stillhouse_judge_calls_total",
            "Calls of judges by result: ok, unparsed (not exactly one verdict), failed.",
            ["grader", "result"],
            registry=reg,
        )
        self.judge_dropped = Counter(
            "stillhouse_judge_dropped_total",
            "Answers and pairs not shown to a judge: budget, busy, too_long.",
            ["grader", "reason"],
            registry=reg,
        )

    def _keys_and_state(self, reg: CollectorRegistry) -> None:
        self.key_requests = Counter(
            "stillhouse_key_requests_total", "Requests by API key (its id).", ["key"], registry=reg
        )
        self.key_refused = Counter(
            "stillhouse_key_refused_total",
            "Requests refused because of their API key, or its absence.",
            ["reason"],
            registry=reg,
        )
        self.state_errors = Counter(
            "stillhouse_state_errors_total", "Failed reads and writes of the state store.", registry=reg
        )
        self.state_read = Gauge(
            "stillhouse_state_read_timestamp_seconds",
            "When splits were last read from the state store (the longest ago over router processes).",
            registry=reg,
            multiprocess_mode="livemin",
        )
        self.ledger_backlog = Gauge(
            "stillhouse_ledger_backlog",
            "Lines of evidence that are counted and not yet in the state store.",
            registry=reg,
            multiprocess_mode="livesum",
        )

    def arm(self, route: str, arm: str, upstream: str) -> ArmMetrics:
        """The children of an arm, made at its first use."""
        key = (route, arm, upstream)
        found = self._arms.get(key)
        if found is None:
            found = self._arms[key] = ArmMetrics(self, route, arm, upstream)
        return found

    def response(self, route: str, status: int) -> None:
        """Count a reply of a route."""
        child = self._responses.get((route, status))
        if child is None:
            child = Counted(self.batch, self.responses.labels(route, str(status)))
            self._responses[route, status] = child
        child.inc()

    def overhead_of(self, route: str) -> Observed:
        """The overhead of a route, whatever the arm."""
        found = self._overheads.get(route)
        if found is None:
            found = Observed(self.batch, self.overhead.labels(route), OVERHEAD_BUCKETS_S)
            self._overheads[route] = found
        return found

    def know(self, split: Split) -> None:
        """A split is in force: publish it and start its series at zero, so that rates of a fresh arm work."""
        self.splits.know(split)
        self.fallbacks.labels(split.route)
        for reason in SHADOW_DROPS:
            self.shadows_dropped.labels(split.route, reason)
        for upstream in split.upstreams:
            arm = Arm.STABLE if upstream is split.stable else Arm.CANARY
            self.arm(split.route, arm.value, upstream.name)
            self.cascades.know(split.route, arm.value, upstream)
            self.retries.labels(split.route, arm.value)
            self.ejections.labels(upstream.name)
            for grader, verdict in product(self._graders, ("pass", "fail")):
                self.grades.labels(split.route, arm.value, grader, verdict)

    def graded(self, route: str, arm: str, grader: str, score: float) -> None:
        """Count a score."""
        verdict = "pass" if score == 1.0 else "fail" if score == 0.0 else "partial"
        self.grades.labels(route, arm, grader, verdict).inc()

    def refused(self, status: int, endpoint: str, route: str = OTHER) -> None:
        """Count a request that the router itself turned away."""
        self.requests.labels(route, NONE, NONE, Outcome.REJECTED.value, endpoint).inc()
        self.response(route, status)

    async def scrape(self) -> bytes:
        """What every process of this host has counted so far."""
        self.batch.flush()
        if self._dir is not None:
            await asyncio.sleep(2 * FLUSH_S)  # so that what the other processes gathered is in it too
        return await asyncio.to_thread(self._expose)

    def _expose(self) -> bytes:
        if self._dir is None or self._host is None:
            return generate_latest(self._registry)
        _bury_dead(self._dir)
        return self._host.text()


def _multiproc_dir() -> Path | None:
    name = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not name:
        return None
    if values.ValueClass is values.MutexValue:
        raise ConfigError(
            "PROMETHEUS_MULTIPROC_DIR was set after prometheus_client was imported; "
            "set it in the environment that the process starts with."
        )
    path = Path(name)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _bury_dead(folder: Path) -> None:
    """Drop the live gauges of processes that no longer exist; their counters stay."""
    for file in folder.iterdir():
        live = _LIVE_FILE.match(file.name)
        if live is None or _alive(int(live[1])):
            continue
        try:
            mark_process_dead(int(live[1]), str(folder))  # type: ignore[no-untyped-call]
        except FileNotFoundError:  # another process buried it in the same moment
            continue


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() if Path("/proc").exists() else True
