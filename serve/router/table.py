"""The routes in force: split and settings, ready for the hot path, and who still holds them.

Versions never go backwards. Owned by one event loop. Knows nothing about where splits come from.
"""

from __future__ import annotations

import logging
from collections import Counter

from contracts.keys import ApiKey
from contracts.routes import RouteSettings
from contracts.traffic import Arm, Split, Upstream
from serve.router.keys import in_scope
from serve.router.limits import Limiter
from serve.router.metrics import Metrics
from serve.state.traffic import RouterReport

_log = logging.getLogger("stillhouse.router")


class Route:
    """Split and settings in force. Requests keep the Route they were assigned under until they end."""

    __slots__ = ("_headers", "_holds", "limiter", "settings", "split")

    def __init__(
        self, split: Split, settings: RouteSettings | None = None, limiter: Limiter | None = None
    ) -> None:
        self.split = split
        self.settings = settings or RouteSettings(route=split.route)
        self.limiter = limiter
        """Shared by all versions of this route; None where nothing is bounded."""
        self._headers: dict[tuple[Arm, str], list[tuple[bytes, bytes]]] = {}
        self._holds = {arm: self._held_by(arm) for arm in Arm}

    def headers(self, assigned: Arm, served: Upstream) -> list[tuple[bytes, bytes]]:
        """Response headers that say which arm was assigned and which upstream's model answered."""
        lines = self._headers.get((assigned, served.name))
        if lines is None:
            lines = [
                (b"x-stillhouse-arm", assigned.value.encode()),
                (b"x-stillhouse-model", _header_value(served.model)),
                (b"x-stillhouse-split", str(self.split.version).encode()),
            ]
            if served is not self.upstream(assigned):
                lines.append((b"x-stillhouse-fallback", b"true"))
            self._headers[assigned, served.name] = lines
        return lines

    def upstream(self, arm: Arm) -> Upstream | None:
        """The upstream of an arm, None when this split has no such arm."""
        return self.split.stable if arm is Arm.STABLE else self.split.canary

    def holds(self, assigned: Arm) -> tuple[str, ...]:
        """Upstreams a request of this arm may still need: its own and those it would fall back to."""
        return self._holds[assigned]

    def _held_by(self, assigned: Arm) -> tuple[str, ...]:
        names = [self.split.stable.name, *(u.name for u in self.settings.fallbacks)]
        if assigned is Arm.CANARY and self.split.canary is not None:
            names.append(self.split.canary.name)
        return tuple(dict.fromkeys(names))


class RouteTable:
    """All routes of one router process."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._routes: dict[str, Route] = {}
        self._by_name: dict[str, Route] = {}
        self._default: Route | None = None
        self._limiters: dict[str, Limiter] = {}
        self._held: Counter[str] = Counter()
        self.loaded = False
        """True once the state store was read."""

    def get(self, name: str) -> Route | None:
        """The route of a public model name: its own name or an alias."""
        return self._by_name.get(name)

    def resolve(self, name: str) -> Route | None:
        """As `get`; a name nobody knows is the default route's, where there is one."""
        return self._by_name.get(name) or self._default

    def names(self) -> list[str]:
        """Every route's name, sorted."""
        return sorted(self._routes)

    def public_names(self, key: ApiKey | None) -> list[str]:
        """Every model name that a key (None: anybody) may ask for, sorted."""
        return sorted(n for n, route in self._by_name.items() if in_scope(key, route.split.route))

    def apply(self, splits: dict[str, Split], settings: dict[str, RouteSettings] | None = None) -> bool:
        """Take over newer splits and settings, forget removed routes; True when anything changed."""
        gone = [n for n in self._routes if n not in splits]
        for name in gone:
            del self._routes[name]
            self._limiters.pop(name, None)
            _log.info("route %s was removed", name)
        newer = [self._newer(name, splits[name], (settings or {}).get(name)) for name in splits]
        self.loaded = True
        if not gone and not any(newer):
            return False
        self._name_all()
        return True

    def _newer(self, name: str, split: Split, settings: RouteSettings | None) -> bool:
        """Put a route in force as far as it is newer than what is; versions never go backwards."""
        current = self._routes.get(name)
        wanted = settings or RouteSettings(route=name)
        if current is not None:
            split = split if split.version > current.split.version else current.split
            wanted = wanted if wanted.version > current.settings.version else current.settings
            if split is current.split and wanted is current.settings:
                return False
        self._routes[name] = Route(split, wanted, self._limiter(name, wanted))
        self._metrics.know(split)
        _log.info(
            "route %s: split %d, canary weight %g, settings %d",
            name,
            split.version,
            split.weight,
            wanted.version,
        )
        return True

    def _limiter(self, name: str, settings: RouteSettings) -> Limiter | None:
        """The route's one limiter; a route that was bounded once keeps it, so that running requests count."""
        limiter = self._limiters.get(name)
        if limiter is not None:
            limiter.update(settings.limits)
        elif settings.limits.max_in_flight is not None:
            limiter = self._limiters[name] = Limiter(name, settings.limits)
        return limiter

    def _name_all(self) -> None:
        by_name: dict[str, Route] = {}
        for name in sorted(self._routes):
            for alias in self._routes[name].settings.aliases:
                if by_name.setdefault(alias, self._routes[name]) is not self._routes[name]:
                    _log.warning("alias %s of route %s belongs to another route already", alias, name)
        self._by_name = {**by_name, **self._routes}
        self._default = next(
            (self._routes[n] for n in sorted(self._routes) if self._routes[n].settings.default), None
        )

    def hold(self, route: Route, assigned: Arm) -> tuple[str, ...]:
        """A request begins: note the upstreams it may need, so that a drain waits for it."""
        names = route.holds(assigned)
        for name in names:
            self._held[name] += 1
        return names

    def hold_upstream(self, name: str) -> tuple[str, ...]:
        """Something that is no client's request uses an upstream; a drain waits for it all the same."""
        self._held[name] += 1
        return (name,)

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
