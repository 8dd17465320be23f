"""Messages to webhooks: written in the transaction of the tick they tell of, delivered later, kept after.

A message leaves the queue only when it was delivered or given up, so a kill in between sends it again. Knows
nothing about HTTP or about what a message says.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Engine, func, insert, select, update

from contracts.config import Record
from contracts.hooks import HookSpec
from serve.state.tables import outbox


class Notice(Record):
    """One message to one hook; `event_id` is the same however often it is sent."""

    event_id: str
    rollout_id: str
    hook_index: int
    hook: HookSpec
    event: str
    body: str
    """JSON, as it is signed and sent."""
    at: float


class Message(Record):
    """A notice in the queue, or what became of it."""

    id: int
    event_id: str
    rollout_id: str
    event: str
    hook: HookSpec
    body: str
    at: float
    tries: int
    next_at: float
    error: str | None
    done_at: float | None
    dead: bool


class OutboxState:
    """Typed access to the outbox of one state store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def heads(self) -> list[Message]:
        """The oldest waiting message of every stream, due or not: nothing overtakes it."""
        first = select(func.min(outbox.c.id)).where(outbox.c.done_at.is_(None)).group_by(outbox.c.stream)
        query = select(outbox).where(outbox.c.id.in_(first)).order_by(outbox.c.next_at, outbox.c.id)
        with self._engine.connect() as db:
            return [_message(dict(row)) for row in db.execute(query).mappings()]

    def of(self, rollout_id: str) -> list[Message]:
        """All messages of a rollout in order, with what became of them."""
        query = select(outbox).where(outbox.c.rollout_id == rollout_id).order_by(outbox.c.id)
        with self._engine.connect() as db:
            return [_message(dict(row)) for row in db.execute(query).mappings()]

    def delivered(self, message: Message, now: float) -> None:
        """It was taken."""
        self._set(message, tries=message.tries + 1, error=None, done_at=now)

    def failed(self, message: Message, error: str, retry_at: float) -> None:
        """It was not taken; try again at `retry_at`."""
        self._set(message, tries=message.tries + 1, error=error, next_at=retry_at)

    def given_up(self, message: Message, error: str, now: float) -> None:
        """It was not taken, and will not be tried again: a dead letter."""
        self._set(message, tries=message.tries + 1, error=error, done_at=now, dead=1)

    def _set(self, message: Message, **values: object) -> None:
        with self._engine.begin() as db:
            db.execute(update(outbox).where(outbox.c.id == message.id).values(**values))


def write_notices(db: Connection, notices: Sequence[Notice]) -> None:
    """Queue messages inside a transaction of the caller's."""
    if notices:
        db.execute(insert(outbox), [_row(n) for n in notices])


def _row(notice: Notice) -> dict[str, object]:
    return {
        "event_id": notice.event_id,
        "rollout_id": notice.rollout_id,
        "stream": f"{notice.rollout_id}/{notice.hook_index}",
        "event": notice.event,
        "hook": notice.hook.model_dump_json(),
        "body": notice.body,
        "at": notice.at,
        "tries": 0,
        "next_at": notice.at,
        "dead": 0,
    }


def _message(row: dict[str, object]) -> Message:
    row.pop("stream")
    hook = HookSpec.model_validate_json(str(row.pop("hook")))
    return Message.model_validate({**row, "hook": hook})
