"""What somebody who looks at rollouts reads: pages of them and of their audit trails, and who acts on them.

Newest first, a page at a time, so that a store with years in it answers as fast as a new one. Writes nothing
and knows nothing about how decisions are made.
"""

from __future__ import annotations

import json
import time
from typing import Any

from sqlalchemy import Engine, and_, or_, select

from contracts.config import Record
from contracts.errors import NotFoundError
from serve.state.rollouts import CONTROLLER_LEASE, AuditEntry, StoredRollout, read_rollout
from serve.state.tables import audit, leases, rollouts


class AuditLine(AuditEntry):
    """An entry with its place in the trail."""

    id: int


class ControllerLease(Record):
    """Who acts on rollouts at the moment."""

    holder: str
    expires_at: float
    alive: bool


class RolloutPages:
    """Typed access to what is looked at, of one state store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def rollouts(
        self, route: str | None, active: bool | None, after: str | None, limit: int
    ) -> list[StoredRollout]:
        """Rollouts of a route (None: of all), active or ended ones (None: both), newest first.

        Args:
            after: id of the last one of the page before. Raises NotFoundError when there is none of that id.
        """
        query = select(rollouts).order_by(rollouts.c.created_at.desc(), rollouts.c.id.desc()).limit(limit)
        if route is not None:
            query = query.where(rollouts.c.route == route)
        if active is not None:
            query = query.where(rollouts.c.active_route.is_not(None) == active)
        with self._engine.connect() as db:
            if after is not None:
                began = db.execute(select(rollouts.c.created_at).where(rollouts.c.id == after)).scalar()
                if began is None:
                    raise NotFoundError("after: there is no rollout of this id; give the last one of a page.")
                older = and_(rollouts.c.created_at == began, rollouts.c.id < after)
                query = query.where(or_(rollouts.c.created_at < began, older))
            return [read_rollout(row) for row in db.execute(query).mappings()]

    def audit(
        self, rollout_id: str, kind: str | None = None, before: int | None = None, limit: int = 50
    ) -> list[AuditLine]:
        """Entries of a trail, of one kind (None: of all) and below an id (None: from the end)."""
        query = select(audit).where(audit.c.rollout_id == rollout_id).order_by(audit.c.id.desc()).limit(limit)
        if kind is not None:
            query = query.where(audit.c.kind == kind)
        if before is not None:
            query = query.where(audit.c.id < before)
        with self._engine.connect() as db:
            rows = db.execute(query).mappings().all()
        return [AuditLine(**{**row, "body": _body(row["body"])}) for row in rows]

    def controller(self) -> ControllerLease | None:
        """The lease of the acting controller; None when there never was one, or it left on purpose."""
        query = select(leases.c.holder, leases.c.expires_at).where(leases.c.name == CONTROLLER_LEASE)
        with self._engine.connect() as db:
            row = db.execute(query).first()
        if row is None:
            return None
        return ControllerLease(
            holder=row.holder, expires_at=row.expires_at, alive=row.expires_at >= time.time()
        )


def _body(text: str) -> dict[str, Any]:
    """JSON has no infinity, but Python writes and reads one: whoever looks gets null."""
    return dict(json.loads(text, parse_constant=lambda _: None))
