"""The facts of one request, gathered while it runs; its log row is built from them afterwards.

Everything costly (assembling text, building the row) happens in `build`, which the log calls when the client
has its answer. Knows nothing about sockets.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from contracts.cascade import CascadeNote, Why
from contracts.routes import LogPolicy, Priority
from contracts.traffic import Assignment, LogMode, Outcome, Reason, RequestRow, Upstream
from serve.request_log.policy import mode_of
from serve.request_log.subjects import subjects_of
from serve.router.answer import (
    Answer,
    answer_of,
    answer_of_stream,
    model_of,
    model_of_stream,
    usage_tokens,
)
from serve.router.ledger import EvidenceKey
from serve.router.metrics import ArmMetrics
from serve.router.sse import StreamWatcher
from serve.router.table import Route

if TYPE_CHECKING:
    from serve.router.tracing import SpanStart

EVIDENCE_ENDPOINTS = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"))
"""Only generation says something about an arm; tokenize and embeddings do not."""

LOG_EVERYTHING = LogPolicy()


class Step(NamedTuple):
    """What an upstream that is a cascade did with a request."""

    first: Upstream
    by: Upstream
    """Who answers."""
    reason: Why | None = None
    """Why that is not the first."""
    signal: float | None = None
    prompt_tokens: int = 0
    """Of the first, samples included; so are the next."""
    completion_tokens: int = 0

    def note(self) -> CascadeNote:
        """For the log's row."""
        return CascadeNote(
            by=self.by.name,
            reason=self.reason,
            signal=self.signal,
            first=self.first.name,
            first_prompt_tokens=self.prompt_tokens,
            first_completion_tokens=self.completion_tokens,
        )

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """Response headers that say who answered, and why."""
        why = b"first" if self.reason is None else b"then; " + self.reason.value.encode()
        return (b"x-stillhouse-upstream", self.by.name.encode()), (b"x-stillhouse-cascade", why)


class Exchange:
    """One routed request from its assignment to its end."""

    __slots__ = (
        "affinity", "assignment", "body", "body_bytes", "cap", "chunks", "client_wants_usage",
        "completion_tokens", "e2e_s", "ended", "endpoint", "error", "fell_back", "held", "key_id", "limits",
        "log_policy", "metrics", "outcome", "overhead_s", "pair_id", "priority", "prompt_tokens",
        "request_id", "response", "route", "served", "served_arm", "span", "started", "status", "step",
        "stream", "streamed", "trace", "ts", "ttft_s", "watcher",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        endpoint: str,
        route: Route,
        assignment: Assignment,
        body: dict[str, Any],
        started: float,
        trace: bytes,
    ) -> None:
        self.request_id = request_id
        self.endpoint = endpoint
        self.route = route
        self.assignment = assignment
        self.body = body
        self.started = started
        self.trace = trace
        """Header lines of the client that go on to the upstream."""
        self.ts = time.time()
        self.stream = body.get("stream") is True
        options = body.get("stream_options")
        self.client_wants_usage = options is not None and (
            not isinstance(options, dict) or bool(options.get("include_usage"))
        )
        self.affinity: bytes | None = None
        """What should stay on one replica."""
        self.cap: tuple[str, int] | None = None
        """Field and value of the completion limit that the route sets and the client did not."""
        self.priority = Priority.NORMAL
        self.pair_id: str | None = None
        """Of a shadow: the request it copies."""
        self.key_id: str | None = None
        """The API key that asked; never its secret."""
        self.limits: tuple[tuple[bytes, bytes], ...] = ()
        """Header lines that tell the client where its key's limits stand; none without limits."""
        self.log_policy = LOG_EVERYTHING
        """How much of this request is logged: the stricter of its route's and its key's policy."""
        self.metrics: ArmMetrics
        self.held: tuple[str, ...] = ()
        self.served_arm = assignment.arm
        self.served: Upstream = route.upstream(assignment.arm, assignment.slot) or route.split.stable
        self.step: Step | None = None
        """Of a serving upstream that is a cascade; None of all others."""
        self.fell_back = False
        self.ended = False
        self.outcome = Outcome.OK
        self.status = 0
        self.ttft_s: float | None = None
        self.e2e_s = 0.0
        self.overhead_s = 0.0
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.streamed = False
        self.watcher: StreamWatcher | None = None
        """Sees the stream of the answer, once there is one."""
        self.chunks: list[bytes] = []
        """The stream as the upstream sent it, events whole."""
        self.response: dict[str, Any] | None = None
        self.body_bytes = 0
        """Of the request, and of an answer that is no stream."""
        self.error: str | None = None
        self.span: SpanStart | None = None
        """Its place in a trace; None without tracing."""

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Response headers that say which arm was assigned and who answered."""
        if self.step is None:
            return self.route.headers(self.assignment, self.served)
        return [*self.route.headers(self.assignment, self.served, self.step.by), *self.step.headers()]

    def evidence(self) -> tuple[EvidenceKey, ...]:
        """Where this request counts as evidence, nowhere when it says nothing about its arm."""
        if self.assignment.reason is not Reason.RANDOM or self.endpoint not in EVIDENCE_ENDPOINTS:
            return ()
        return self.route.evidence(self.assignment)

    def take_usage(self, usage: object) -> None:
        """Note the token counts of a usage object."""
        prompt, completion = usage_tokens(usage)
        self.prompt_tokens = prompt if prompt is not None else self.prompt_tokens
        self.completion_tokens = completion if completion is not None else self.completion_tokens

    def tokens_seen(self) -> int | None:
        """A lower bound of the tokens of a stream that ended before its usage came: an event each.

        Without it a client could leave before the last event and never be counted.
        """
        if not self.chunks:
            return None
        return max(0, sum(chunk.count(b"data:") for chunk in self.chunks) - 1)

    def tpot_s(self) -> float | None:
        """Seconds per output token after the first, of a stream with at least two."""
        if self.ttft_s is None or self.completion_tokens is None or self.completion_tokens < 2:
            return None
        return max(0.0, self.e2e_s - self.ttft_s) / (self.completion_tokens - 1)

    def build(self) -> RequestRow:
        """The log row."""
        answer = self._answer()
        assignment, split = self.assignment, self.route.split
        answerer = self.served if self.step is None else self.step.by
        return RequestRow(
            request_id=self.request_id,
            pair_id=self.pair_id,
            ts=self.ts,
            key_id=self.key_id,
            route=split.route,
            endpoint=self.endpoint,
            arm=assignment.arm,
            served_arm=self.served_arm,
            reason=assignment.reason,
            unit_kind=assignment.unit_kind,
            unit_hash=assignment.unit_hash,
            split_version=split.version,
            rollout_id=split.rollout_of(assignment),
            upstream=self.served.name,
            model=answerer.model,
            digest=answerer.digest,
            stream=self.stream,
            status=self.status,
            outcome=self.outcome,
            finish_reason=answer.finish_reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s(),
            e2e_s=self.e2e_s,
            overhead_s=self.overhead_s,
            subjects=subjects_of(self.body),
            request=self.body,
            response_text=answer.text,
            response=self.response,
            error=self.error,
            cascade=None if self.step is None else self.step.note(),
        )

    def size(self) -> int:
        """Bytes of the request and its answer."""
        return self.body_bytes + sum(map(len, self.chunks))

    def log_mode(self) -> LogMode:
        """How much of the row may be written."""
        return mode_of(self.log_policy, self.assignment.unit_hash)

    def answered(self) -> tuple[Answer, str | None]:
        """The answer and the model that it names. Costly: off the hot path only."""
        model = model_of_stream(b"".join(self.chunks[:8])) if self.streamed else model_of(self.response)
        return self._answer(), model

    def _answer(self) -> Answer:
        if self.streamed:
            return answer_of_stream(b"".join(self.chunks))
        return answer_of(self.response)
