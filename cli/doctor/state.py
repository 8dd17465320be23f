"""What the state store says: schema, clocks, the controller's lease, routers, evidence, keys.

Opens nothing for writing and upgrades nothing. Knows nothing about the machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Engine, func, select

from cli.doctor.finding import Finding, Patient, fail, ok, skip, warn
from contracts.errors import StateError
from serve.state.keys import KeyState
from serve.state.look import RolloutPages
from serve.state.migrations import SCHEMA_VERSION, check_version
from serve.state.rollouts import RolloutState
from serve.state.tables import look_at_state, shown
from serve.state.traffic import TrafficState

FRESH_S = 15.0
"""A router or engine that was seen within these seconds runs."""
_CLOCK_S = 5.0
_LAG = 1000
"""Ledger entries that wait for the controller; a router writes one a second, arm and rollout."""
_EXPIRES_SOON_S = 7 * 86_400.0


def store(patient: Patient) -> Iterator[Finding]:
    """Reachable, and of this release's schema."""
    url = patient.config.state_url
    file = url.removeprefix("sqlite:///")
    if file != url and patient.record is None and not Path(file).is_file():
        yield ok("state store", f"{shown(url)} is made by the first 'stillhouse up'")
        return
    _, found = look_at_state(url)
    if found is None:
        yield ok("state store", f"{shown(url)} is empty; its tables are made by whatever opens it")
        return
    check_version(found)
    if found < SCHEMA_VERSION:
        what = f"{shown(url)} has schema {found}, this release {SCHEMA_VERSION}"
        yield warn("state store", what, "'stillhouse backup FILE', then 'stillhouse upgrade --apply'.")
    else:
        yield ok("state store", f"{shown(url)}, schema {found}")


def readable(patient: Patient) -> Engine | None:
    """The store when it can be read by this release; whatever is wrong with it, `store` says."""
    try:
        engine, found = look_at_state(patient.config.state_url)
    except StateError:
        return None
    return engine if found == SCHEMA_VERSION else None


def clock(patient: Patient) -> Iterator[Finding]:
    """Against the database server's, and against the hosts of routers."""
    engine = readable(patient)
    if engine is None:
        yield skip("clock", "no state store to compare with")
        return
    if engine.dialect.name == "postgresql":
        with engine.connect() as db:
            before = time.time()
            theirs = float(db.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())
            off = theirs - (before + time.time()) / 2
        if abs(off) > _CLOCK_S:
            yield fail("clock", f"{abs(off):.1f} s off the database's", "run NTP (chrony) on both hosts.")
            return
    ahead = [r for r in TrafficState(engine).routers(0) if r.seen_at > time.time() + _CLOCK_S]
    if ahead:
        off = max(r.seen_at for r in ahead) - time.time()
        what = f"router {ahead[0].replica} is {off:.0f} s ahead of this host"
        yield fail("clock", what, "run NTP (chrony) on all hosts: heartbeats and looks compare clocks.")
    else:
        yield ok("clock", "agrees with the store's and the routers'")


def controller(patient: Patient) -> Iterator[Finding]:
    """That somebody decides, when there is something to decide."""
    engine = readable(patient)
    if engine is None:
        yield skip("controller", "no state store")
        return
    lease, active = RolloutPages(engine).controller(), RolloutState(engine).active()
    if lease is not None and lease.alive:
        yield ok("controller", f"{lease.holder} holds the lease; {len(active)} rollouts active")
    elif active:
        what = f"no controller holds the lease, and {len(active)} rollouts wait"
        yield fail(
            "controller", what, "start the stack; 'serve status' and the controller's log say why not."
        )
    elif patient.runs:
        yield warn("controller", "no controller holds the lease", "see the log of stillhouse-controller.")
    else:
        yield skip("controller", "none runs, nothing to decide")


def routers(patient: Patient) -> Iterator[Finding]:
    """Heartbeats, the splits they assign with, and evidence that waits."""
    engine = readable(patient)
    if engine is None:
        yield skip("routers", "no state store")
        return
    traffic = TrafficState(engine)
    fresh, versions = traffic.routers(FRESH_S), traffic.split_versions()
    if not fresh:
        if patient.runs:
            what = f"none reported within {FRESH_S:.0f} s"
            yield fail("routers", what, "see the routers' log: can they write to the store?")
        else:
            yield skip("routers", "none runs")
        return
    behind = [
        f"{one.replica} assigns {route} by v{one.versions[route]}, not v{version}"
        for one in fresh
        for route, version in sorted(versions.items())
        if one.versions.get(route, version) < version
    ]
    if behind:
        yield warn("routers", behind[0], "look again: if it stays, that router cannot read the store.")
    else:
        yield ok("routers", f"{len(fresh)} report, all {len(versions)} splits are current")
    yield from _lag(engine, traffic)


def _lag(engine: Engine, traffic: TrafficState) -> Iterator[Finding]:
    ends = traffic.ledger_ends()
    for one in RolloutState(engine).active():
        cursor = one.status.cursor
        waiting = sum(max(0, ends.get(replica, 0) - seq) for replica, seq in cursor.items())
        if waiting > _LAG and not one.status.paused:
            what = f"{waiting} ledger entries wait for rollout {one.spec.id}"
            yield warn("evidence", what, "the controller is behind: see its log and the database's load.")


def keys(patient: Patient) -> Iterator[Finding]:
    """Keys that end soon or are not limited; none where one is needed."""
    engine = readable(patient)
    if engine is None:
        yield skip("keys", "no state store")
        return
    found = [k for k in KeyState(engine).keys().values() if not k.disabled]
    if not patient.config.router.keys:
        yield ok("keys", "routers ask for none (router.keys: false)")
        if patient.config.http.host not in ("127.0.0.1", "localhost", "::1"):
            yield warn("keys", "everybody who reaches the router may ask", "set router.keys: true.")
        return
    now = time.time()
    usable = [k for k in found if k.expires_at is None or k.expires_at > now]
    if not usable:
        yield fail("keys", "routers ask for a key, and there is none", "'stillhouse keys create NAME'.")
        return
    for key in usable:
        if key.expires_at is not None and key.expires_at < now + _EXPIRES_SOON_S:
            what = f"key {key.id} ends in {(key.expires_at - now) / 86_400:.1f} days"
            yield warn("keys", what, "make its successor now: 'stillhouse keys create'.")
    free = [k.id for k in usable if not k.admin and not (k.requests_per_minute or k.tokens_per_minute)]
    if free:
        what = f"{len(free)} keys without limits: {', '.join(free[:3])}"
        yield warn("keys", what, "'stillhouse keys set KEY --requests-per-minute N'.")
    yield ok("keys", f"{len(usable)} usable, {len(found) - len(usable)} ended")
