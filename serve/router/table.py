"""The routes in force: split and settings, ready for the hot path, and who still holds them.

Versions never go backwards. Owned by one event loop. Knows nothing about where splits come from.
"""

from __future__ import annotations

import logging
from collections import Counter

from contracts.keys import ApiKey
from contracts.routes import RouteSettings
from contracts.traffic import Arm, Assignment, Split, Upstream
from serve.router.keys import in_scope
from serve.router.ledger import EvidenceKey
from serve.router.limits import Limiter
from serve.router.metrics import Metrics
from serve.state.traffic import RouterReport

_log = logging.getLogger("stillhouse.router")


class Route:
    """Split and settings in force. Requests keep the Route they were assigned under until they end."""

    __slots__ = ("_evidence", "_headers", "_holds", "limiter", "settings", "split")

    def __init__(
        self, split: Split, settings: RouteSettings | None = None, limiter: Limiter | None = None
    ) -> None:
        self.split = split
        self.settings = settings or RouteSettings(route=split.route)
        self.limiter = limiter
        """Shared by all versions of this route; None where nothing is bounded."""
        self._headers: dict[tuple[Arm, int, str], list[tuple[bytes, bytes]]] = {}
        slots = [(Arm.CANARY, n) for n in range(1, len(split.others) + 1)]
        self._holds = {(arm, n): self._held_by(arm, n) for arm, n in [*((arm, 0) for arm in Arm), *slots]}
        self._evidence = {
            (Arm.STABLE, 0): self._keys(Arm.STABLE, *split.rollouts),
            (Arm.CANARY, 0): self._keys(Arm.CANARY, split.rollout_id),
            **{slot: self._keys(Arm.CANARY, split.others[slot[1] - 1].rollout_id) for slot in slots},
        }

    def evidence(self, assigned: Assignment) -> tuple[EvidenceKey, ...]:
        """Where a request counts: a student's for its own rollout, the stable arm's for every one."""
        return self._evidence.get((assigned.arm, assigned.slot), ())

    def headers(
        self, assigned: Assignment, served: Upstream, by: Upstream | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Response headers that say which arm was assigned and which upstream's model answered.

        `by`: of a serving cascade, the one of its two that answers.
        """
        key = (assigned.arm, assigned.slot, served.name if by is None else f"{served.name}/{by.name}")
        lines = self._headers.get(key)
        if lines is None:
            lines = [
                (b"x-stillhouse-arm", assigned.arm.value.encode()),
                (b"x-stillhouse-model", _header_value((by or served).model)),
                (b"x-stillhouse-split", str(self.split.version).encode()),
            ]
            if served is not self.upstream(assigned.arm, assigned.slot):
                lines.append((b"x-stillhouse-fallback", b"true"))
            self._headers[key] = lines
        return lines

    def upstream(self, arm: Arm, slot: int = 0) -> Upstream | None:
        """The upstream of an arm and a slot, None when this split has no such arm."""
        if slot:
            return self.split.others[slot - 1].upstream
        return self.split.stable if arm is Arm.STABLE else self.split.canary

    def holds(self, assigned: Assignment) -> tuple[str, ...]:
        """Upstreams a request may still need: its own and those it would fall back to."""
        return self._holds[assigned.arm, assigned.slot]

    def _held_by(self, arm: Arm, slot: int) -> tuple[str, ...]:
        asked = [self.split.stable, *self.settings.fallbacks]
        student = self.upstream(arm, slot) if arm is Arm.CANARY else None
        if student is not None:
            asked.append(student)
        return tuple(dict.fromkeys(each.name for u in asked for each in (u, *u.parts)))

    def _keys(self, arm: Arm, *rollouts: str | None) -> tuple[EvidenceKey, ...]:
        split = self.split
        return tuple(EvidenceKey(split.route, r, arm.value, split.version) for r in rollouts if r is not None)


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

    def upstreams(self) -> dict[str, Upstream]:
        """Every upstream that a route may ask, by name: arms, fallbacks, shadows; of a cascade its two."""
        found: dict[str, Upstream] = {}
        for route in self._routes.values():
            shadow = [] if route.settings.shadow is None else [route.settings.shadow.upstream]
            asked = (*route.settings.fallbacks, *shadow, *route.split.upstreams)
            found |= {part.name: part for u in asked for part in u.parts}
        return found

    def waiting(self) -> dict[str, int]:
        """Route → requests that wait for a place; 0 where nothing is bounded."""
        limiters = self._limiters
        return {name: limiters[name].waiting if name in limiters else 0 for name in self._routes}

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

    def hold(self, route: Route, assigned: Assignment) -> tuple[str, ...]:
        """A request begins: note the upstreams it may need, so that a drain waits for it."""
        names = route.holds(assigned)
        for name in names:
            self._held[name] += 1
        return names

    def hold_upstream(self, upstream: Upstream) -> tuple[str, ...]:
        """Something that is no client's request uses an upstream; a drain waits for it all the same."""
        names = tuple(dict.fromkeys(each.name for each in (upstream, *upstream.parts)))
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
