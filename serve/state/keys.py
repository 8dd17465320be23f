"""API keys and what they used: keys by id, and counts by key, router process and minute.

The secret of a key exists here for one moment, in `new_key`; what is stored is its digest. Every method is
one short transaction. Knows nothing about HTTP or about limits.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, Select, and_, delete, func, insert, literal_column, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from contracts.config import parse_config
from contracts.errors import ConflictError, NotFoundError
from contracts.keys import ApiKey, KeyUsage
from serve.state.tables import api_keys, key_usage

PREFIX = "sk-sh-"
_SECRET_BYTES = 32
_FOLDED = ""
"""The `replica` of rows that hold a whole hour of all router processes; real ones are never empty."""


class MinuteUsage(NamedTuple):
    """What one router process counted for one key in one minute, so far."""

    key_id: str
    minute: int
    """Unix minute: seconds // 60."""
    requests: int
    prompt_tokens: int
    completion_tokens: int


class Spent(NamedTuple):
    """Requests and tokens of one minute."""

    requests: int
    tokens: int


def digest_of(secret: bytes) -> str:
    """What is stored of a secret."""
    return hashlib.sha256(secret).hexdigest()


def new_key(name: str, **fields: Any) -> tuple[ApiKey, str]:
    """A key that is not stored yet, and its secret of 256 random bits. Raises: ConfigError."""
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    made = {
        "id": f"key-{secrets.token_hex(6)}",
        "name": name,
        "digest": digest_of(secret.encode()),
        "created_at": time.time(),
        **fields,
    }
    return parse_config(made, ApiKey, "the key"), secret


class KeyState:
    """Typed access to the key tables of one state store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parsed: dict[str, tuple[str, ApiKey]] = {}
        """Key id → (stored body, what it says): a router reads all keys five times a second."""

    # keys ---------------------------------------------------------------------------------------

    def keys(self) -> dict[str, ApiKey]:
        """All keys by id, the oldest first."""
        with self._engine.connect() as db:
            rows = db.execute(select(api_keys.c.id, api_keys.c.body)).all()
        before, parsed = self._parsed, {}
        for key_id, body in rows:
            known = before.get(key_id)
            parsed[key_id] = known if known and known[0] == body else (body, ApiKey.model_validate_json(body))
        self._parsed = parsed
        found = sorted((key for _, key in parsed.values()), key=lambda k: (k.created_at, k.id))
        return {key.id: key for key in found}

    def get_key(self, key_id: str) -> ApiKey:
        """One key. Raises: NotFoundError."""
        return ApiKey.model_validate_json(self._body(key_id))

    def find(self, digest: str) -> ApiKey | None:
        """The key whose secret has this digest."""
        with self._engine.connect() as db:
            body = db.execute(select(api_keys.c.body).where(api_keys.c.digest == digest)).scalar()
        return None if body is None else ApiKey.model_validate_json(body)

    def create_key(self, key: ApiKey) -> None:
        """Store a new key. Raises: ConflictError when its id or secret is taken."""
        try:
            with self._engine.begin() as db:
                db.execute(insert(api_keys).values(id=key.id, digest=key.digest, body=key.model_dump_json()))
        except IntegrityError as err:
            raise ConflictError(f"a key with the id {key.id!r} or the same secret exists already.") from err

    def change_key(self, key_id: str, **changes: Any) -> ApiKey:
        """Change some fields; of two changes at once neither undoes the other.

        Raises: NotFoundError, ConfigError naming every bad field.
        """
        while True:
            before = self._body(key_id)
            fields = {**ApiKey.model_validate_json(before).model_dump(), **changes}
            after = parse_config(fields, ApiKey, f"key {key_id}")
            where = and_(api_keys.c.id == key_id, api_keys.c.body == before)
            with self._engine.begin() as db:
                if db.execute(update(api_keys).where(where).values(body=after.model_dump_json())).rowcount:
                    return after

    def delete_key(self, key_id: str) -> None:
        """Forget a key; what it used stays. Raises: NotFoundError."""
        with self._engine.begin() as db:
            if not db.execute(delete(api_keys).where(api_keys.c.id == key_id)).rowcount:
                raise _unknown(key_id)

    # usage --------------------------------------------------------------------------------------

    def put_usage(self, replica: str, counted: Iterable[MinuteUsage]) -> None:
        """Store a router process's counts; they are absolute, so a repeated write changes nothing."""
        rows = [{"replica": replica, **one._asdict()} for one in counted]
        if rows:
            with self._engine.begin() as db:
                _upsert(db, rows, add=False)

    def spent_by_others(self, replica: str, since_minute: int) -> dict[str, dict[int, Spent]]:
        """Key id → minute → what all other router processes counted, from this minute on."""
        rows = key_usage.c
        tokens = rows.prompt_tokens + rows.completion_tokens
        query = (
            select(rows.key_id, rows.minute, func.sum(rows.requests), func.sum(tokens))
            .where(rows.minute >= since_minute, rows.replica.notin_((replica, _FOLDED)))
            .group_by(rows.key_id, rows.minute)
        )
        found: dict[str, dict[int, Spent]] = {}
        with self._engine.connect() as db:
            for key_id, minute, requests, spent in db.execute(query):
                found.setdefault(key_id, {})[minute] = Spent(int(requests), int(spent))
        return found

    def usage(
        self, key_id: str | None = None, since_hour: int = 0, until_hour: int = 2**40
    ) -> list[KeyUsage]:
        """What keys used by hour, over all routers, from `since_hour` up to and without `until_hour`."""
        query = _by_hour().where(key_usage.c.minute >= since_hour * 60, key_usage.c.minute < until_hour * 60)
        if key_id is not None:
            query = query.where(key_usage.c.key_id == key_id)
        with self._engine.connect() as db:
            rows = db.execute(query).all()
        return [
            KeyUsage(
                key_id=key, hour=int(hour), requests=int(n), prompt_tokens=int(p), completion_tokens=int(c)
            )
            for key, hour, n, p, c in rows
        ]

    def fold_usage(self, before_hour: int) -> int:
        """Make one row a key and hour of all that is older; returns how many rows went.

        Several routers may do it at once: a row is deleted, and thereby counted, by exactly one of them.
        """
        old = and_(key_usage.c.minute < before_hour * 60, key_usage.c.replica != _FOLDED)
        sums: dict[tuple[str, int], list[int]] = {}
        with self._engine.begin() as db:
            gone = db.execute(delete(key_usage).where(old).returning(key_usage)).all()
            for row in gone:
                total = sums.setdefault((row.key_id, row.minute // 60), [0, 0, 0])
                for at, count in enumerate((row.requests, row.prompt_tokens, row.completion_tokens)):
                    total[at] += count
            rows = [
                {"replica": _FOLDED, **MinuteUsage(key_id, hour * 60, *total)._asdict()}
                for (key_id, hour), total in sums.items()
            ]
            if rows:
                _upsert(db, rows, add=True)
        return len(gone)

    def _body(self, key_id: str) -> str:
        with self._engine.connect() as db:
            body = db.execute(select(api_keys.c.body).where(api_keys.c.id == key_id)).scalar()
        if body is None:
            raise _unknown(key_id)
        return str(body)


def _unknown(key_id: str) -> NotFoundError:
    return NotFoundError(f"there is no key {key_id!r}; 'stillhouse keys list' shows all.")


def _by_hour() -> Select[Any]:
    c = key_usage.c
    hour = c.minute // literal_column("60")  # a parameter here and in GROUP BY is not the same to PostgreSQL
    sums = (func.sum(c.requests), func.sum(c.prompt_tokens), func.sum(c.completion_tokens))
    return select(c.key_id, hour, *sums).group_by(c.key_id, hour).order_by(hour, c.key_id)


def _upsert(db: Connection, rows: list[dict[str, Any]], *, add: bool) -> None:
    """Insert rows; where one exists its counts are added to, or raised: counts never fall, so that an
    older write that arrives late changes nothing."""
    on_postgresql = db.dialect.name == "postgresql"
    dialect = postgresql if on_postgresql else sqlite
    larger = func.greatest if on_postgresql else func.max
    statement = dialect.insert(key_usage)
    counts = ("requests", "prompt_tokens", "completion_tokens")
    new = {
        name: key_usage.c[name] + statement.excluded[name]
        if add
        else larger(key_usage.c[name], statement.excluded[name])
        for name in counts
    }
    key = ["key_id", "replica", "minute"]
    db.execute(statement.on_conflict_do_update(index_elements=key, set_=new), rows)
