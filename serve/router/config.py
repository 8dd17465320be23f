"""Configuration of the router: what it reads, how long it waits, where it logs.

Importable without ray or prometheus_client. Knows nothing about splits: those live in the state store.
"""

from __future__ import annotations

from pydantic import Field

from contracts.config import StrictConfig


class RequestLogConfig(StrictConfig):
    """Where request rows go and how segments are cut."""

    dir: str
    """Folder of the segments; created when missing."""
    rotate_bytes: int = Field(default=64 * 2**20, ge=1024)
    """A segment is closed once it is this large."""
    rotate_s: float = Field(default=300.0, gt=0)
    """A segment with rows is closed once it is this old."""
    queue_rows: int = Field(default=10_000, ge=1)
    """Rows waiting to be written; above it rows are dropped and counted, replies are never delayed."""


class Timeouts(StrictConfig):
    """Seconds the router waits for each part of an exchange."""

    body_s: float = Field(default=30.0, gt=0)
    """For a client to send its whole body."""
    header_s: float = Field(default=30.0, gt=0)
    """For a client to send the head of a request; only where the router listens itself."""
    connect_s: float = Field(default=2.0, gt=0)
    first_byte_s: float = Field(default=120.0, gt=0)
    """From asking an upstream to the first byte of its body; a failure here can still fall back."""
    between_chunks_s: float = Field(default=60.0, gt=0)
    total_s: float = Field(default=600.0, gt=0)
    """For the whole exchange, retries included."""


class TracingConfig(StrictConfig):
    """Where OpenTelemetry traces go."""

    endpoint: str = Field(pattern=r"^https?://[^/\s]+\S*$")
    """An OTLP/HTTP collector, e.g. http://collector:4318; `/v1/traces` is added to a URL without a path.
    Credentials belong into OTEL_EXPORTER_OTLP_HEADERS."""
    sample: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the traces begun here; a client's own trace is exported if the client samples it."""


class RouterConfig(StrictConfig):
    """Everything one router process needs; all replicas of a router share it."""

    state_url: str
    """SQLAlchemy URL of the state store."""
    routes: tuple[str, ...] = ()
    """Routes that must be there before the router is ready; empty: at least one route of any name."""
    log: RequestLogConfig | None = None
    """None: no request log (the grader then does not run either)."""
    grader: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """'module:function', called off the hot path as (request, response_text) -> bool | None."""
    tracing: TracingConfig | None = None
    """None: no traces, and a client's `traceparent` is passed on as it is."""
    poll_s: float = Field(default=0.2, gt=0, le=5)
    """How often splits and endpoints are read."""
    flush_s: float = Field(default=1.0, gt=0, le=30)
    """How often evidence and the router's report are written."""
    timeouts: Timeouts = Timeouts()
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    """Request line and headers together."""
    max_json_depth: int = Field(default=128, ge=4, le=250)
    """How deep lists and objects of a body may be nested."""
    fallback: bool = True
    """A canary that fails before its first byte is answered by stable (and still charged to the canary)."""
    conversation_header: str = Field(default="x-stillhouse-conversation", pattern=r"^[a-z0-9-]+$")
    """Header that names the conversation; lower case."""
    allow_override: bool = True
    """Honour `x-stillhouse-arm: stable|canary` (never evidence); False: the header is ignored."""
    eject_s: float = Field(default=1.0, gt=0)
    """How long a replica that refused a connection is avoided while others live."""
    endpoint_max_age_s: float = Field(default=15.0, gt=0)
    """Replicas whose heartbeat is older are avoided while fresher ones live."""
    drain_s: float = Field(default=60.0, gt=0)
    """How long a router that stops waits for its streams to end."""
