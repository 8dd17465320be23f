"""What a platform engineer says about a route, apart from its split: names, defaults, limits, shadow, log.

Versioned and stored in the state store; every router takes a newer version over within a second. Made by the
stack's configuration and the admin API, read by serve.router. Knows nothing about HTTP.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Any

from pydantic import Field, field_validator

from contracts.config import Record
from contracts.traffic import NAME, LogMode, Upstream

PROTECTED = frozenset(("model", "messages", "prompt", "input", "stream"))
"""Fields of a request that no default may fill in."""


class LogPolicy(Record):
    """Which requests are logged, and how much of them."""

    mode: LogMode = LogMode.FULL
    sample: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the conversations that are logged, chosen by the conversation's hash."""


class Priority(IntEnum):
    """Who waits for whom when a route is full; lower goes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Affinity(StrEnum):
    """Which replica of an upstream is preferred while it is not much busier than the idlest."""

    NONE = "none"
    CONVERSATION = "conversation"
    PREFIX = "prefix"
    """Requests with the same head go to the same replica, for vLLM's prefix cache."""


class RouteLimits(Record):
    """How much of a route may run at once, per router process, and how much may be asked for."""

    max_in_flight: int | None = Field(default=None, ge=1)
    """Requests running at once; None: no bound."""
    max_queued: int = Field(default=128, ge=0)
    """Requests waiting for one of those places; above it: 429 with Retry-After."""
    queue_s: float = Field(default=10.0, gt=0)
    """Longest wait for a place; then 429."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Completion tokens a request may ask for; more is refused, none asked for means this many."""


class RouteTimeouts(Record):
    """Seconds to wait for this route's upstreams; None: as long as the router does everywhere."""

    first_byte_s: float | None = Field(default=None, gt=0)
    """From asking an upstream to the first byte of its body; a failure here can still fall back."""
    between_chunks_s: float | None = Field(default=None, gt=0)
    total_s: float | None = Field(default=None, gt=0)
    """For the whole exchange: queue, retries and helpers included."""


class ShadowFields(Record):
    """How much of the traffic a shadow sees."""

    share: float = Field(gt=0.0, le=1.0)
    """Share of the conversations."""
    per_hour: int | None = Field(default=None, ge=1)
    """Most shadow requests an hour and router process; None: no bound."""
    max_in_flight: int = Field(default=16, ge=1)
    """Running at once, per router process; further ones are dropped and counted."""


class Shadow(ShadowFields):
    """A second upstream that sees a sample of the traffic; its answers are logged and thrown away."""

    upstream: Upstream


class RouteFields(Record):
    """The settings of a route that name no upstream. The defaults change nothing."""

    aliases: tuple[str, ...] = ()
    """Further model names that mean this route."""
    default: bool = False
    """Answers requests whose model name nobody knows."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Request fields that are filled in when the client leaves them out, e.g. {"temperature": 0}."""
    limits: RouteLimits = RouteLimits()
    timeouts: RouteTimeouts = RouteTimeouts()
    affinity: Affinity = Affinity.NONE
    log: LogPolicy = LogPolicy()

    @field_validator("aliases")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [a for a in value if not 0 < len(a) <= 128 or not a.isprintable()]
        if wrong:
            raise ValueError(f"an alias is 1 to 128 printable characters, not {wrong[0]!r}")
        return value

    @field_validator("parameters")
    @classmethod
    def _defaults_only(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := PROTECTED & set(value):
            raise ValueError(f"{', '.join(sorted(taken))} belong to the client and cannot have a default")
        return value


class RouteSettings(RouteFields):
    """Everything about one route that is not its split."""

    route: str = Field(pattern=NAME)
    version: int = Field(default=0, ge=0)
    """0: the defaults, never stored; the first ones stored are 1."""
    fallbacks: tuple[Upstream, ...] = ()
    """Asked in this order when the assigned arm, and stable, failed before their first byte."""
    shadow: Shadow | None = None
