"""The state store: what one transaction promises, and what races cannot break."""

from __future__ import annotations

import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, select, update

from contracts.errors import ConflictError, NotFoundError, StateError
from contracts.metrics import ArmCounts
from contracts.rollout import LedgerEntry, Phase, RolloutStatus
from contracts.traffic import Split
from serve.rollout.decide import initial
from serve.rollout.policy import RolloutPolicy, make_spec
from serve.state.migrations import SCHEMA_VERSION
from serve.state.rollouts import AuditEntry, RolloutState, StoredRollout, Tick
from serve.state.tables import open_state, schema_table
from serve.state.traffic import RouterReport, TrafficState
from tests.unit.rollout_world import T0, TEACHER, record


def split(version: int, weight: float = 0.0) -> Split:
    """A split of the route under test."""
    return Split(route="r", version=version, salt="s", stable=TEACHER, canary=TEACHER, weight=weight)


def entry(replica: str, seq: int, n: int = 1, rollout: str | None = "x") -> LedgerEntry:
    """A ledger entry of the route under test."""
    counts = ArmCounts(n=n)
    return LedgerEntry(
        replica=replica,
        seq=seq,
        route="r",
        rollout_id=rollout,
        arm="stable",
        split_version=1,
        at=T0,
        counts=counts,
    )


def started(engine: Engine) -> RolloutState:
    """A store with one pending rollout 'x'."""
    state = RolloutState(engine)
    spec = make_spec(RolloutPolicy(), "r", record(), now=T0).model_copy(update={"id": "x"})
    state.create(spec, initial(spec))
    return state


def audit(tick: int) -> AuditEntry:
    """An audit line."""
    return AuditEntry(rollout_id="x", tick=tick, at=T0, kind="look", body={"n": tick, "e": 0.1 + 0.2})


def tick(before: StoredRollout, status: RolloutStatus, new: Split) -> Tick:
    """A tick that moves a split, consumes command 1 and quarantines digest 'd'."""
    return Tick(before, status, [audit(1)], split=new, done_commands=[1], quarantined=("d", "bad"))


def test_a_split_is_written_only_one_above_the_stored_version(engine: Engine) -> None:
    """Compare-and-set: of two writers that read the same version one loses."""
    traffic = TrafficState(engine)
    traffic.put_split(split(1))
    traffic.put_split(split(2, 0.1))
    with pytest.raises(ConflictError):
        traffic.put_split(split(2, 0.9))
    with pytest.raises(ConflictError):
        traffic.put_split(split(1))
    assert traffic.get_split("r") == split(2, 0.1)
    assert traffic.splits() == {"r": split(2, 0.1)}


def test_a_ledger_entry_counts_once_however_often_it_is_sent(engine: Engine) -> None:
    """Routers retry; (replica, seq) is the identity, and the first one stays."""
    traffic = TrafficState(engine)
    traffic.append_ledger([entry("a", 1, n=5), entry("a", 2)])
    traffic.append_ledger([entry("a", 1, n=99), entry("a", 3)])
    assert [(e.seq, e.counts.n) for e in traffic.read_ledger("r", "x", {})] == [(1, 5), (2, 1), (3, 1)]


def test_the_cursor_is_per_replica(engine: Engine) -> None:
    """A replica that commits late, or is new, is never skipped; other rollouts' entries are not seen."""
    traffic = TrafficState(engine)
    traffic.append_ledger(
        [entry("a", 1), entry("a", 2), entry("b", 1), entry("c", 7), entry("a", 3, rollout="y")]
    )
    found = traffic.read_ledger("r", "x", {"a": 1, "b": 1})
    assert [(e.replica, e.seq) for e in found] == [("a", 2), ("c", 7)]


def test_a_tick_is_all_or_nothing(engine: Engine) -> None:
    """When the split lost its race neither status, audit, commands nor quarantine of the tick are stored."""
    state, traffic = started(engine), TrafficState(engine)
    traffic.put_split(split(1))
    state.add_command("x", "pause", "ann")
    before = state.get("x")
    moved = before.status.model_copy(update={"phase": Phase.WARMING, "ticks": 1})
    with pytest.raises(ConflictError):
        state.save_tick(tick(before, moved, split(3)))
    assert state.get("x") == before
    assert state.audit("x") == []
    assert len(state.pending_commands("x")) == 1
    assert state.quarantined("d") is None

    after = state.save_tick(tick(before, moved, split(2)))
    assert state.get("x") == after
    assert state.audit("x") == [audit(1)]
    assert state.pending_commands("x") == []
    assert state.quarantined("d") == "bad"
    assert traffic.get_split("r") == split(2)


def test_a_stale_writer_is_refused(engine: Engine) -> None:
    """Two controllers read the same status: the second to write gets a conflict, and writes nothing."""
    state = started(engine)
    before = state.get("x")
    state.save_tick(Tick(before, before.status, [audit(1)]))
    with pytest.raises(ConflictError, match="another controller"):
        state.save_tick(Tick(before, before.status, [audit(2)]))
    assert [e.tick for e in state.audit("x")] == [1]


def test_one_active_rollout_a_route_until_it_is_over(engine: Engine) -> None:
    """The database itself refuses the second; a terminal status frees the route."""
    state = started(engine)
    spec = make_spec(RolloutPolicy(), "r", record(2), now=T0 + 1)
    with pytest.raises(ConflictError, match="already has an active rollout"):
        state.create(spec, initial(spec))
    before = state.get("x")
    state.save_tick(Tick(before, before.status.model_copy(update={"phase": Phase.ABORTED})))
    assert state.active() == []
    state.create(spec, initial(spec))
    assert [r.spec.id for r in state.active("r")] == [spec.id]
    assert [r.spec.id for r in state.history("r")] == ["x", spec.id]


def test_unknown_things_are_named(engine: Engine) -> None:
    """Errors say what was asked for and what there is."""
    state = started(engine)
    with pytest.raises(NotFoundError, match="no rollout 'y'"):
        state.get("y")
    with pytest.raises(NotFoundError, match="pause, resume, approve, promote, abort"):
        state.add_command("x", "explode", "ann")


def test_the_lease_has_one_holder(engine: Engine) -> None:
    """Renewable by its holder, refused to others, free again when released or expired."""
    state = started(engine)
    assert state.acquire_lease("l", "one", 60)
    assert state.acquire_lease("l", "one", 60)
    assert not state.acquire_lease("l", "two", 60)
    state.release_lease("l", "two")
    assert not state.acquire_lease("l", "two", 60)
    state.release_lease("l", "one")
    assert state.acquire_lease("l", "two", -1.0)
    assert state.acquire_lease("l", "one", 60)


def test_many_who_want_the_lease_at_once_get_one_holder(engine: Engine) -> None:
    """Threads with connections of their own race for a fresh lease: exactly one wins."""
    state, won, go = RolloutState(engine), [], threading.Barrier(8)

    def want(name: str) -> None:
        go.wait()
        if state.acquire_lease("l", name, 60):
            won.append(name)

    threads = [threading.Thread(target=want, args=(f"h{i}",)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1


def test_endpoints_and_routers_age_out(engine: Engine) -> None:
    """What has not been seen lately is not offered as alive; leaving removes it at once."""
    traffic = TrafficState(engine)
    traffic.put_endpoint("app", "one", "http://a", 1)
    traffic.put_endpoint("app", "two", "http://b", 2)
    traffic.put_endpoint("app", "one", "http://c", 3)
    assert [(e.replica, e.url, e.pid) for e in traffic.endpoints()["app"]] == [
        ("one", "http://c", 3),
        ("two", "http://b", 2),
    ]
    assert traffic.endpoints(max_age_s=-1.0) == {}
    traffic.put_endpoint("other", "three", "http://d", 4)
    traffic.drop_stale_endpoints(60)  # a cluster beside ours lives, its endpoints are fresh
    assert sorted(traffic.endpoints()) == ["app", "other"]
    traffic.drop_stale_endpoints(-1.0, "other")
    assert sorted(traffic.endpoints()) == ["app"]
    traffic.drop_endpoint("app", "one")
    assert [e.replica for e in traffic.endpoints(60)["app"]] == ["two"]
    traffic.report_router(RouterReport(replica="r1", versions={"r": 4}, in_flight={"teacher": 2}))
    (report,) = traffic.routers(60)
    assert (report.versions, report.in_flight) == ({"r": 4}, {"teacher": 2})
    assert time.time() - report.seen_at < 60
    traffic.drop_router("r1")
    assert traffic.routers(60) == []


def test_a_cursor_may_name_thousands_of_routers(engine: Engine) -> None:
    """A long rollout outlives many router processes, and SQLite takes no expression of a thousand terms."""
    traffic = TrafficState(engine)
    traffic.append_ledger([entry("r0", 1), entry("r0", 2), entry("r2999", 7), entry("new", 1)])
    found = traffic.read_ledger("r", "x", {f"r{i}": 1 for i in range(3000)})
    assert [(e.replica, e.seq) for e in found] == [("new", 1), ("r0", 2), ("r2999", 7)]


def test_pruning_keeps_what_is_recent_and_what_a_rollout_has_yet_to_consume(engine: Engine) -> None:
    """Consumed entries, those of ended rollouts and of none go once they are old; the rest is evidence."""
    traffic = TrafficState(engine)
    fresh = entry("a", 9).model_copy(update={"at": T0 + 7200})
    old = [
        entry("a", 1),
        entry("a", 2),
        entry("b", 1),
        entry("c", 1, rollout="over"),
        entry("c", 2, rollout=None),
    ]
    traffic.append_ledger([*old, fresh])
    assert traffic.prune_ledger(T0 + 3600, {"x": {"a": 1}}, 100) == 3
    left = traffic.read_ledger("r", "x", {})
    assert [(e.replica, e.seq) for e in left] == [("a", 2), ("a", 9), ("b", 1)]
    assert traffic.ledger_ends() == {"a": 9, "b": 1}


def test_pruning_takes_no_more_at_once_than_it_is_told(engine: Engine) -> None:
    """A long transaction would keep routers from writing; the oldest go first."""
    traffic = TrafficState(engine)
    later = entry("a", 1, rollout=None).model_copy(update={"at": T0 + 1})
    traffic.append_ledger([later, *(entry("b", seq, rollout=None) for seq in range(1, 5))])
    assert [traffic.prune_ledger(T0 + 3600, {}, 3) for _ in range(3)] == [3, 2, 0]


def test_a_store_of_another_release_is_refused(engine: Engine) -> None:
    """A newer or older schema is an error with both versions, not a misread row."""
    with engine.begin() as db:
        db.execute(update(schema_table).values(version=99))
    with pytest.raises(StateError, match="schema version 99"):
        open_state(engine.url.render_as_string(hide_password=False))


def test_processes_that_open_an_empty_store_at_once_all_succeed(state_url: str) -> None:
    """Routers, controller and admin API start together: each creates what is missing, none fails on it."""
    go = threading.Barrier(6)

    def open_it(_: int) -> int | None:
        go.wait()
        with open_state(state_url).connect() as db:
            return db.execute(select(schema_table.c.version)).scalar_one()

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(open_it, range(6))) == [SCHEMA_VERSION] * 6


def test_an_unreachable_store_says_what_to_check() -> None:
    """A wrong URL is a StateError with the URL in it."""
    with pytest.raises(StateError, match="cannot be opened"):
        open_state("sqlite:////proc/nowhere/state.db")


def test_the_password_of_a_store_is_in_no_error() -> None:
    """State URLs carry passwords; errors end in logs."""
    secret = "-".join(("s3", "cr3t"))
    with pytest.raises(StateError, match=r"psycopg://me:\*\*\*@127.0.0.1:9/x") as refused:
        open_state(f"postgresql+psycopg://me:{secret}@127.0.0.1:9/x")
    assert secret not in "".join(traceback.format_exception(refused.value))
    with pytest.raises(StateError, match="is no database URL") as refused:
        open_state(f"//me:{secret}@host")
    assert secret not in "".join(traceback.format_exception(refused.value))


def many(engine: Engine, n: int) -> tuple[RolloutState, list[StoredRollout]]:
    """A store with n pending rollouts on n routes, each with a split."""
    state, traffic = RolloutState(engine), TrafficState(engine)
    for i in range(n):
        spec = make_spec(RolloutPolicy(), f"r{i}", record(), now=T0 + i).model_copy(update={"id": f"x{i}"})
        state.create(spec, initial(spec))
        traffic.put_split(split(1).model_copy(update={"route": f"r{i}"}))
    return state, state.active()


def moved(before: StoredRollout, new_split: int | None = None) -> Tick:
    """A tick that moves a rollout to warming, with an audit line, and a split where one is given."""
    spec = before.spec
    status = before.status.model_copy(update={"phase": Phase.WARMING, "ticks": 1})
    line = audit(1).model_copy(update={"rollout_id": spec.id})
    new = None if new_split is None else split(new_split).model_copy(update={"route": spec.route})
    return Tick(before, status, [line], split=new)


def test_many_ticks_are_one_transaction_and_a_conflict_costs_only_its_own(engine: Engine) -> None:
    """Of four, one was advanced by somebody else and one lost its split's race: the other two are stored."""
    state, before = many(engine, 4)
    assert state.save_ticks([moved(one) for one in before[:1]]) == {}
    lost = state.save_ticks([moved(before[0]), moved(before[1]), moved(before[2], 7), moved(before[3], 2)])
    assert sorted(lost) == ["x0", "x2"]
    assert "advanced by another controller" in str(lost["x0"])
    assert "not at version 6" in str(lost["x2"])
    assert state.active_versions() == {"x0": 2, "x1": 2, "x2": 1, "x3": 2}
    assert [len(state.audit(f"x{i}")) for i in range(4)] == [1, 1, 0, 1]
    assert {r: s.version for r, s in TrafficState(engine).splits().items()} == {
        "r0": 1, "r1": 1, "r2": 1, "r3": 2,
    }  # fmt: skip
    assert state.get("x2").status.phase is Phase.PENDING


def test_an_audit_line_is_written_once(engine: Engine) -> None:
    """The same tick of the same rollout cannot be in the trail twice, whoever writes it."""
    state, (before,) = many(engine, 1)
    state.save_ticks([moved(before)])
    again = moved(state.get("x0"))
    assert sorted(state.save_ticks([again])) == ["x0"]
    assert len(state.audit("x0")) == 1


def test_the_latest_rollout_of_a_route(engine: Engine) -> None:
    """By its begin; None for a route that never had one."""
    state, _ = many(engine, 2)
    spec = make_spec(RolloutPolicy(), "r0", record(2), now=T0 + 9).model_copy(update={"id": "newer"})
    over = state.get("x0")
    state.save_tick(Tick(over, over.status.model_copy(update={"phase": Phase.ABORTED})))
    state.create(spec, initial(spec))
    found = state.latest("r0")
    assert found is not None
    assert found.spec.id == "newer"
    assert state.latest("nope") is None
    assert [r.spec.id for r in state.get_many(["newer", "x1", "gone"])] == ["x1", "newer"]


def test_the_ledger_is_read_beyond_a_cursor_for_each_writer(engine: Engine) -> None:
    """Ends by writer, whatever else is in the ledger; only entries above the cursor, only of rollouts."""
    traffic = TrafficState(engine)
    assert traffic.ledger_ends() == {}
    traffic.append_ledger([entry("a", 1), entry("a", 2), entry("b", 5), entry("c", 1, rollout=None)])
    assert traffic.ledger_ends() == {"a": 2, "b": 5, "c": 1}
    found = traffic.read_beyond({"a": 1, "b": 4, "c": 0})
    assert [(e.replica, e.seq) for e in found] == [("a", 2), ("b", 5)]
    assert traffic.read_beyond({}) == []


def test_splits_are_read_by_version_and_by_name(engine: Engine) -> None:
    """Versions are enough to see what changed; more routes than one statement takes are read in parts."""
    traffic = TrafficState(engine)
    traffic.put_split(split(1))
    traffic.put_split(split(2, 0.1))
    assert traffic.split_versions() == {"r": 2}
    assert traffic.get_splits([f"x{i}" for i in range(1200)] + ["r"]) == {"r": split(2, 0.1)}


def test_hosts_whose_clocks_differ_agree_on_who_leads(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a database server its own clock decides: an hour's difference takes no lease away."""
    state = RolloutState(open_state(postgres_url))
    assert state.acquire_lease("c", "one", 30.0)
    real = time.time
    for off in (3600.0, -3600.0):
        monkeypatch.setattr("serve.state.rollouts.time.time", lambda off=off: real() + off)
        assert not state.acquire_lease("c", "two", 30.0)
        assert state.acquire_lease("c", "one", 30.0)
