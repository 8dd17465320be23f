"""Which replica of an upstream is asked: least in flight, avoiding those that just refused or went silent.

Owned by one event loop. Knows nothing about HTTP or arms.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable

from contracts.traffic import Upstream
from serve.router.client import Target, target_of
from serve.state.traffic import Endpoint


class Replica:
    """One address that answers for an upstream."""

    __slots__ = ("avoid_until", "in_flight", "seen_at", "target", "url")

    def __init__(self, url: str) -> None:
        self.url = url
        self.target: Target = target_of(url)
        self.in_flight = 0
        self.avoid_until = 0.0
        self.seen_at = float("inf")
        """Last heartbeat, Unix seconds; plain URLs have none and never go stale."""


class Pools:
    """All replicas this router knows, by Serve application and by plain URL."""

    def __init__(self, eject_s: float, max_age_s: float) -> None:
        self._eject_s = eject_s
        self._max_age_s = max_age_s
        self._apps: dict[str, list[Replica]] = {}
        self._urls: dict[str, Replica] = {}
        self._keys: dict[str, bytes] = {}

    def apply(self, endpoints: dict[str, list[Endpoint]]) -> None:
        """Take over the state store's endpoints; a replica that stays keeps its counts."""
        known = {r.url: r for replicas in self._apps.values() for r in replicas}
        self._apps = {}
        for app, found in endpoints.items():
            replicas = self._apps.setdefault(app, [])
            for endpoint in found:
                url = endpoint.url.rstrip("/").removesuffix("/v1")
                replica = known.get(url) or Replica(url)
                replica.seen_at = endpoint.seen_at
                replicas.append(replica)

    def replicas(self, upstream: Upstream) -> list[Replica]:
        """Every replica of an upstream, usable or not."""
        if upstream.app is not None:
            return self._apps.get(upstream.app, [])
        assert upstream.url is not None
        replica = self._urls.get(upstream.url)
        if replica is None:
            replica = self._urls[upstream.url] = Replica(upstream.url)
        return [replica]

    def pick(self, upstream: Upstream, tried: Collection[Replica] = ()) -> Replica | None:
        """The replica to ask next, None when all were tried or there is none.

        One that is avoided is still better than none: avoiding is a preference, never a dead end.
        """
        left = [r for r in self.replicas(upstream) if r not in tried]
        if len(left) <= 1:
            return left[0] if left else None
        return min(self._usable(left), key=lambda r: r.in_flight)

    def eject(self, replica: Replica) -> None:
        """Avoid a replica for a moment because it refused a connection."""
        replica.avoid_until = time.monotonic() + self._eject_s

    def authorization(self, upstream: Upstream) -> bytes:
        """The header line with the upstream's own key, empty when it has none."""
        name = upstream.api_key_env
        if name is None:
            return b""
        line = self._keys.get(name)
        if line is None:
            key = os.environ.get(name, "").strip()
            line = self._keys[name] = f"authorization: Bearer {key}\r\n".encode("latin-1") if key else b""
        return line

    def _usable(self, replicas: Iterable[Replica]) -> list[Replica]:
        now, oldest = time.monotonic(), time.time() - self._max_age_s
        everyone = list(replicas)
        fresh = [r for r in everyone if r.seen_at >= oldest] or everyone
        return [r for r in fresh if r.avoid_until <= now] or fresh
