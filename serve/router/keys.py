"""Who may ask: the API keys in force in one router process, their scopes and their limits.

A secret is hashed and looked up; it is kept nowhere and appears in no message. Nothing here waits or touches
the state store (keysync.py does). Owned by one event loop. Knows nothing about upstreams.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from prometheus_client import Counter

from contracts.keys import ApiKey
from serve.router.errors import RequestRefused
from serve.router.metrics import Metrics
from serve.router.windows import MINUTE_S, UsageBook, rate, reset_s, wait_s

HeaderLines = Iterable[tuple[bytes, bytes]]

_LONGEST_SECRET = 128
"""Secrets have 49 bytes; nothing longer is worth hashing."""
_LIMIT_HEADERS = {
    what: tuple(f"x-ratelimit-{fact}-{what}".encode() for fact in ("limit", "remaining", "reset"))
    for what in ("requests", "tokens")
}
_CHALLENGE = ((b"www-authenticate", b"Bearer"),)


class KeyTable:
    """The keys of one router process. With `on` False everybody may ask for everything, uncounted."""

    def __init__(self, on: bool, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self.on = on
        self.book = UsageBook()
        self.loaded = False
        """True once the state store was read."""
        self._clock = clock
        self._metrics = metrics
        self._by_digest: dict[bytes, ApiKey] = {}
        self._requests: dict[str, Counter] = {}

    def apply(self, keys: Iterable[ApiKey]) -> None:
        """These keys, and no others, are in force from now on."""
        found = list(keys)
        self._by_digest = {bytes.fromhex(key.digest): key for key in found}
        self._requests = {key.id: self._metrics.key_requests.labels(key.id) for key in found}
        self.loaded = True

    def missing(self) -> list[str]:
        """What is not there yet, for readiness."""
        return ["the API keys"] if self.on and not self.loaded else []

    def identify(self, headers: HeaderLines) -> ApiKey | None:
        """Whose request this is; None when keys are off. Raises: RequestRefused (401, 503)."""
        if not self.on:
            return None
        if not self.loaded:
            self._refuse("not_loaded", "The router has not read its API keys yet.", 503, kind="server_error")
        secret = secret_of(headers)
        if secret is None:
            self._unauthorized(
                "missing", "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'."
            )
        if len(secret) > _LONGEST_SECRET:
            self._unauthorized("unknown", "Incorrect API key provided.")
        key = self._by_digest.get(hashlib.sha256(secret).digest())
        if key is None:
            self._unauthorized("unknown", "Incorrect API key provided.")
        if key.disabled:
            self._unauthorized("disabled", "This API key is disabled.")
        if key.expires_at is not None and self._clock() >= key.expires_at:
            self._unauthorized("expired", "This API key has expired.")
        return key

    def admit(self, headers: HeaderLines) -> ApiKey | None:
        """Identify, hold the key to its limits and count the request. Raises: RequestRefused (also 429)."""
        key = self.identify(headers)
        if key is not None:
            now = self._clock()
            self._check_limits(key, now)
            self.book.add(key.id, now, 1, 0, 0)
            self._requests[key.id].inc()
        return key

    def check_route(self, key: ApiKey | None, route: str) -> None:
        """Raises: RequestRefused (403) when the key is not for this route."""
        if not in_scope(key, route):
            self._refuse(
                "route", f"This API key may not use the model {route!r}.", 403, "model_not_allowed", "model"
            )

    def ended(self, key_id: str | None, prompt: int | None, completion: int | None) -> None:
        """A request of this key has ended: its tokens are spent now."""
        if key_id is not None and (prompt or completion):
            self.book.add(key_id, self._clock(), 0, prompt or 0, completion or 0)

    def limit_lines(self, key: ApiKey) -> tuple[tuple[bytes, bytes], ...]:
        """Response headers with the key's limits, as they stand now; none where it has none."""
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            return ()
        return tuple(line for limit in self._limits(key, self._clock()) for line in limit.lines())

    def _check_limits(self, key: ApiKey, now: float) -> None:
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            return
        limits = self._limits(key, now)
        worst = max(limits, key=lambda s: s.wait_s)
        if worst.wait_s:
            self._refuse(
                worst.what,
                f"Rate limit reached: {worst.limit} {worst.what} per minute. Try again in {worst.wait_s} s.",
                429,
                "rate_limit_exceeded",
                kind=worst.what,
                headers=(
                    (b"retry-after", b"%d" % worst.wait_s),
                    *(line for limit in limits for line in limit.lines()),
                ),
            )

    def _limits(self, key: ApiKey, now: float) -> list[_Limit]:
        minute = int(now // MINUTE_S)
        previous, current = self.book.spent(key.id, minute - 1), self.book.spent(key.id, minute)
        wanted = (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute))
        return [
            _Limit(what, limit, previous[at], current[at], now)
            for at, (what, limit) in enumerate(wanted)
            if limit is not None
        ]

    def _unauthorized(self, reason: str, message: str) -> NoReturn:
        self._refuse(reason, message, 401, "invalid_api_key", headers=_CHALLENGE)

    def _refuse(
        self,
        reason: str,
        message: str,
        status: int,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> NoReturn:
        self._metrics.key_refused.labels(reason).inc()
        raise RequestRefused(message, status, code, param, kind=kind, headers=headers)


class _Limit:
    """One limit of a key at one moment."""

    __slots__ = ("left", "limit", "reset_s", "wait_s", "what")

    def __init__(self, what: str, limit: int, previous: int, current: int, now: float) -> None:
        self.what = what
        self.limit = limit
        self.wait_s = wait_s(previous, current, limit, now)
        """Until the next request passes."""
        self.reset_s = reset_s(previous, current, now)
        self.left = max(0, int(limit - rate(previous, current, now)))

    def lines(self) -> tuple[tuple[bytes, bytes], ...]:
        """Response headers by OpenAI's names: the limit, what is left, when all is there again."""
        limit, left, reset = _LIMIT_HEADERS[self.what]
        return (limit, b"%d" % self.limit), (left, b"%d" % self.left), (reset, b"%ds" % self.reset_s)


def in_scope(key: ApiKey | None, route: str) -> bool:
    """True when the key may ask for the route; without a key everybody may."""
    return key is None or key.routes is None or route in key.routes


def secret_of(headers: HeaderLines) -> bytes | None:
    """The key a client sent: OpenAI's clients as a bearer token, Anthropic's as x-api-key."""
    found = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, rest = value.partition(b" ")
            if scheme.lower() == b"bearer":
                return rest.strip()
        elif name == b"x-api-key":
            found = value.strip()
    return found
