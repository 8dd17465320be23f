"""Which replica is asked: the breaker that doubles, its single probe, and affinity that yields to load."""

from __future__ import annotations

import pytest

from contracts.traffic import Upstream
from serve.router.config import RouterConfig
from serve.router.pool import Pools, Replica
from serve.state.traffic import Endpoint

STUDENT = Upstream(name="student", model="small", app="student-1")


class Clock:
    """Time that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("serve.router.pool.time.monotonic", lambda: self.now)
        monkeypatch.setattr("serve.router.pool.random.uniform", lambda low, high: 1.0)


def pools(names: str) -> Pools:
    made = Pools(RouterConfig(state_url="sqlite://", eject_s=1.0, eject_max_s=8.0, eject_failures=3))
    found = [
        Endpoint(app="student-1", replica=n, url=f"http://127.0.0.1:{ord(n)}", pid=1, seen_at=1e12)
        for n in names
    ]
    made.apply({"student-1": found})
    return made


def fail(made: Pools, replica: Replica, times: int) -> list[bool]:
    return [made.failed(replica) for _ in range(times)]


def test_a_replica_is_left_alone_after_failures_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third failure opens the breaker; a success in between starts the count again."""
    Clock(monkeypatch)
    made = pools("ab")
    a, b = made.replicas(STUDENT)
    assert fail(made, a, 2) == [False, False]
    made.succeeded(a)
    assert fail(made, a, 3) == [False, False, True]
    b.in_flight = 100
    assert made.pick(STUDENT) is b


def test_after_its_time_one_request_tries_and_each_failure_doubles_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half-open: a single probe; failing doubles the time up to its maximum, success forgets everything."""
    clock = Clock(monkeypatch)
    made = pools("a")
    (a,) = made.replicas(STUDENT)
    made.failed(a, connect=True)
    waits = []
    for _ in range(5):
        assert made.pick(STUDENT, strict=True) is None
        waits.append(a.open_until - clock.now)
        clock.now = a.open_until
        assert made.pick(STUDENT, strict=True) is a
        assert made.pick(STUDENT, strict=True) is None  # only one tries
        made.failed(a)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0]
    clock.now = a.open_until
    assert made.pick(STUDENT, strict=True) is a
    made.succeeded(a)
    assert made.pick(STUDENT, strict=True) is a
    assert made.pick(STUDENT, strict=True) is a


def test_without_anybody_else_an_open_breaker_is_only_a_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last replica is asked even though it failed: some answer may be better than none."""
    Clock(monkeypatch)
    made = pools("ab")
    a, b = made.replicas(STUDENT)
    made.failed(a, connect=True)
    made.failed(b, connect=True)
    assert made.pick(STUDENT) in (a, b)
    assert made.pick(STUDENT, strict=True) is None


def test_a_probe_whose_client_left_does_not_close_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that neither failed nor succeeded is forgotten after five seconds."""
    clock = Clock(monkeypatch)
    made = pools("a")
    made.failed(made.replicas(STUDENT)[0], connect=True)
    clock.now += 1.0
    assert made.pick(STUDENT, strict=True) is not None
    assert made.pick(STUDENT, strict=True) is None
    clock.now += 5.0
    assert made.pick(STUDENT, strict=True) is not None


def test_a_key_stays_on_its_replica_until_that_is_much_busier() -> None:
    """Rendezvous hashing: the same replica for the same key, spread over keys, yielding to load."""
    made = pools("abcd")
    keys = [f"conversation-{i}".encode() for i in range(400)]
    home = {k: made.pick(STUDENT, key=k) for k in keys}
    assert all(made.pick(STUDENT, key=k) is home[k] for k in keys)
    counts = [sum(r is replica for r in home.values()) for replica in made.replicas(STUDENT)]
    assert min(counts) > 60
    busy = home[keys[0]]
    assert busy is not None
    busy.in_flight = 5
    assert made.pick(STUDENT, key=keys[0]) is not busy


def test_when_a_replica_leaves_only_its_keys_move() -> None:
    """Everybody else's prefix cache stays warm."""
    made, fewer = pools("abcd"), pools("abc")
    keys = [f"k{i}".encode() for i in range(300)]
    before = {k: made.pick(STUDENT, key=k).url for k in keys}  # type: ignore[union-attr]
    after = {k: fewer.pick(STUDENT, key=k).url for k in keys}  # type: ignore[union-attr]
    moved = [k for k in keys if before[k] != after[k]]
    assert {before[k] for k in moved} == {"http://127.0.0.1:100"}


def test_an_adapters_failures_are_not_its_bases() -> None:
    """Two applications on one engine: what one's requests did neither closes the other off nor is forgotten
    when the endpoints are read again."""
    made = pools("a")
    (own,) = made.replicas(STUDENT)
    host = Endpoint(app="student-1", replica="a", url=own.url, pid=1, seen_at=1e12)
    guest = host.model_copy(update={"app": "adapter-1", "replica": "adapter:a"})
    adapter = Upstream(name="adapter", model="adapter", app="adapter-1")
    for _ in range(2):
        made.apply({"student-1": [host], "adapter-1": [guest]})
    (its,) = made.replicas(adapter)
    made.failed(its, connect=True)
    made.apply({"student-1": [host], "adapter-1": [guest]})
    assert made.pick(adapter, strict=True) is None
    assert made.pick(STUDENT, strict=True) is own
