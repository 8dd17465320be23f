"""The routes in force: split by route, with what the hot path needs precomputed, and who still holds them.

Versions never go backwards. Owned by one event loop. Knows nothing about where splits come from.
"""

from __future__ import annotations

import logging
from collections import Counter

from contracts.traffic import Arm, Split, Upstream
from serve.router.metrics import Metrics
from serve.state.traffic import RouterReport

_log = logging.getLogger("stillhouse.router")


class Route:
    """One split in force. Requests keep the Route they were assigned under until they end."""

    __slots__ = ("headers", "split")

    def __init__(self, split: Split) -> None:
        self.split = split
        version = str(split.version).encode()
        self.headers: dict[tuple[Arm, Arm], list[tuple[bytes, bytes]]] = {}
        """(assigned, served) → response headers that say so."""
        for arm in (Arm.STABLE, Arm.CANARY):
            for served in (arm, Arm.STABLE):
                upstream = self.upstream(served)
                if upstream is None:
                    continue
                lines = [
                    (b"x-stillhouse-arm", arm.value.encode()),
                    (b"x-stillhouse-model", _header_value(upstream.model)),
                    (b"x-stillhouse-split", version),
                ]
                if served is not arm:
                    lines.append((b"x-stillhouse-fallback", b"true"))
                self.headers[arm, served] = lines

    def upstream(self, arm: Arm) -> Upstream | None:
        """The upstream of an arm, None when this split has no such arm."""
        return self.split.stable if arm is Arm.STABLE else self.split.canary

    def holds(self) -> tuple[str, ...]:
        """Upstreams a request of this route may still need: its own and the one it would fall back to."""
        canary = self.split.canary
        if canary is None or canary.name == self.split.stable.name:
            return (self.split.stable.name,)
        return (self.split.stable.name, canary.name)


class RouteTable:
    """All routes of one router process."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._routes: dict[str, Route] = {}
        self._held: Counter[str] = Counter()
        self.loaded = False
        """True once the state store was read."""

    def get(self, name: str) -> Route | None:
        """The route of a public model name."""
        return self._routes.get(name)

    def names(self) -> list[str]:
        """Every route's name, sorted."""
        return sorted(self._routes)

    def apply(self, splits: dict[str, Split]) -> bool:
        """Take over newer splits, forget removed routes; True when anything changed."""
        changed = False
        for name in [n for n in self._routes if n not in splits]:
            del self._routes[name]
            _log.info("route %s was removed", name)
            changed = True
        for name, split in splits.items():
            current = self._routes.get(name)
            if current is not None and split.version <= current.split.version:
                continue
            self._routes[name] = Route(split)
            self._metrics.know(split)
            _log.info("route %s: split %d, canary weight %g", name, split.version, split.weight)
            changed = True
        self.loaded = True
        return changed

    def hold(self, route: Route, assigned: Arm) -> tuple[str, ...]:
        """A request begins: note the upstreams it may need, so that a drain waits for it."""
        names = route.holds() if assigned is Arm.CANARY else (route.split.stable.name,)
        for name in names:
            self._held[name] += 1
        return names

    def release(self, names: tuple[str, ...]) -> None:
        """The request ended."""
        for name in names:
            self._held[name] -= 1

    def report(self, replica: str) -> RouterReport:
        """What this process says of itself: versions and requests are of one and the same moment."""
        self._held = +self._held
        return RouterReport(
            replica=replica,
            versions={name: route.split.version for name, route in self._routes.items()},
            in_flight=dict(self._held),
        )


def _header_value(text: str) -> bytes:
    return text.encode("ascii", "replace").translate(None, bytes(range(32)) + b"\x7f")
