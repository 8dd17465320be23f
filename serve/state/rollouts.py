"""Rollouts, their audit trail, people's commands, quarantine and the controller's lease.

A tick is written in one transaction: status, audit entries and the split it decided, or nothing. Knows
nothing about how decisions are made.
"""

from __future__ import annotations

import json
import time
from typing import Any

from sqlalchemy import Engine, RowMapping, and_, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from contracts.commands import VERBS
from contracts.config import Record, canonical_json
from contracts.errors import ConflictError, NotFoundError
from contracts.rollout import RolloutSpec, RolloutStatus
from contracts.traffic import Split
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


class RolloutState:
    """Typed access to the rollout tables of one state store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(self, spec: RolloutSpec, status: RolloutStatus) -> None:
        """Store a new rollout. Raises ConflictError when the route already has an active one."""
        values = {
            "id": spec.id,
            "route": spec.route,
            "active_route": spec.route,
            "created_at": spec.created_at,
            "spec": spec.model_dump_json(),
            "status": status.model_dump_json(),
            "status_version": 1,
        }
        try:
            with self._engine.begin() as db:
                db.execute(insert(rollouts).values(**values))
        except IntegrityError as err:
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

    def active(self, route: str | None = None) -> list[StoredRollout]:
        """Active rollouts, oldest first, of one route or of all."""
        where = rollouts.c.active_route.is_not(None)
        return self._select(where if route is None else and_(where, rollouts.c.route == route))

    def history(self, route: str | None = None) -> list[StoredRollout]:
        """All rollouts, oldest first."""
        return self._select(rollouts.c.id.is_not(None) if route is None else rollouts.c.route == route)

    def _select(self, where: Any) -> list[StoredRollout]:
        query = select(rollouts).where(where).order_by(rollouts.c.created_at, rollouts.c.id)
        with self._engine.connect() as db:
            return [read_rollout(row) for row in db.execute(query).mappings()]

    def save_tick(
        self,
        before: StoredRollout,
        status: RolloutStatus,
        entries: list[AuditEntry],
        split: Split | None = None,
        done_commands: list[int] | None = None,
        quarantined: tuple[str, str] | None = None,
    ) -> StoredRollout:
        """Persist one tick atomically: status, audit, split, consumed commands, quarantine (digest, reason).

        Raises: ConflictError when another controller wrote a tick since `before` was read, or the split
        changed; nothing is written then.
        """
        now = time.time()
        with self._engine.begin() as db:
            where = and_(rollouts.c.id == before.spec.id, rollouts.c.status_version == before.status_version)
            values: dict[str, Any] = {
                "status": status.model_dump_json(),
                "status_version": before.status_version + 1,
            }
            if status.phase.terminal:
                values["active_route"] = None
            if db.execute(update(rollouts).where(where).values(**values)).rowcount != 1:
                raise ConflictError(f"rollout {before.spec.id!r} was advanced by another controller.")
            if split is not None:
                write_split(db, split)
            for e in entries:
                row = {"rollout_id": e.rollout_id, "tick": e.tick, "at": e.at, "kind": e.kind}
                db.execute(insert(audit).values(body=canonical_json(e.body), **row))
            if done_commands:
                db.execute(update(commands).where(commands.c.id.in_(done_commands)).values(done_at=now))
            if quarantined is not None:
                known = db.execute(
                    select(quarantine.c.digest).where(quarantine.c.digest == quarantined[0])
                ).first()
                if known is None:
                    db.execute(
                        insert(quarantine).values(
                            digest=quarantined[0], rollout_id=before.spec.id, reason=quarantined[1], at=now
                        )
                    )
        return StoredRollout(spec=before.spec, status=status, status_version=before.status_version + 1)

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
        """Commands not yet consumed, oldest first."""
        query = (
            select(commands)
            .where(commands.c.rollout_id == rollout_id, commands.c.done_at.is_(None))
            .order_by(commands.c.id)
        )
        fields = ("id", "rollout_id", "verb", "by", "reason", "at")
        with self._engine.connect() as db:
            return [Command(**{f: row[f] for f in fields}) for row in db.execute(query).mappings()]

    # quarantine and lease -----------------------------------------------------------------------

    def quarantined(self, digest: str) -> str | None:
        """The reason a digest is quarantined, or None."""
        with self._engine.connect() as db:
            return db.execute(select(quarantine.c.reason).where(quarantine.c.digest == digest)).scalar()

    def acquire_lease(self, name: str, holder: str, ttl_s: float) -> bool:
        """Take or renew a lease; True when `holder` has it for the next `ttl_s` seconds."""
        now = time.time()
        values = {"holder": holder, "expires_at": now + ttl_s}
        with self._engine.begin() as db:
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
