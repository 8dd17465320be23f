"""Hook nouns: who is told of a rollout's moves, and who is asked before one.

A URL comes from the operator's policy only, and a secret is never here: only the name of the environment
variable that holds it. Knows nothing about HTTP or about when a rollout moves.
"""

from __future__ import annotations

from enum import StrEnum
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from contracts.config import Record

EVENTS = (
    "started", "warming", "step", "ramping", "held", "paused", "resumed", "watching", "promoting", "promoted",
    "restored", "rolling_back", "rolled_back", "aborted",
)  # fmt: skip
"""What a hook can be told of. `step`: a step of the ramp began; `restored`: the former champion came back."""
_ENV = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"


class HookPoint(StrEnum):
    """A move that a hook is asked about first."""

    BEFORE_START = "before_start"
    """Before the student is deployed."""
    BEFORE_STEP = "before_step"
    """Before each step of the ramp, the first one too."""
    BEFORE_PROMOTE = "before_promote"
    """Before the student gets all traffic by its evidence."""


class HookSpec(Record):
    """One webhook: told of events (`on`), or asked before a move (`confirm`). Exactly one of the two."""

    name: str = Field(default="", max_length=60)
    """How it is called in sentences; default: the URL's host."""
    on: tuple[str, ...] = ()
    """Events it is told of, at least once each and in order; '*' is all of them."""
    confirm: HookPoint | None = None
    """Asked before this move: 2xx lets it happen, 4xx holds it, anything else is an error and asked again."""
    url: str | None = None
    """Where to POST; http or https, no user or password in it."""
    url_env: str | None = Field(default=None, pattern=_ENV)
    """Environment variable of the controller that holds the URL, for URLs that are secrets themselves."""
    secret_env: str | None = Field(default=None, pattern=_ENV)
    """Environment variable of the controller that holds the signing secret; without it nothing is signed."""
    timeout_s: float = Field(default=5.0, gt=0, le=30)
    retries: int = Field(default=8, ge=0, le=20)
    """Tries after the first one. A message is a dead letter then; a question pauses the rollout."""

    @model_validator(mode="after")
    def _check(self) -> HookSpec:
        if bool(self.on) == (self.confirm is not None):
            raise ValueError("hook: give exactly one of 'on' (events to be told of) and 'confirm'")
        unknown = sorted(set(self.on) - {*EVENTS, "*"})
        if unknown:
            raise ValueError(f"hook: no event {', '.join(unknown)}; there are {', '.join(EVENTS)} and '*'")
        if (self.url is None) == (self.url_env is None):
            raise ValueError("hook: give exactly one of 'url' and 'url_env'")
        if self.url is not None:
            check_url(self.url)
        return self

    @property
    def label(self) -> str:
        """Its name for people; never the whole URL, whose path may be a secret."""
        return self.name or (urlsplit(self.url).hostname if self.url else self.url_env) or "hook"


def check_url(url: str) -> None:
    """Raises ValueError unless this is a plain http(s) URL with a host and without credentials."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("hook: url must start with http:// or https:// and name a host")
    if parts.username or parts.password:
        raise ValueError("hook: no user or password in the url; sign with 'secret_env' instead")
