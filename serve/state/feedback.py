"""Which requests were served, and what users said about them.

Every method is one short transaction. Knows nothing about HTTP or the request log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import orjson
from sqlalchemy import (
    JSON,
    ColumnElement,
    Engine,
    Executable,
    Text,
    bindparam,
    cast,
    delete,
    func,
    insert,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from contracts.errors import ConflictError
from contracts.feedback import Feedback
from serve.state.tables import feedback, served

_BATCH = 500


class Served(NamedTuple):
    """A request that was answered; the fields are the table's columns."""

    request_id: str
    route: str
    arm: str
    reason: str
    """Why it got that arm; only random assignments are evidence."""
    rollout_id: str | None
    split_version: int
    log_mode: str
    subjects: str
    """Hashes of the ids it belongs to, separated by spaces."""
    at: float


class Stored(Enum):
    """What storing a judgement changed."""

    NEW = "created"
    CHANGED = "updated"
    SAME = "unchanged"


@cache
def _add_served(dialect: str) -> Executable:
    """All rows as one JSON parameter: row by row, SQLite's driver lets go of the interpreter and takes it
    again for each, and the router's event loop with it.
    """
    columns = [served.c[name] for name in Served._fields]
    given: Any = bindparam("rows", type_=Text)
    values: list[ColumnElement[Any]]
    if dialect == "sqlite":
        item = func.json_each(given).table_valued("value").c.value
        values = [func.json_extract(item, f"$[{at}]") for at in range(len(columns))]
        # Without a condition SQLite takes ON CONFLICT for a join's.
        chosen = select(*values).where(true())
        inserted = sqlite.insert(served).from_select(columns, chosen)
        return inserted.on_conflict_do_nothing(index_elements=[served.c.request_id])
    item = func.json_array_elements(cast(given, JSON)).column_valued("item")
    values = [cast(item.op("->>")(at), column.type) for at, column in enumerate(columns)]
    return (
        postgresql.insert(served)
        .from_select(columns, select(*values))
        .on_conflict_do_nothing(index_elements=[served.c.request_id])
    )


class FeedbackState:
    """Typed access to the feedback tables of one state store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # served requests ------------------------------------------------------------------------------

    def add_served(self, rows: Sequence[Served]) -> None:
        """Note served requests; one that is there already (a retried write, or a client's own id) stays."""
        if rows:
            with self._engine.begin() as db:
                db.execute(
                    _add_served(self._engine.dialect.name),
                    {"rows": orjson.dumps([tuple(row) for row in rows]).decode()},
                )

    def find_served(self, request_id: str) -> Served | None:
        """A served request, or None."""
        query = select(served).where(served.c.request_id == request_id)
        with self._engine.connect() as db:
            row = db.execute(query).mappings().first()
        return None if row is None else Served(**row)

    # feedback ---------------------------------------------------------------------------------------

    def store(self, given: Feedback) -> Stored:
        """Store a judgement; the same id again replaces the earlier one.

        Raises: ConflictError when the id belongs to another request.
        """
        values = {"at": given.ts, "body": given.model_dump_json()}
        with self._engine.begin() as db:
            try:
                with db.begin_nested():
                    db.execute(insert(feedback).values(id=given.id, request_id=given.request_id, **values))
                return Stored.NEW
            except IntegrityError:  # the id is there already
                pass
            row = (
                db.execute(select(feedback).where(feedback.c.id == given.id).with_for_update())
                .mappings()
                .one()
            )
            if row["request_id"] != given.request_id:
                raise ConflictError(
                    f"the id {given.id!r} was used for another request; give every judgement its own id."
                )
            before = Feedback.model_validate_json(row["body"])
            if before.model_copy(update={"ts": given.ts}) == given:
                return Stored.SAME
            db.execute(update(feedback).where(feedback.c.id == given.id).values(**values))
            return Stored.CHANGED

    def feedback_on(self, request_ids: Iterable[str]) -> list[Feedback]:
        """All judgements on these requests, oldest first."""
        query = select(feedback.c.body).where(feedback.c.request_id.in_(list(request_ids)))
        with self._engine.connect() as db:
            bodies = db.execute(query.order_by(feedback.c.at)).scalars().all()
        return [Feedback.model_validate_json(body) for body in bodies]

    # ends ---------------------------------------------------------------------------------------------

    def prune(self, before: float) -> int:
        """Forget requests served, and judgements given, before this time; returns how many rows went."""
        with self._engine.begin() as db:
            gone = db.execute(delete(feedback).where(feedback.c.at < before)).rowcount
            return gone + db.execute(delete(served).where(served.c.at < before)).rowcount

    def erase(self, request_id: str | None = None, subject: str | None = None) -> int:
        """Forget one request, or all of a subject, and what was said of it; returns the judgements erased."""
        chosen = []
        if request_id is not None:
            chosen.append(served.c.request_id == request_id)
        if subject is not None:
            chosen.append(served.c.subjects.contains(subject, autoescape=True))
        with self._engine.begin() as db:
            ids = set(db.execute(select(served.c.request_id).where(or_(*chosen))).scalars())
            if request_id is not None:
                ids.add(request_id)
            gone = 0
            for at in range(0, len(ids), _BATCH):
                some = sorted(ids)[at : at + _BATCH]
                gone += db.execute(delete(feedback).where(feedback.c.request_id.in_(some))).rowcount
                db.execute(delete(served).where(served.c.request_id.in_(some)))
            return gone
