"""OpenTelemetry traces of requests, refused ones too, with the GenAI attributes. Off unless configured.

On the event loop a request costs two random numbers and a header line; its span is made of the ended exchange
in a thread, and exported by the SDK's own. The texts of requests and answers are in no span. Knows nothing
about sockets or arms' merits.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import urlsplit

from contracts.errors import ConfigError
from contracts.logs import about
from serve.router.config import TracingConfig
from serve.router.errors import RequestRefused
from serve.router.exchange import Exchange

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.trace import Span

_log = logging.getLogger("stillhouse.router")
_TRACEPARENT = re.compile(
    rb"^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
)
_PAUSE_S = 0.1
_QUEUE = 4096
_LONGEST = 256
_INT64 = 2**63
"""OTLP has no larger integers; one would cost the whole batch."""
_EXPORT_S = 3.0
"""For one export, retries included; a router that leaves waits for its last one."""
_SERVICE = "stillhouse-router"
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_NUMBERS = ("temperature", "top_p", "top_k", "max_tokens", "frequency_penalty", "presence_penalty", "seed")


class SpanStart(NamedTuple):
    """What is decided of a span when its request arrives."""

    trace_id: int
    span_id: int
    parent_id: int | None
    sampled: bool

    def header(self) -> bytes:
        """The header line by which the upstream continues the trace."""
        return b"traceparent: 00-%032x-%016x-%02x\r\n" % (self.trace_id, self.span_id, self.sampled)


class Refusal(NamedTuple):
    """A request that the router itself turned away, before any upstream was asked."""

    request_id: str
    endpoint: str
    ts: float
    """When it arrived, Unix seconds."""
    why: RequestRefused
    traceparent: bytes | None


class Tracer:
    """The traces of one router process."""

    def __init__(self, config: TracingConfig, replica: str) -> None:
        self._sample = config.sample
        self._ids = _Ids()
        self._provider = _provider(config, replica, self._ids)
        self._tracer = self._provider.get_tracer("stillhouse.router")
        self._ended: deque[Exchange | tuple[Refusal, SpanStart, float]] = deque(
            maxlen=_QUEUE
        )  # full: the oldest are lost, nobody waits
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="router-tracing", daemon=True)

    def start(self) -> None:
        """Begin to export."""
        self._thread.start()

    def begin(self, traceparent: bytes | None) -> SpanStart:
        """Continue the client's trace and its decision to sample, or begin a trace and decide."""
        span_id = random.getrandbits(64) or 1
        parent = _TRACEPARENT.match(traceparent) if traceparent else None
        if parent is None:
            return SpanStart(random.getrandbits(128) or 1, span_id, None, random.random() < self._sample)
        sampled = bool(int(parent[3], 16) & 1)
        return SpanStart(int(parent[1], 16), span_id, int(parent[2], 16), sampled)

    def submit(self, ex: Exchange) -> None:
        """An exchange ended. Never waits."""
        if ex.span is not None and ex.span.sampled:
            self._ended.append(ex)

    def refuse(self, refusal: Refusal) -> None:
        """A request was turned away. Never waits."""
        start = self.begin(refusal.traceparent)
        if start.sampled:
            self._ended.append((refusal, start, time.time()))

    def stop(self) -> None:
        """Export what there is. Blocks."""
        self._stop.set()
        self._thread.join()
        self._provider.shutdown()

    def _run(self) -> None:
        while True:
            stopping = self._stop.wait(_PAUSE_S)
            while self._ended:
                self._record_safely(self._ended.popleft())
            if stopping:
                return

    def _record_safely(self, item: Exchange | tuple[Refusal, SpanStart, float]) -> None:
        try:
            if isinstance(item, Exchange):
                self._record(item)
            else:
                self._record_refusal(*item)
        except Exception:  # noqa: BLE001 reason: one odd request must not end the traces of all others
            which = item if isinstance(item, Exchange) else item[0]
            _log.exception("a request has no span", extra=about(which.request_id))

    def _record(self, ex: Exchange) -> None:
        from opentelemetry.trace import StatusCode

        assert ex.span is not None
        attributes = attributes_of(ex)
        begun = int(ex.ts * 1e9)
        name = f"{attributes['gen_ai.operation.name']} {attributes['gen_ai.request.model']}"
        span = self._start(name, ex.span, attributes, begun)
        if ex.ttft_s is not None:
            span.add_event("first token", timestamp=begun + int(ex.ttft_s * 1e9))
        if ex.outcome.failed and not (ex.fell_back and ex.status < 400):
            span.set_status(StatusCode.ERROR, ex.error)
        span.end(begun + int(ex.e2e_s * 1e9))

    def _record_refusal(self, refusal: Refusal, start: SpanStart, ended: float) -> None:
        """As semantic conventions have it for servers: a client's mistake is no error of the span."""
        from opentelemetry.trace import StatusCode

        attributes = refusal_attributes(refusal)
        name = attributes["gen_ai.operation.name"]
        span = self._start(name, start, attributes, int(refusal.ts * 1e9))
        if refusal.why.status >= 500:
            span.set_status(StatusCode.ERROR, str(refusal.why))
        span.end(int(max(refusal.ts, ended) * 1e9))

    def _start(self, name: str, start: SpanStart, attributes: dict[str, Any], begun: int) -> Span:
        from opentelemetry.trace import SpanKind

        self._ids.span_id, self._ids.trace_id = start.span_id, start.trace_id
        return self._tracer.start_span(
            name,
            context=_parent_context(start),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=begun,
        )


def refusal_attributes(refusal: Refusal) -> dict[str, Any]:
    """A refusal's attributes: nothing of the body, which may be anything, and no key."""
    found = {
        "gen_ai.operation.name": _operation(refusal.endpoint),
        "error.type": refusal.why.body["error"]["code"] or str(refusal.why.status),
        "http.response.status_code": refusal.why.status,
        "url.path": refusal.endpoint,
        "stillhouse.request_id": refusal.request_id,
        "stillhouse.route": refusal.why.route,
    }
    return {name: value for name, value in found.items() if value is not None}


def attributes_of(ex: Exchange) -> dict[str, Any]:
    """A span's attributes; what is not known is left out."""
    answer, model = ex.answered()
    split = ex.route.split
    found: dict[str, Any] = {
        "gen_ai.operation.name": _operation(ex.endpoint),
        "gen_ai.provider.name": _provider_name(ex),
        "gen_ai.request.model": ex.body["model"][:_LONGEST],
        "gen_ai.request.stream": ex.stream,
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": [answer.finish_reason] if answer.finish_reason else None,
        "gen_ai.usage.input_tokens": ex.prompt_tokens,
        "gen_ai.usage.output_tokens": ex.completion_tokens,
        "error.type": _error_type(ex),
        "http.response.status_code": ex.status,
        "url.path": ex.endpoint,
        "stillhouse.request_id": ex.request_id,
        "stillhouse.route": split.route,
        "stillhouse.arm": ex.assignment.arm.value,
        "stillhouse.served_arm": ex.served_arm.value,
        "stillhouse.upstream": ex.served.name,
        "stillhouse.split_version": split.version,
    }
    for name in _NUMBERS:
        value = ex.body.get(name)
        if type(value) is float or (type(value) is int and abs(value) < _INT64):
            found[f"gen_ai.request.{name}"] = value
    return {name: value for name, value in found.items() if value is not None}


def _operation(endpoint: str) -> str:
    return _OPERATIONS.get(endpoint) or endpoint.rsplit("/", 1)[-1]


def _provider_name(ex: Exchange) -> str:
    """vLLM where we run it ourselves; of a plain URL only the API it speaks is known."""
    if ex.served.app is not None:
        return "vllm"
    return "anthropic" if ex.endpoint.startswith("/v1/messages") else "openai"


def _error_type(ex: Exchange) -> str | None:
    if ex.outcome.value == "ok":
        return None
    return str(ex.status) if ex.outcome.value == "client_error" else ex.outcome.value


class _Ids:
    """The SDK's source of ids: those that were decided when the request arrived, set before each span."""

    span_id = 0
    trace_id = 0

    def generate_span_id(self) -> int:
        return self.span_id

    def generate_trace_id(self) -> int:
        return self.trace_id

    def is_trace_id_random(self) -> bool:
        """Whether its trace ids are random, for the SDK."""
        return True


def _parent_context(start: SpanStart) -> Any:
    """The client's span as the parent; an empty context when there is none."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if start.parent_id is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED)
    parent = SpanContext(start.trace_id, start.parent_id, is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(parent), Context())


def _provider(config: TracingConfig, replica: str, ids: _Ids) -> TracerProvider:
    """The SDK's pipeline. Raises: ConfigError when it is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
    except ImportError as err:
        raise ConfigError(
            f"tracing needs opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http ({err}): "
            "install them, or remove 'tracing' from the router's configuration."
        ) from err
    resource = Resource.create({"service.name": _SERVICE, "service.instance.id": replica})
    provider = TracerProvider(
        ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=cast("IdGenerator", ids)
    )
    exporter = OTLPSpanExporter(endpoint=_traces_url(config.endpoint), timeout=_EXPORT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    return provider


def _traces_url(endpoint: str) -> str:
    """The collector's URL for traces: with the standard path when it has none."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
