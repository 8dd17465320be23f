"""Schema and engine of the state store: SQLite by default, PostgreSQL by URL.

Everything the data plane and the control plane share goes through these tables. Knows nothing about
what the rows mean; see traffic.py and rollouts.py beside it, and migrations.py for older schemas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from contracts.errors import StateError
from contracts.sqlite import use_wal
from serve.state.migrations import SCHEMA_VERSION, Step, check_version, migrate, stored_version

_SCHEMA_LOCK = 0x57111_405E
"""PostgreSQL's advisory lock while the schema is created or upgraded; any number of ours does."""

_LOCK_S = 30
"""Seconds an upgrade of the schema waits for PostgreSQL's lock of a table that others use."""

metadata = MetaData()

_BigKey = BigInteger().with_variant(Integer, "sqlite")

schema_table = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

splits = Table(
    "splits",
    metadata,
    Column("route", String(128), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("body", Text, nullable=False),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("app", String(160), primary_key=True),
    Column("replica", String(160), primary_key=True),
    Column("url", String(256), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("seen_at", Float, nullable=False),
)

routers = Table(
    "routers",
    metadata,
    Column("replica", String(160), primary_key=True),
    Column("body", Text, nullable=False),
    Column("seen_at", Float, nullable=False),
)

ledger = Table(
    "ledger",
    metadata,
    Column("replica", String(160), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("route", String(128), nullable=False),
    Column("rollout_id", String(128)),
    Column("at", Float, nullable=False),
    Column("body", Text, nullable=False),
    Index("ledger_by_route", "route", "replica", "seq"),
    Index("ledger_by_time", "at"),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("route", String(128), nullable=False, index=True),
    Column("active_route", String(128), unique=True),
    Column("created_at", Float, nullable=False),
    Column("spec", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("status_version", Integer, nullable=False),
)
"""`active_route` is the rollout's place (the route or, of an A/B/n test, one slot of it) while it is active
and NULL after: the database itself guarantees one active rollout a place."""

audit = Table(
    "audit",
    metadata,
    Column("id", _BigKey, primary_key=True, autoincrement=True),
    Column("rollout_id", String(128), nullable=False, index=True),
    Column("tick", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("body", Text, nullable=False),
    UniqueConstraint("rollout_id", "tick", "kind", name="one_entry_a_tick"),
)

commands = Table(
    "commands",
    metadata,
    Column("id", _BigKey, primary_key=True, autoincrement=True),
    Column("rollout_id", String(128), nullable=False, index=True),
    Column("verb", String(16), nullable=False),
    Column("by", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("done_at", Float),
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("digest", String(128), primary_key=True),
    Column("rollout_id", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", _BigKey, primary_key=True, autoincrement=True),
    Column("event_id", String(200), nullable=False, unique=True),
    Column("rollout_id", String(128), nullable=False, index=True),
    Column("stream", String(160), nullable=False),
    Column("event", String(32), nullable=False),
    Column("hook", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("next_at", Float, nullable=False),
    Column("error", Text),
    Column("done_at", Float),
    Column("dead", Integer, nullable=False),
    Index("outbox_waiting", "done_at", "stream", "id"),
)
"""Messages to webhooks, written with the tick they tell of. Within a stream (one rollout, one hook) they are
delivered in the order of `id`; one that was given up is `dead` and makes way for the next."""

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(160), nullable=False),
    Column("expires_at", Float, nullable=False),
)

route_settings = Table(
    "route_settings",
    metadata,
    Column("route", String(128), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("body", Text, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("body", Text, nullable=False),
)

key_usage = Table(
    "key_usage",
    metadata,
    Column("key_id", String(128), primary_key=True),
    Column("replica", String(160), primary_key=True),
    Column("minute", BigInteger, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Index("key_usage_by_minute", "minute"),
)
"""Absolute counts of one router process in one minute, so writing them again changes nothing."""

served = Table(
    "served",
    metadata,
    Column("request_id", String(128), primary_key=True),
    Column("route", String(128), nullable=False),
    Column("arm", String(16), nullable=False),
    Column("reason", String(16), nullable=False),
    Column("rollout_id", String(128)),
    Column("split_version", Integer, nullable=False),
    Column("log_mode", String(16), nullable=False),
    Column("subjects", Text, nullable=False),
    Column("at", Float, nullable=False, index=True),
)
"""Requests that feedback may refer to, for as long as late feedback is taken. `log_mode` says whether the
texts of that feedback may be kept, `subjects` (hashes, separated by spaces) whose request it was."""

judge_checks = Table(
    "judge_checks",
    metadata,
    Column("id", _BigKey, primary_key=True, autoincrement=True),
    Column("grader", String(64), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("body", Text, nullable=False),
)
"""How judges did on answers that people had judged; `grader` is the judge's name with its version."""

feedback = Table(
    "feedback",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("request_id", String(128), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("body", Text, nullable=False),
)

_BUSY_S = 10
"""Seconds to wait for another process' lock on an SQLite file."""

_CONNECT_S = 5
"""Seconds until a database host that does not answer counts as away (psycopg's own: over two minutes)."""


def open_state(url: str) -> Engine:
    """Open the state store; create it, or bring its schema up to date, if need be.

    Args:
        url: SQLAlchemy URL, e.g. ``sqlite:////var/lib/stillhouse/state.db`` or ``postgresql+psycopg://…``.

    Raises:
        StateError: unreachable, or its schema is of a newer release.
    """
    name = shown(url)
    try:
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        engine = _engine(url)
        with write_alone(engine) as db:
            bring_up(db)
    except (SQLAlchemyError, ImportError, OSError) as err:
        raise StateError(
            f"state store {name!r} cannot be opened: {err}. Check the URL and that it is writable."
        ) from err
    return engine


def look_at_state(url: str) -> tuple[Engine, int | None]:
    """Connect without creating or changing anything; with the schema version found, None for no tables.

    Raises:
        StateError: unreachable, or there is no such file.
    """
    name = shown(url)
    try:
        file = url.removeprefix("sqlite:///")
        if file != url and not Path(file).is_file():
            raise StateError(f"there is no state store at {name!r}.")
        engine = _engine(url)
        with engine.connect() as db:
            return engine, stored_version(db)
    except (SQLAlchemyError, ImportError, OSError) as err:
        raise StateError(f"state store {name!r} cannot be read: {err}. Check the URL.") from err


def shown(url: str) -> str:
    """A store's URL without its password. Raises: StateError when it is none."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:  # it quotes the URL, and may have a password in the wrong place
        raise StateError(
            "the state store's URL is no database URL; sqlite:////folder/state.db or "
            "postgresql+psycopg://user:password@host/database are."
        ) from None


@contextmanager
def write_alone(engine: Engine) -> Iterator[Connection]:
    """A transaction that only one process has at a time: who creates or upgrades, looks before it does."""
    with engine.begin() as db:
        if engine.dialect.name == "sqlite":
            db.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            db.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
            db.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_S}s'")
        yield db


def bring_up(db: Connection) -> list[Step]:
    """Create what is missing and upgrade what is older, within `write_alone`; the steps that were needed.

    Raises: StateError when the schema is of a newer release, or older than can be upgraded.
    """
    found = stored_version(db)
    if found is not None:
        check_version(found)
    metadata.create_all(db, checkfirst=True)
    if found is None:
        db.execute(insert(schema_table).values(version=SCHEMA_VERSION))
        return []
    return migrate(db, metadata, found)


def _engine(url: str) -> Engine:
    remote = {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_S}}
    engine = create_engine(url, **({} if url.startswith("sqlite") else remote))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _sqlite_pragmas)
    return engine


def _sqlite_pragmas(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    # WAL lets routers read while the controller writes; NORMAL survives a killed process (not a power cut).
    # Pages are the kernel's to cache: each of a router's connections would slowly fill 2 MiB of its own.
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_S * 1000}")
    use_wal(cursor, _BUSY_S)
    for pragma in ("synchronous=NORMAL", "foreign_keys=ON", "cache_size=-512"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
