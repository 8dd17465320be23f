"""Gauges of what is in force: shares, prices, replicas, queues; the engines that Prometheus is sent to."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from contracts.price import Price
from contracts.routes import RouteSettings
from contracts.traffic import Slot, Split, Upstream
from serve.config import ServeConfig
from serve.router.config import RouterConfig
from serve.router.metrics import Metrics
from serve.router.pool import Pools
from serve.router.split_metrics import SplitMetrics
from serve.router.table import RouteTable
from serve.router.targets import targets
from serve.state.traffic import Endpoint

TEACHER = Upstream(name="teacher", model="big", app="upstream-teacher")
STUDENT = Upstream(name="tiny-1", model="tiny-1", app="student-tiny-1", digest="sha256:1")
OTHER = Upstream(name="tiny-2", model="tiny-2", app="student-tiny-2", digest="sha256:2")


def split(version: int, **changes: object) -> Split:
    """A split of route `support` with the teacher as stable."""
    return Split.model_validate(
        {"route": "support", "version": version, "salt": "s", "stable": TEACHER, **changes}
    )


def made(**prices: object) -> tuple[SplitMetrics, CollectorRegistry]:
    """Gauges in a registry of their own."""
    registry = CollectorRegistry()
    return SplitMetrics(registry, **prices), registry  # type: ignore[arg-type]


def share(registry: CollectorRegistry, arm: str, upstream: str) -> float | None:
    """What is said of one arm."""
    labels = {"route": "support", "arm": arm, "upstream": upstream}
    return registry.get_sample_value("stillhouse_arm_share", labels)


def test_shares_follow_the_split_and_add_up_to_one() -> None:
    """A dashboard asks who is on which arm: the shares are those of assignment, and who was promoted or left
    has 0 in its old arm instead of its last share for ever."""
    gauges, registry = made()
    slot = Slot(upstream=OTHER, start=0.5, weight=0.25, rollout_id="r2")
    gauges.know(split(1, canary=STUDENT, weight=0.3, rollout_id="r1", others=(slot,)))
    now = {
        u: share(registry, arm, u)
        for arm, u in (("stable", "teacher"), ("canary", "tiny-1"), ("canary", "tiny-2"))
    }
    assert now == pytest.approx({"teacher": 0.45, "tiny-1": 0.3, "tiny-2": 0.25})
    gauges.know(split(2, stable=STUDENT))
    assert [share(registry, "stable", u) for u in ("tiny-1", "teacher")] == [1.0, 0.0]
    assert [share(registry, "canary", u) for u in ("tiny-1", "tiny-2")] == [0.0, 0.0]


def test_prices_are_those_of_the_configuration() -> None:
    """Cost is tokens times these gauges: a declared upstream has its own price, a student the students', an
    upstream without any has no series (never a price of 0)."""
    by_token = Price(prompt_per_million=2, completion_per_million=8)
    by_hour = Price(per_hour=3.6, currency="EUR")
    gauges, registry = made(prices={"teacher": by_token}, student_price=by_hour)
    plain = Upstream(name="plain", model="m", url="http://127.0.0.1:1")
    gauges.know(split(1, canary=STUDENT, weight=0.1))
    gauges.know(split(2, stable=plain))

    def said(upstream: str, per: str, currency: str) -> float | None:
        labels = {"upstream": upstream, "per": per, "currency": currency}
        return registry.get_sample_value("stillhouse_price", labels)

    assert said("teacher", "prompt_token", "USD") == pytest.approx(2e-6)
    assert said("teacher", "completion_token", "USD") == pytest.approx(8e-6)
    assert said("tiny-1", "hour", "EUR") == 3.6
    priced = [s.labels["upstream"] for m in registry.collect() for s in m.samples if "_price" in s.name]
    assert sorted(priced) == ["teacher", "teacher", "tiny-1"]


def test_the_stacks_file_gives_the_router_its_prices() -> None:
    """`upstreams.<name>.cost` and `students.cost` are written once; the router section refuses them, naming
    the place."""
    file = {
        "upstreams": {"teacher": {"url": "http://127.0.0.1:1", "model": "m", "cost": {"per_hour": 2}}},
        "routes": {"support": "teacher"},
        "students": {"cost": {"per_hour": 1}},
    }
    config = ServeConfig.model_validate(file).router_config()
    assert (config.prices, config.student_price) == ({"teacher": Price(per_hour=2)}, Price(per_hour=1))
    with pytest.raises(ValueError, match=r"set students\.cost"):
        ServeConfig.model_validate({**file, "router": {"student_price": {"per_hour": 1}}})


def test_replicas_of_an_upstream_that_left_are_none() -> None:
    """Queues and replicas are what they are now, not what they were."""
    gauges, registry = made()
    gauges.count({"teacher": 2, "tiny-1": 1}, {"support": 3})
    gauges.count({"teacher": 1}, {"support": 0})
    found = {
        u: registry.get_sample_value("stillhouse_upstream_replicas", {"upstream": u})
        for u in ("teacher", "tiny-1")
    }
    assert found == {"teacher": 1.0, "tiny-1": 0.0}
    assert registry.get_sample_value("stillhouse_queued", {"route": "support"}) == 0.0
    assert registry.get_sample_value("stillhouse_router_processes") == 1.0


def test_series_of_a_fresh_route_begin_at_zero() -> None:
    """A rate needs a first sample: retries, ejections and drops of an arm that nothing happened to are 0."""
    metrics = Metrics()
    metrics.know(split(1, canary=STUDENT, weight=0.1))
    text = metrics._expose().decode()
    assert 'stillhouse_retries_total{arm="canary",route="support"} 0.0' in text
    assert 'stillhouse_ejections_total{upstream="tiny-1"} 0.0' in text
    assert 'stillhouse_shadows_dropped_total{reason="budget",route="support"} 0.0' in text


def test_prometheus_is_sent_to_the_engines_in_use() -> None:
    """Addresses of our own engines by upstream, of shadows and fallbacks too; an engine of a student that no
    route names any more, and whatever somebody else runs, is not listed."""
    table, pools = RouteTable(Metrics()), Pools(RouterConfig(state_url="sqlite://"))
    hosted = Upstream(name="hosted", model="m", url="https://api.example.com")
    settings = RouteSettings(route="support", version=1, fallbacks=(OTHER, hosted))
    table.apply({"support": split(1, canary=STUDENT, weight=0.1)}, {"support": settings})
    apps = {"upstream-teacher": (1, 2), "student-tiny-1": (3,), "student-tiny-2": (4,), "student-old": (5,)}
    pools.apply(
        {
            app: [
                Endpoint(app=app, replica=str(n), url=f"http://10.0.0.{n}:80", pid=1, seen_at=1)
                for n in numbers
            ]
            for app, numbers in apps.items()
        }
    )
    assert targets(table, pools) == [
        {"targets": ["10.0.0.1:80", "10.0.0.2:80"], "labels": {"upstream": "teacher"}},
        {"targets": ["10.0.0.3:80"], "labels": {"upstream": "tiny-1"}},
        {"targets": ["10.0.0.4:80"], "labels": {"upstream": "tiny-2"}},
    ]


def test_an_engine_is_scraped_once_whoever_is_on_it() -> None:
    """An adapter's place on its base's engine is no engine more; where no route names the base, the engine is
    listed under the adapter, as its requests are all there is."""
    both, alone = RouteTable(Metrics()), RouteTable(Metrics())
    both.apply({"support": split(1, canary=STUDENT, weight=0.1)}, {})
    alone.apply({"support": split(1, stable=STUDENT)}, {})
    base = Endpoint(app="upstream-teacher", replica="r1", url="http://10.0.0.1:80", pid=1, seen_at=1)
    guest = base.model_copy(update={"app": "student-tiny-1", "replica": "adapter:r1"})
    pools = Pools(RouterConfig(state_url="sqlite://"))
    pools.apply({e.app: [e] for e in (base, guest)})
    assert targets(both, pools) == [{"targets": ["10.0.0.1:80"], "labels": {"upstream": "teacher"}}]
    assert targets(alone, pools) == [{"targets": ["10.0.0.1:80"], "labels": {"upstream": "tiny-1"}}]
