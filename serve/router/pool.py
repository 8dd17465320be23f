"""Which replica of an upstream is asked: affinity, then least in flight, leaving failing ones alone.

A replica that fails is left alone for a while that doubles each time, then one request may try it
(half-open); its success closes the breaker. A silent one (old heartbeat) is avoided while others live.
Owned by one event loop. Knows nothing about HTTP or arms.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Collection
from typing import Final

from contracts.traffic import Upstream
from serve.router.client import Target, target_of
from serve.router.config import RouterConfig
from serve.state.traffic import Endpoint

_PROBE_S: Final = 5.0
"""A probe that never ended (its client left) counts as over after this."""
_SLACK: Final = 4
"""Requests in flight that affinity may cost: a preferred replica this much busier than the idlest is not."""


class Replica:
    """One address that answers for an upstream."""

    __slots__ = (
        "failures", "guest", "in_flight", "open_until", "probe_until", "seen_at", "target", "trips", "url",
    )  # fmt: skip

    def __init__(self, url: str) -> None:
        self.url = url
        self.target: Target = target_of(url)
        self.guest = False
        """An adapter's place on an engine that is another application's."""
        self.in_flight = 0
        self.failures = 0
        """In a row."""
        self.trips = 0
        """How often in a row the breaker opened."""
        self.open_until = 0.0
        self.probe_until = 0.0
        self.seen_at = float("inf")
        """Last heartbeat, Unix seconds; plain URLs have none and never go stale."""

    def closed(self, now: float) -> bool:
        """True when it may be asked: its breaker is closed, or half-open with nobody trying."""
        return not self.trips or (now >= self.open_until and now >= self.probe_until)


class Pools:
    """All replicas this router knows, by Serve application and by plain URL."""

    def __init__(self, config: RouterConfig) -> None:
        self._eject_s = config.eject_s
        self._eject_max_s = config.eject_max_s
        self._eject_failures = config.eject_failures
        self._max_age_s = config.endpoint_max_age_s
        self._apps: dict[str, list[Replica]] = {}
        self._urls: dict[str, Replica] = {}
        self._keys: dict[str, bytes] = {}

    def apply(self, endpoints: dict[str, list[Endpoint]]) -> None:
        """Take over the state store's endpoints; a replica that stays keeps its counts.

        Applications that share an engine (a base, its adapters) have each a count and a breaker of its own.
        """
        known = {(app, r.url): r for app, replicas in self._apps.items() for r in replicas}
        self._apps = {}
        for app, found in endpoints.items():
            replicas = self._apps.setdefault(app, [])
            for endpoint in found:
                url = endpoint.url.rstrip("/").removesuffix("/v1")
                replica = known.get((app, url)) or Replica(url)
                replica.guest = endpoint.guest
                replica.seen_at = endpoint.seen_at
                replicas.append(replica)

    def replicas(self, upstream: Upstream) -> list[Replica]:
        """Every replica of an upstream, usable or not; of a cascade those that can answer every request."""
        if upstream.cascade is not None:
            upstream = upstream.cascade.then
        if upstream.app is not None:
            return self._apps.get(upstream.app, [])
        assert upstream.url is not None
        replica = self._urls.get(upstream.url)
        if replica is None:
            replica = self._urls[upstream.url] = Replica(upstream.url)
        return [replica]

    def pick(
        self,
        upstream: Upstream,
        tried: Collection[Replica] = (),
        key: bytes | None = None,
        strict: bool = False,
    ) -> Replica | None:
        """The replica to ask next, None when all were tried or there is none.

        Args:
            key: what should stay on one replica (rendezvous hashing), as long as that is not much busier.
            strict: None rather than one whose breaker is open; without it being left alone is a preference.
        """
        left = [r for r in self.replicas(upstream) if r not in tried]
        if not left:
            return None
        now = time.monotonic()
        if len(left) == 1:
            chosen = left[0]
            if strict and not chosen.closed(now):
                return None
        else:
            usable = self._usable(left, now, strict)
            if not usable:
                return None
            chosen = min(usable, key=lambda r: r.in_flight)
            if key is not None:
                chosen = _preferred(usable, key, chosen.in_flight + _SLACK)
        if chosen.trips:
            chosen.probe_until = now + _PROBE_S
        return chosen

    def failed(self, replica: Replica, connect: bool = False) -> bool:
        """It failed a request; True when that opened its breaker. `connect`: it refused the connection."""
        replica.failures += 1
        replica.probe_until = 0.0
        if not connect and not replica.trips and replica.failures < self._eject_failures:
            return False
        replica.trips += 1
        wait = min(self._eject_max_s, self._eject_s * 2.0 ** min(replica.trips - 1, 16))
        replica.open_until = time.monotonic() + wait * random.uniform(0.9, 1.1)
        return True

    def succeeded(self, replica: Replica) -> None:
        """It answered: whatever was held against it is forgotten."""
        if replica.failures or replica.trips:
            replica.failures = replica.trips = 0
            replica.probe_until = 0.0

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

    def _usable(self, replicas: list[Replica], now: float, strict: bool) -> list[Replica]:
        oldest = time.time() - self._max_age_s
        fresh = [r for r in replicas if r.seen_at >= oldest] or replicas
        closed = [r for r in fresh if r.closed(now)]
        return closed if closed or strict else fresh


def _preferred(usable: list[Replica], key: bytes, most_in_flight: int) -> Replica:
    """Highest random weight among those that are not too busy: the same key, the same replica, everywhere."""
    able = [r for r in usable if r.in_flight <= most_in_flight]
    return max(able, key=lambda r: hashlib.blake2b(r.url.encode(), key=key[:64], digest_size=8).digest())
