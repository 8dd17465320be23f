"""Configuration of the router: what it reads, how long it waits, where it logs.

Importable without ray or prometheus_client. Knows nothing about splits: those live in the state store.
"""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from contracts.config import StrictConfig
from contracts.detectors import BUILT_IN
from contracts.grading import GraderSet
from contracts.logs import LogConfig
from contracts.price import Price
from contracts.traffic import Upstream

_DETECTOR = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


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
    detectors: tuple[str, ...] = Field(default=tuple(BUILT_IN), min_length=1)
    """What rows of mode 'redacted' are searched for: built-in names, or 'module:function', called off the hot
    path as (text) -> iterable of (start, end, label)."""
    upload: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9+.-]*://.+$")
    """fsspec URL of a folder that final segments are copied to, e.g. s3://bucket/prefix; None: nowhere."""
    keep_local: bool = True
    """False: a segment is removed from `dir` once it was uploaded."""
    retention_days: float | None = Field(default=None, gt=0)
    """Segments older than this are deleted, in `dir` and at `upload`; None: never."""

    @field_validator("detectors")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in BUILT_IN and not _DETECTOR.match(name):
                raise ValueError(f"{name!r} is none of {', '.join(BUILT_IN)}, and not 'module:function'")
        return value


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


class RouterConfig(GraderSet):
    """Everything one router process needs; all replicas of a router share it."""

    state_url: str
    """SQLAlchemy URL of the state store."""
    routes: tuple[str, ...] = ()
    """Routes that must be there before the router is ready; empty: at least one route of any name."""
    log: RequestLogConfig | None = None
    """None: no request log; graders need one, because they run in its threads."""
    upstreams: dict[str, Upstream] = Field(default_factory=dict)
    """The upstreams that graders name: judges, and what pairs are compared with."""
    prices: dict[str, Price] = Field(default_factory=dict)
    """Upstream name → its price, exported with the metrics; one without a price has no cost series."""
    student_price: Price | None = None
    """The price of every student that `prices` does not name."""
    mirror_in_flight: int = Field(default=16, ge=1)
    """Mirrored requests running at once; further ones are dropped and counted."""
    mirror_per_hour: int | None = Field(default=None, ge=1)
    """Most mirrored requests an hour and router process; None: no bound but the split's share."""
    feedback: bool = True
    """Take `POST /v1/feedback`, and store the ids of answered requests for it."""
    feedback_days: float = Field(default=7.0, gt=0)
    """How long after its request feedback is taken. A request costs some 190 bytes in the store meanwhile."""
    served_queue: int = Field(default=50_000, ge=1)
    """Request ids waiting to be stored; above it they are dropped and counted."""
    logging: LogConfig = LogConfig()
    """How the router's processes log; `log` is the request log."""
    tracing: TracingConfig | None = None
    """None: no traces, and a client's `traceparent` is passed on as it is."""
    poll_s: float = Field(default=0.2, gt=0, le=5)
    """How often splits and endpoints are read."""
    flush_s: float = Field(default=1.0, gt=0, le=30)
    """How often evidence and the router's report are written."""
    keys: bool = False
    """No request without an API key; False: everybody may ask for everything."""
    timeouts: Timeouts = Timeouts()
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    """Request line and headers together."""
    max_json_depth: int = Field(default=128, ge=4, le=250)
    """How deep lists and objects of a body may be nested."""
    fallback: bool = True
    """An arm that fails before its first byte is helped out: the canary by stable, then by the route's
    fallbacks in order. The assigned arm is still charged."""
    conversation_header: str = Field(default="x-stillhouse-conversation", pattern=r"^[a-z0-9-]+$")
    """Header that names the conversation; lower case."""
    allow_override: bool = True
    """Honour `x-stillhouse-arm: stable|canary` (never evidence); False: the header is ignored."""
    eject_s: float = Field(default=1.0, gt=0)
    """How long a failing replica is left alone at first; each further time twice as long."""
    eject_max_s: float = Field(default=30.0, gt=0)
    """Longest time a failing replica is left alone before one request may try it again."""
    eject_failures: int = Field(default=5, ge=1)
    """Failures in a row after which a replica is left alone; a refused connection is enough by itself."""
    retry_ratio: float = Field(default=0.2, ge=0, le=1)
    """Retries as a share of a route's requests; above it a failure goes straight to the next arm."""
    endpoint_max_age_s: float = Field(default=15.0, gt=0)
    """Replicas whose heartbeat is older are avoided while fresher ones live."""
    drain_s: float = Field(default=60.0, gt=0)
    """How long a router that stops waits for its streams to end."""

    @model_validator(mode="after")
    def _graders_fit(self) -> RouterConfig:
        for upstream, field in self.upstreams_named().items():
            if upstream not in self.upstreams:
                known = ", ".join(sorted(self.upstreams)) or "none"
                raise ValueError(f"{field}: there is no upstream {upstream!r}; there are: {known}")
        if self.graders and self.log is None:
            raise ValueError("graders run in the request log's threads: give 'log' too")
        return self
