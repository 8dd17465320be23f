"""Evidence and routes: counts add up exactly, versions never go backwards, holds end with their request."""

from __future__ import annotations

import math
import random
import threading

from sqlalchemy import Engine

from contracts.metrics import GRADE, LATENCY_BUCKETS_S, ArmCounts
from contracts.traffic import Arm, Split, UnitKind, Upstream
from serve.router.assign import assign
from serve.router.config import RouterConfig
from serve.router.ledger import EvidenceKey, Ledger, bucket_of
from serve.router.metrics import Metrics
from serve.router.pool import Pools
from serve.router.table import RouteTable
from serve.state.traffic import Endpoint, TrafficState

KEY = EvidenceKey("support", "r1", "canary", 4)
STABLE = Upstream(name="teacher", model="big", url="http://127.0.0.1:1")
POOLS = RouterConfig(state_url="sqlite://", eject_s=60)
STUDENT = Upstream(name="student", model="small", app="student-1")


def test_bucket_edges_are_inclusive() -> None:
    """A latency on an edge belongs to the bucket below it, as in Prometheus; above all edges is overflow."""
    assert bucket_of(LATENCY_BUCKETS_S[0]) == 0
    assert bucket_of(math.nextafter(LATENCY_BUCKETS_S[0], 1)) == 1
    assert bucket_of(1e9) == len(LATENCY_BUCKETS_S)


def test_counts_are_what_happened() -> None:
    """Failures carry no latency, whole answers carry no time to first token, grades add later."""
    ledger = Ledger("r")
    ledger.count(KEY, failed=False, ttft_s=0.003, e2e_s=0.5)
    ledger.count(KEY, failed=False, ttft_s=None, e2e_s=99.0)
    ledger.count(KEY, failed=True, ttft_s=0.001, e2e_s=0.1)
    ledger.score(KEY, GRADE, 0.0)
    (entry,) = ledger.cut()
    counts = entry.counts
    assert (counts.n, counts.errors, counts.graded(), counts.failed()) == (3, 1, 1, 1)
    assert (sum(counts.ttft), sum(counts.e2e), counts.e2e[-1]) == (1, 2, 1)
    assert (len(counts.ttft), len(counts.e2e)) == (31, 31)
    assert (entry.route, entry.rollout_id, entry.arm, entry.split_version) == KEY


def test_an_entry_is_kept_until_it_is_stored_and_stored_once(engine: Engine) -> None:
    """A store that fails, or that stored but could not say so, never changes the sum."""
    state = TrafficState(engine)
    ledger = Ledger("r")
    rng = random.Random(1)
    total = 0
    for _ in range(40):
        for _ in range(rng.randrange(4)):
            ledger.count(KEY, failed=rng.random() < 0.2, ttft_s=0.01, e2e_s=0.02)
            total += 1
        entries = ledger.cut()
        fate = rng.choice(["stored", "lost before", "lost after"])
        if fate != "lost before":
            state.append_ledger(entries)
        if fate == "stored":
            ledger.stored(entries)
    state.append_ledger(ledger.cut())
    found = state.read_ledger("support", "r1", {})
    assert [e.seq for e in found] == list(range(1, len(found) + 1))
    summed = ArmCounts()
    for entry in found:
        summed = summed.plus(entry.counts)
    assert summed.n == total
    assert summed.errors + sum(summed.e2e) == total


def test_counting_and_grading_from_two_threads_loses_nothing() -> None:
    """Grades arrive from the log's thread while the event loop counts and the flush cuts."""
    ledger = Ledger("r")
    entries = []

    def grade() -> None:
        for _ in range(5000):
            ledger.score(KEY, GRADE, 1.0)

    thread = threading.Thread(target=grade)
    thread.start()
    for i in range(5000):
        ledger.count(KEY, failed=False, ttft_s=None, e2e_s=0.01)
        if i % 100 == 0:
            entries += (cut := ledger.cut())
            ledger.stored(cut)
    thread.join()
    entries += ledger.cut()
    assert sum(e.counts.n for e in entries) == 5000
    assert sum(e.counts.graded() for e in entries) == 5000


def split(version: int, weight: float = 0.0) -> Split:
    return Split(route="support", version=version, salt="s", stable=STABLE, canary=STUDENT, weight=weight)


def test_versions_never_go_backwards() -> None:
    """A late read of an old split changes nothing; a removed route is gone."""
    table = RouteTable(Metrics())
    assert table.apply({"support": split(5, 0.5)})
    assert not table.apply({"support": split(4, 0.1)})
    route = table.get("support")
    assert route is not None
    assert (route.split.version, route.split.weight) == (5, 0.5)
    assert table.apply({})
    assert table.get("support") is None


def test_a_canary_request_holds_stable_too() -> None:
    """A drain of stable waits for canary requests that may still fall back to it; a report says both."""
    table = RouteTable(Metrics())
    table.apply({"support": split(5, 0.5)})
    route = table.get("support")
    assert route is not None
    held = table.hold(route, assign(route.split, UnitKind.HEADER, "c", Arm.CANARY))
    other = table.hold(route, assign(route.split, UnitKind.HEADER, "c", Arm.STABLE))
    assert table.report("r").in_flight == {"teacher": 2, "student": 1}
    table.release(held)
    table.release(other)
    assert table.report("r").in_flight == {}


def endpoint(name: str, seen_at: float = 1e12) -> Endpoint:
    return Endpoint(
        app="student-1", replica=name, url=f"http://127.0.0.1:{ord(name)}", pid=1, seen_at=seen_at
    )


def test_the_least_busy_live_replica_is_picked() -> None:
    """Replicas that refuse or went silent are avoided, but one of them is still better than none."""
    pools = Pools(POOLS)
    pools.apply({"student-1": [endpoint("a"), endpoint("b"), endpoint("c", seen_at=0.0)]})
    a, b, c = pools.replicas(STUDENT)
    a.in_flight = 2
    assert pools.pick(STUDENT) is b
    pools.failed(b, connect=True)
    assert pools.pick(STUDENT) is a
    pools.failed(a, connect=True)
    assert pools.pick(STUDENT) is b
    assert pools.pick(STUDENT, [a, b]) is c
    assert pools.pick(STUDENT, [a, b, c]) is None


def test_a_replica_keeps_its_counts_over_polls() -> None:
    """Reading the endpoints again does not forget who is busy, nor resurrect who left."""
    pools = Pools(POOLS)
    pools.apply({"student-1": [endpoint("a"), endpoint("b")]})
    pools.replicas(STUDENT)[0].in_flight = 7
    pools.apply({"student-1": [endpoint("a")]})
    assert [r.in_flight for r in pools.replicas(STUDENT)] == [7]


def test_the_backlog_is_what_the_store_does_not_have() -> None:
    """Lines that were cut and not stored; counting alone makes none."""
    ledger = Ledger("r")
    ledger.count(KEY, failed=False, ttft_s=None, e2e_s=0.1)
    assert ledger.backlog() == 0
    entries = ledger.cut()
    assert ledger.backlog() == 1
    ledger.stored(entries)
    assert ledger.backlog() == 0
