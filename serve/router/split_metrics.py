"""Gauges of what a router process has in force: splits, who has which share, replicas, queues, prices.

Counts nothing; labels come from splits and settings. Knows nothing about requests.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge

from contracts.price import Price
from contracts.traffic import Arm, Split, Upstream


class SplitMetrics:
    """The gauges of one router process, and what they last said."""

    def __init__(
        self,
        reg: CollectorRegistry,
        prices: Mapping[str, Price] | None = None,
        student_price: Price | None = None,
    ) -> None:
        def gauge(name: str, text: str, mode: str, *labels: str) -> Gauge:
            return Gauge(f"stillhouse_{name}", text, labels, registry=reg, multiprocess_mode=mode)  # type: ignore[arg-type]

        self._prices, self._student_price = dict(prices or {}), student_price
        self._shares: dict[str, dict[tuple[str, str], float]] = {}
        self._upstreams: set[str] = set()
        self.weight = gauge("split_weight", "The canary's share of a route.", "livemostrecent", "route")
        self.version = gauge(
            "split_version",
            "Version of the split that is in force (the oldest over router processes).",
            "livemin",
            "route",
        )
        self.share = gauge(
            "arm_share",
            "Share of a route's traffic that an upstream is assigned in an arm; 0 once it left the split.",
            "livemostrecent",
            *("route", "arm", "upstream"),
        )
        self.replicas = gauge(
            "upstream_replicas",
            "Replicas of an upstream that may be asked (the fewest known to a router process).",
            "livemin",
            "upstream",
        )
        self.queued = gauge("queued", "Requests that wait for a place in their route.", "livesum", "route")
        self.processes = gauge("router_processes", "Living router processes.", "livesum")
        self.processes.set(1)
        self.price = gauge(
            "price",
            "Money per token (per: prompt_token, completion_token) or hour of all replicas (hour).",
            "livemostrecent",
            *("upstream", "per", "currency"),
        )

    def know(self, split: Split) -> None:
        """A split is in force: say its weight, its version, who has which share and what it costs."""
        self.weight.labels(split.route).set(split.weight)
        self.version.labels(split.route).set(split.version)
        shares = shares_of(split)
        gone = dict.fromkeys(self._shares.get(split.route, {}), 0.0)
        self._shares[split.route] = gone | shares
        for (arm, name), share in self._shares[split.route].items():
            self.share.labels(split.route, arm, name).set(share)
        for upstream in split.upstreams:
            for part in upstream.parts:
                self._price(part)

    def count(self, replicas: Mapping[str, int], queued: Mapping[str, int]) -> None:
        """How many replicas the upstreams in use have, and how many requests wait in each route."""
        for gone in self._upstreams - set(replicas):
            self.replicas.labels(gone).set(0)
        self._upstreams |= set(replicas)
        for upstream, found in replicas.items():
            self.replicas.labels(upstream).set(found)
        for route, waiting in queued.items():
            self.queued.labels(route).set(waiting)

    def _price(self, upstream: Upstream) -> None:
        price = self._prices.get(upstream.name, self._student_price if upstream.digest is not None else None)
        if price is None:
            return
        prompt, completion = price.prompt_per_million, price.completion_per_million
        if prompt is not None and completion is not None:
            self.price.labels(upstream.name, "prompt_token", price.currency).set(prompt / 1e6)
            self.price.labels(upstream.name, "completion_token", price.currency).set(completion / 1e6)
        if price.per_hour is not None:
            self.price.labels(upstream.name, "hour", price.currency).set(price.per_hour)


def shares_of(split: Split) -> dict[tuple[str, str], float]:
    """(arm, upstream) → share of the route's traffic; the shares add up to 1."""
    shares = {(Arm.CANARY.value, slot.upstream.name): slot.weight for slot in split.others}
    if split.canary is not None:
        shares[Arm.CANARY.value, split.canary.name] = split.weight
    return {(Arm.STABLE.value, split.stable.name): max(0.0, 1.0 - sum(shares.values())), **shares}
