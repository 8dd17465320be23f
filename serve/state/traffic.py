"""Splits, endpoints, router reports and the evidence ledger: what routers and controllers exchange.

Every method is one short transaction. Knows nothing about HTTP, Ray or statistics.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import Connection, Engine, Select, and_, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from contracts.config import Record
from contracts.errors import ConflictError
from contracts.rollout import LedgerEntry
from contracts.traffic import Split
from serve.state.tables import endpoints, ledger, routers, splits

GUEST = "adapter:"
"""How the replica's name begins in an adapter's registration."""


class Endpoint(Record):
    """One HTTP-speaking engine replica of a Serve application."""

    app: str
    replica: str
    url: str
    pid: int
    seen_at: float

    @property
    def guest(self) -> bool:
        """True for an adapter's place: the engine behind it is another application's."""
        return self.replica.startswith(GUEST)


class RouterReport(Record):
    """What a router replica says of itself, about once a second."""

    replica: str
    versions: dict[str, int] = {}
    """Route → split version it assigns with."""
    in_flight: dict[str, int] = {}
    """Upstream name → requests in flight."""
    address: str | None = None
    """host:port at which its own machine reaches it; None until it listens, and behind another server."""
    pid: int | None = None
    stack: str | None = None
    """The stack it belongs to; several may share a store, on one machine as well."""
    seen_at: float = 0.0


class TrafficState:
    """Typed access to the traffic tables of one state store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # splits -----------------------------------------------------------------------------------

    def splits(self) -> dict[str, Split]:
        """All splits by route."""
        with self._engine.connect() as db:
            rows = db.execute(select(splits.c.route, splits.c.body)).all()
        return {route: Split.model_validate_json(body) for route, body in rows}

    def get_split(self, route: str) -> Split | None:
        """The current split of a route, or None."""
        with self._engine.connect() as db:
            body = db.execute(select(splits.c.body).where(splits.c.route == route)).scalar()
        return None if body is None else Split.model_validate_json(body)

    def split_versions(self) -> dict[str, int]:
        """Version of every route's split: enough to see which of them changed."""
        with self._engine.connect() as db:
            return {row.route: row.version for row in db.execute(select(splits.c.route, splits.c.version))}

    def get_splits(self, routes: Sequence[str]) -> dict[str, Split]:
        """The current splits of some routes."""
        found: dict[str, Split] = {}
        with self._engine.connect() as db:
            for i in range(0, len(routes), 500):
                query = select(splits.c.route, splits.c.body).where(splits.c.route.in_(routes[i : i + 500]))
                found.update({r: Split.model_validate_json(body) for r, body in db.execute(query)})
        return found

    def put_split(self, split: Split) -> None:
        """Write a split whose version is exactly one above the stored one (1 for a new route).

        Raises: ConflictError when somebody else wrote in between.
        """
        with self._engine.begin() as db:
            write_split(db, split)

    def delete_split(self, route: str) -> None:
        """Remove a route."""
        with self._engine.begin() as db:
            db.execute(delete(splits).where(splits.c.route == route))

    # endpoints ----------------------------------------------------------------------------------

    def put_endpoint(self, app: str, replica: str, url: str, pid: int) -> None:
        """Register an engine replica, or refresh its heartbeat."""
        values = {"url": url, "pid": pid, "seen_at": time.time()}
        with self._engine.begin() as db:
            key = and_(endpoints.c.app == app, endpoints.c.replica == replica)
            if db.execute(update(endpoints).where(key).values(**values)).rowcount == 0:
                db.execute(insert(endpoints).values(app=app, replica=replica, **values))

    def drop_endpoint(self, app: str, replica: str | None = None) -> None:
        """Forget one replica of an application, or all of them."""
        with self._engine.begin() as db:
            where = endpoints.c.app == app
            if replica is not None:
                where = and_(where, endpoints.c.replica == replica)
            db.execute(delete(endpoints).where(where))

    def drop_stale_endpoints(self, older_than_s: float, app: str | None = None) -> None:
        """Forget replicas (of one application, or of all) whose last heartbeat is older than this."""
        where = endpoints.c.seen_at < time.time() - older_than_s
        with self._engine.begin() as db:
            db.execute(delete(endpoints).where(where if app is None else and_(where, endpoints.c.app == app)))

    def endpoints(self, max_age_s: float | None = None) -> dict[str, list[Endpoint]]:
        """Application → its replicas, only those seen within `max_age_s` when given."""
        query = select(endpoints).order_by(endpoints.c.app, endpoints.c.replica)
        if max_age_s is not None:
            query = query.where(endpoints.c.seen_at >= time.time() - max_age_s)
        found: dict[str, list[Endpoint]] = {}
        with self._engine.connect() as db:
            for row in db.execute(query).mappings():
                found.setdefault(row["app"], []).append(Endpoint(**row))
        return found

    # routers ------------------------------------------------------------------------------------

    def report_router(self, report: RouterReport) -> None:
        """Store a router replica's report, stamped now."""
        values = {"body": report.model_dump_json(), "seen_at": time.time()}
        with self._engine.begin() as db:
            key = routers.c.replica == report.replica
            if db.execute(update(routers).where(key).values(**values)).rowcount == 0:
                db.execute(insert(routers).values(replica=report.replica, **values))

    def drop_router(self, replica: str) -> None:
        """Forget a router replica that leaves."""
        with self._engine.begin() as db:
            db.execute(delete(routers).where(routers.c.replica == replica))

    def routers(self, max_age_s: float) -> list[RouterReport]:
        """Reports of the router replicas seen within `max_age_s`."""
        query = select(routers.c.body, routers.c.seen_at).where(routers.c.seen_at >= time.time() - max_age_s)
        with self._engine.connect() as db:
            rows = db.execute(query).all()
        return [RouterReport.model_validate_json(b).model_copy(update={"seen_at": at}) for b, at in rows]

    # ledger -------------------------------------------------------------------------------------

    def append_ledger(self, entries: Iterable[LedgerEntry]) -> None:
        """Append entries; one already stored (same replica and seq) stays as it is, so retries are safe."""
        rows = [
            {
                "replica": entry.replica,
                "seq": entry.seq,
                "route": entry.route,
                "rollout_id": entry.rollout_id,
                "at": entry.at,
                "body": entry.model_dump_json(),
            }
            for entry in entries
        ]
        if not rows:
            return
        # One statement for all of them: with a savepoint an entry, each would be three round trips.
        make = sqlite.insert if self._engine.dialect.name == "sqlite" else postgresql.insert
        with self._engine.begin() as db:
            db.execute(make(ledger).on_conflict_do_nothing(), rows)

    def read_ledger(self, route: str, rollout_id: str, cursor: dict[str, int]) -> list[LedgerEntry]:
        """Entries of a rollout not yet consumed: per replica, those above its cursor, in order.

        A replica commits its own entries in order, so a per-replica cursor never skips a late commit
        (one global cursor would, under PostgreSQL).
        """
        mine = select(ledger.c.body).where(ledger.c.route == route, ledger.c.rollout_id == rollout_id)
        seen = [and_(ledger.c.replica == r, ledger.c.seq > s) for r, s in cursor.items()]
        # In pieces: SQLite takes no expression of a thousand terms, and a long rollout outlives many routers.
        known = [or_(*seen[i : i + 500]) for i in range(0, len(seen), 500)]
        found: list[LedgerEntry] = []
        with self._engine.connect() as db:
            for where in (ledger.c.replica.notin_(list(cursor)), *known):
                rows = db.execute(mine.where(where))
                found += [LedgerEntry.model_validate_json(body) for (body,) in rows]
        return sorted(found, key=lambda entry: (entry.replica, entry.seq))

    def ledger_ends(self) -> dict[str, int]:
        """Writer → its last sequence number: two index seeks a writer, however long the ledger is."""
        with self._engine.connect() as db:
            return {row.replica: row.seq for row in db.execute(_ENDS)}

    def read_beyond(self, cursor: dict[str, int]) -> list[LedgerEntry]:
        """Entries of all rollouts above a cursor per writer, in order; only of the writers it names."""
        found: list[LedgerEntry] = []
        with self._engine.connect() as db:
            for replica, seq in cursor.items():
                where = and_(
                    ledger.c.replica == replica, ledger.c.seq > seq, ledger.c.rollout_id.is_not(None)
                )
                query = select(ledger.c.body).where(where).order_by(ledger.c.seq)
                found += [LedgerEntry.model_validate_json(body) for (body,) in db.execute(query)]
        return found

    def prune_ledger(self, before: float, cursors: Mapping[str, Mapping[str, int]], limit: int) -> int:
        """Delete the oldest entries from before a time (Unix seconds) that no rollout will read.

        Args:
            cursors: active rollout → replica → last sequence number it has consumed; what is beyond stays.
            limit: how many entries are looked at.

        Returns: how many were deleted.
        """
        oldest = (
            select(ledger.c.replica, ledger.c.seq, ledger.c.rollout_id)
            .where(ledger.c.at < before)
            .order_by(ledger.c.at)
            .limit(limit)
        )
        with self._engine.begin() as db:
            gone = [
                {"r": replica, "s": seq}
                for replica, seq, rollout in db.execute(oldest)
                if rollout not in cursors or seq <= cursors[rollout].get(replica, 0)
            ]
            if gone:
                mine = and_(ledger.c.replica == bindparam("r"), ledger.c.seq == bindparam("s"))
                db.execute(delete(ledger).where(mine), gone)
        return len(gone)


def _ledger_ends() -> Select[tuple[str, int]]:
    """Loose index scan: every writer's name by hopping from one to the next, then its highest number."""
    names = select(func.min(ledger.c.replica).label("replica")).cte("names", recursive=True)
    following = select(func.min(ledger.c.replica)).where(ledger.c.replica > names.c.replica)
    names = names.union_all(select(following.scalar_subquery()).where(names.c.replica.is_not(None)))
    last = select(func.max(ledger.c.seq)).where(ledger.c.replica == names.c.replica).scalar_subquery()
    return select(names.c.replica, last.label("seq")).where(names.c.replica.is_not(None))


_ENDS = _ledger_ends()


def write_split(db: Connection, split: Split) -> None:
    """Compare-and-set a split inside a transaction of the caller's. Raises ConflictError on a lost race."""
    body = split.model_dump_json()
    if split.version == 1:
        try:
            with db.begin_nested():
                db.execute(insert(splits).values(route=split.route, version=1, body=body))
        except IntegrityError as err:
            raise ConflictError(
                f"route {split.route!r} already has a split; read it and write version + 1."
            ) from err
        return
    where = and_(splits.c.route == split.route, splits.c.version == split.version - 1)
    if db.execute(update(splits).where(where).values(version=split.version, body=body)).rowcount != 1:
        raise ConflictError(
            f"split of route {split.route!r} was changed by somebody else: "
            f"it is not at version {split.version - 1} any more."
        )
