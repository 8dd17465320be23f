"""Rollouts, their audit trail, people's commands, quarantine and the controller's lease.

A tick is written in one transaction: status, audit entries and the split it decided, or nothing. Knows
nothing about how decisions are made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import (
    Connection,
    Engine,
    RowMapping,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from contracts.commands import VERBS
from contracts.config import Record
from contracts.errors import ConflictError, NotFoundError
from contracts.rollout import RolloutSpec, RolloutStatus
from contracts.traffic import Split
from serve.state.outbox import Notice, write_notices
from serve.state.tables import audit, commands, leases, quarantine, rollouts
from serve.state.traffic import write_split

CONTROLLER_LEASE = "rollout-controller"
"""Whoever holds it acts on rollouts."""


class AuditEntry(Record):
    """One append-only line: what was seen and decided at a tick. `body` is JSON-able."""

    rollout_id: str
    tick: int
    at: float
    kind: str
    body: dict[str, Any]


class Command(Record):
    """What a person asked of a rollout."""

    id: int
    rollout_id: str
    verb: str
    by: str
    reason: str
    at: float


class StoredRollout(Record):
    """A rollout as the store has it; `status_version` guards against a second writer."""

    spec: RolloutSpec
    status: RolloutStatus
    status_version: int


@dataclass(frozen=True)
class Tick:
    """What one tick of one rollout writes, all of it or nothing."""

    before: StoredRollout
    status: RolloutStatus
    entries: Sequence[AuditEntry] = ()
    split: Split | None = None
    done_commands: Sequence[int] = ()
    quarantined: tuple[str, str] | None = None
    """(digest, reason)."""
    notices: Sequence[Notice] = ()
    status_json: str | None = None
    """The status as JSON, where the caller has it already."""

    def after(self) -> StoredRollout:
        """The rollout as it is stored once this tick is."""
        version = self.before.status_version + 1
        return StoredRollout.model_construct(
            spec=self.before.spec, status=self.status, status_version=version
        )


class RolloutState:
    """Typed access to the rollout tables of one state store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(self, spec: RolloutSpec, status: RolloutStatus, notices: Sequence[Notice] = ()) -> None:
        """Store a new rollout. Raises ConflictError when the route already has an active one."""
        self.create_all([(spec, status)], notices)

    def create_all(
        self, made: Sequence[tuple[RolloutSpec, RolloutStatus]], notices: Sequence[Notice] = ()
    ) -> None:
        """Store the rollouts of one test, all of them or none. Raises ConflictError like `create`."""
        try:
            with self._engine.begin() as db:
                for spec, status in made:
                    db.execute(insert(rollouts).values(**_new_row(spec, status)))
                write_notices(db, notices)
        except IntegrityError as err:
            spec = made[0][0]
            raise ConflictError(
                f"route {spec.route!r} already has an active rollout (or id {spec.id!r} exists). "
                f"See 'stillhouse rollout status {spec.route}'; 'stillhouse rollout abort' ends it."
            ) from err

    def get(self, rollout_id: str) -> StoredRollout:
        """One rollout by id. Raises NotFoundError."""
        found = self._select(rollouts.c.id == rollout_id)
        if not found:
            raise NotFoundError(f"no rollout {rollout_id!r}; 'stillhouse rollout history' lists them.")
        return found[0]

    def get_many(self, ids: Sequence[str]) -> list[StoredRollout]:
        """Several rollouts by id, oldest first; those that do not exist are left out."""
        chunks = (ids[i : i + 500] for i in range(0, len(ids), 500))
        return [one for chunk in chunks for one in self._select(rollouts.c.id.in_(chunk))]

    def active(self, route: str | None = None) -> list[StoredRollout]:
        """Active rollouts, oldest first, of one route or of all."""
        where = rollouts.c.active_route.is_not(None)
        return self._select(where if route is None else and_(where, rollouts.c.route == route))

    def active_versions(self) -> dict[str, int]:
        """Id → status version of the active rollouts, oldest first: enough to see which of them changed."""
        query = (
            select(rollouts.c.id, rollouts.c.status_version)
            .where(rollouts.c.active_route.is_not(None))
            .order_by(rollouts.c.created_at, rollouts.c.id)
        )
        with self._engine.connect() as db:
            return {row.id: row.status_version for row in db.execute(query)}

    def history(self, route: str | None = None) -> list[StoredRollout]:
        """All rollouts, oldest first."""
        return self._select(rollouts.c.id.is_not(None) if route is None else rollouts.c.route == route)

    def latest(self, route: str) -> StoredRollout | None:
        """The route's last rollout, or None when it never had one."""
        newest = (
            select(rollouts.c.id)
            .where(rollouts.c.route == route)
            .order_by(rollouts.c.created_at.desc(), rollouts.c.id.desc())
            .limit(1)
            .scalar_subquery()
        )
        found = self._select(rollouts.c.id == newest)
        return found[0] if found else None

    def _select(self, where: Any) -> list[StoredRollout]:
        query = select(rollouts).where(where).order_by(rollouts.c.created_at, rollouts.c.id)
        with self._engine.connect() as db:
            return [read_rollout(row) for row in db.execute(query).mappings()]

    # ticks --------------------------------------------------------------------------------------

    def save_tick(self, tick: Tick) -> StoredRollout:
        """Persist one tick atomically.

        Raises: ConflictError when another controller wrote a tick since `before` was read, or the split
        changed; nothing is written then.
        """
        with self._begin() as db:
            _write(db, [tick])
        return tick.after()

    def save_ticks(self, ticks: Sequence[Tick]) -> dict[str, ConflictError]:
        """Persist many rollouts' ticks in one transaction; returns rollout id → conflict of those that lost.

        A conflict costs its own rollout this tick and nobody else's.
        """
        try:
            with self._begin() as db:
                _write(db, ticks)
            return {}
        except (ConflictError, IntegrityError):  # somebody lost: find out who, each behind a savepoint
            return self._save_each(ticks)

    def _save_each(self, ticks: Sequence[Tick]) -> dict[str, ConflictError]:
        lost: dict[str, ConflictError] = {}
        with self._begin() as db:
            for tick in ticks:
                try:
                    with db.begin_nested():
                        _write(db, [tick])
                except ConflictError as err:
                    lost[tick.before.spec.id] = err
                except IntegrityError:
                    lost[tick.before.spec.id] = _advanced(tick.before.spec.id)
        return lost

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with self._engine.begin() as db:
            if db.dialect.name == "sqlite":
                # The driver would begin at the first write, and a savepoint before that is a transaction.
                db.exec_driver_sql("BEGIN IMMEDIATE")
            yield db

    def audit(self, rollout_id: str) -> list[AuditEntry]:
        """The audit trail in order."""
        query = select(audit).where(audit.c.rollout_id == rollout_id).order_by(audit.c.id)
        with self._engine.connect() as db:
            rows = db.execute(query).mappings().all()
        fields = ("rollout_id", "tick", "at", "kind")
        return [AuditEntry(**{f: row[f] for f in fields}, body=json.loads(row["body"])) for row in rows]

    # commands -----------------------------------------------------------------------------------

    def add_command(self, rollout_id: str, verb: str, by: str, reason: str = "") -> None:
        """Ask the controller to do something at its next tick."""
        if verb not in VERBS:
            raise NotFoundError(f"no command {verb!r}; there are {', '.join(VERBS)}.")
        with self._engine.begin() as db:
            db.execute(
                insert(commands).values(
                    rollout_id=rollout_id, verb=verb, by=by, reason=reason, at=time.time()
                )
            )

    def pending_commands(self, rollout_id: str) -> list[Command]:
        """Commands to one rollout that are not yet consumed, oldest first."""
        return self.all_pending_commands().get(rollout_id, [])

    def all_pending_commands(self) -> dict[str, list[Command]]:
        """Rollout → commands not yet consumed, oldest first."""
        query = select(commands).where(commands.c.done_at.is_(None)).order_by(commands.c.id)
        fields = ("id", "rollout_id", "verb", "by", "reason", "at")
        found: dict[str, list[Command]] = {}
        with self._engine.connect() as db:
            for row in db.execute(query).mappings():
                found.setdefault(row["rollout_id"], []).append(Command(**{f: row[f] for f in fields}))
        return found

    # quarantine and lease -----------------------------------------------------------------------

    def quarantined(self, digest: str) -> str | None:
        """The reason a digest is quarantined, or None."""
        with self._engine.connect() as db:
            return db.execute(select(quarantine.c.reason).where(quarantine.c.digest == digest)).scalar()

    def acquire_lease(self, name: str, holder: str, ttl_s: float) -> bool:
        """Take or renew a lease; True when `holder` has it for the next `ttl_s` seconds.

        The clock is the database's where that is a server: hosts whose clocks differ agree on who leads.
        """
        with self._engine.begin() as db:
            now = _database_time(db)
            values = {"holder": holder, "expires_at": now + ttl_s}
            mine_or_free = and_(
                leases.c.name == name, or_(leases.c.holder == holder, leases.c.expires_at < now)
            )
            if db.execute(update(leases).where(mine_or_free).values(**values)).rowcount == 1:
                return True
            try:
                with db.begin_nested():
                    db.execute(insert(leases).values(name=name, **values))
                return True
            except IntegrityError:
                return False

    def release_lease(self, name: str, holder: str) -> None:
        """Give a lease back, so that the next controller need not wait for it to expire."""
        with self._engine.begin() as db:
            db.execute(delete(leases).where(leases.c.name == name, leases.c.holder == holder))


def read_rollout(row: RowMapping) -> StoredRollout:
    """A row of the table as what it says."""
    return StoredRollout(
        spec=RolloutSpec.model_validate_json(row["spec"]),
        status=RolloutStatus.model_validate_json(row["status"]),
        status_version=row["status_version"],
    )


def _database_time(db: Connection) -> float:
    if db.dialect.name == "postgresql":
        return float(db.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())
    return time.time()  # SQLite has no other clock than that of the one host that can open it


def _write(db: Connection, ticks: Sequence[Tick]) -> None:
    """Write ticks inside a transaction of the caller's. Raises ConflictError when one of them lost a race."""
    rows = [_status_row(tick) for tick in ticks]
    if rows and db.execute(_STATUS, rows).rowcount != len(rows):
        raise _advanced(ticks[0].before.spec.id)
    now = time.time()
    for tick in ticks:
        if tick.split is not None:
            write_split(db, tick.split)
        if tick.done_commands:
            done = commands.c.id.in_(tick.done_commands)
            db.execute(update(commands).where(done).values(done_at=now))
        if tick.quarantined is not None:
            _quarantine(db, tick.before.spec.id, *tick.quarantined, now)
    trail = [_audit_row(entry) for tick in ticks for entry in tick.entries]
    if trail:
        db.execute(insert(audit), trail)
    write_notices(db, [notice for tick in ticks for notice in tick.notices])


_STATUS = (
    update(rollouts)
    .where(and_(rollouts.c.id == bindparam("rollout"), rollouts.c.status_version == bindparam("version")))
    .values(
        status=bindparam("body"),
        status_version=rollouts.c.status_version + 1,
        active_route=bindparam("active"),
    )
)


def _new_row(spec: RolloutSpec, status: RolloutStatus) -> dict[str, Any]:
    return {
        "id": spec.id,
        "route": spec.route,
        "active_route": spec.place,
        "created_at": spec.created_at,
        "spec": spec.model_dump_json(),
        "status": status.model_dump_json(),
        "status_version": 1,
    }


def _status_row(tick: Tick) -> dict[str, Any]:
    spec, status = tick.before.spec, tick.status
    return {
        "rollout": spec.id,
        "version": tick.before.status_version,
        "body": tick.status_json or status.model_dump_json(),
        "active": None if status.phase.terminal else spec.place,
    }


def _audit_row(entry: AuditEntry) -> dict[str, Any]:
    return {
        "rollout_id": entry.rollout_id,
        "tick": entry.tick,
        "at": entry.at,
        "kind": entry.kind,
        "body": orjson.dumps(entry.body, option=orjson.OPT_SORT_KEYS).decode(),
    }


def _quarantine(db: Connection, rollout_id: str, digest: str, reason: str, now: float) -> None:
    if db.execute(select(quarantine.c.digest).where(quarantine.c.digest == digest)).first() is None:
        values = {"digest": digest, "rollout_id": rollout_id, "reason": reason, "at": now}
        db.execute(insert(quarantine).values(**values))


def _advanced(rollout_id: str) -> ConflictError:
    return ConflictError(f"rollout {rollout_id!r} was advanced by another controller.")
