"""API keys: who may ask for what, how often, and how much of it is logged.

A key's secret is shown once and never stored: the record holds its SHA-256. Made by the admin API, read by
serve.router. Knows nothing about HTTP or storage.
"""

from __future__ import annotations

from pydantic import Field

from contracts.config import Record
from contracts.routes import LogPolicy, Priority
from contracts.traffic import NAME


class ApiKey(Record):
    """One key, without its secret."""

    id: str = Field(pattern=NAME)
    name: str = Field(min_length=1, max_length=128)
    """Whose it is, for people."""
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the secret, hex. Secrets are 256 random bits, so a slow hash would protect nothing more."""
    admin: bool = False
    """May use the admin API."""
    routes: tuple[str, ...] | None = None
    """Routes it may ask for; None: all of them."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompt and completion tokens; a request is refused once the minute's are spent."""
    priority: Priority = Priority.NORMAL
    log: LogPolicy | None = None
    """Instead of the route's policy, where it logs less."""
    created_at: float
    """Unix seconds."""
    expires_at: float | None = None
    """Unix seconds; refused from then on."""
    disabled: bool = False


class KeyUsage(Record):
    """What one key used in one hour, summed over all routers."""

    key_id: str
    hour: int
    """Unix hour: seconds // 3600."""
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
