"""Backup and restore of the state store, from and into SQLite and PostgreSQL.

A backup is one moment of the store, taken while everything runs. A restore is one transaction: the store
before, or the backup, nothing between. Knows tables and rows, nothing about what they mean; what the file
looks like is archive.py's.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    Table,
    column,
    create_engine,
    delete,
    func,
    insert,
    inspect,
    literal_column,
    select,
    table,
)
from sqlalchemy.exc import SQLAlchemyError

from contracts.errors import ConflictError, DataError, StateError
from serve.state.archive import Archive, Manifest, local_copy, write_archive, written_to
from serve.state.migrations import check_version, rows_of
from serve.state.tables import bring_up, leases, look_at_state, metadata, open_state, routers, write_alone

LIVE_TABLES = frozenset(("endpoints", "routers", "leases"))
"""Who runs at the moment. Restored rows of these would name processes that are gone."""

NOT_IN_IT = {
    "request log": "the files in log.dir and log.upload: copy the bucket, or rely on its versions",
    "artifacts": "checkpoint folders, named by the registry: copy the bucket or volume they lie in",
    "registry": "MLflow's database and files (registry_uri): back it up with that database's own tools",
    "flywheel": "flywheel.db in the flywheel's folder: sqlite3 flywheel.db '.backup FILE'",
    "configuration": "YAML files and secrets of the environment: version control, and a vault",
}
"""What else an installation consists of, and how to keep it."""

_FRESH_S = 15.0
"""A router that was seen within these seconds runs."""
_ROWS = 500


def backup(url: str, place: str) -> Manifest:
    """Write all rows of a store, as of one moment, to a new file or fsspec URL.

    Raises:
        StateError: the store cannot be read, is empty of tables, or of a newer release.
        ConflictError: there is something at `place`.
    """
    engine, found = look_at_state(url)
    if found is None:
        raise StateError("the state store has no tables yet; there is nothing to back up.")
    check_version(found)
    facts = {
        "schema_version": found,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "release": version("stillhouse"),
        "database": engine.dialect.name,
        "left_out": sorted(LIVE_TABLES),
        "not_in_it": NOT_IN_IT,
    }
    try:
        with written_to(place) as file, _moment(engine) as db:
            return write_archive(file, _tables(db), facts)
    except SQLAlchemyError as err:
        raise StateError(f"the state store cannot be read: {err}.") from err


@contextmanager
def _moment(engine: Engine) -> Iterator[Connection]:
    """A connection that sees one moment of the store, however long it reads; nobody waits for it."""
    if engine.dialect.name != "sqlite":
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with engine.connect().execution_options(**options) as db:
            yield db
        return
    with tempfile.TemporaryDirectory(prefix="stillhouse-backup-") as folder:
        copy = Path(folder) / "state.db"
        with sqlite3.connect(copy) as into:
            raw = engine.raw_connection()
            raw.driver_connection.backup(into)  # type: ignore[union-attr]
            raw.close()
        into.close()
        copied = create_engine(f"sqlite:///{copy}")
        with copied.connect() as db:
            yield db
        copied.dispose()


def _tables(db: Connection) -> Iterator[tuple[str, list[str], Iterable[Any]]]:
    looked = inspect(db)
    there = set(looked.get_table_names())
    for name in sorted(set(metadata.tables) & there - LIVE_TABLES - {"schema_version"}):
        columns = [str(c["name"]) for c in looked.get_columns(name)]  # of the store's schema, maybe older
        query: Any = select(*map(column, columns)).select_from(table(name)).order_by(*_key(name))
        rows = db.execution_options(yield_per=_ROWS).execute(query)
        yield name, columns, rows


def _key(name: str) -> list[Any]:
    return [column(c.name) for c in metadata.tables[name].primary_key.columns]


def restore(url: str, place: str, *, force: bool = False) -> Manifest:
    """Put a backup into a store: an empty one, or with `force` in place of what is there.

    Args:
        url: the store; it is created, and tables of an older schema are brought up to date.

    Raises:
        DataError: the backup is damaged or none; nothing was written.
        ConflictError: the store has rows, or something runs on it.
        StateError: the backup is of a newer release, or the store cannot be written.
    """
    with local_copy(place) as file:
        archive = Archive(file, place)
        try:
            check_version(archive.manifest.schema_version)
            _check_columns(archive.manifest)
            engine = open_state(url)
            with write_alone(engine) as db:
                bring_up(db)
                _check_idle(db)
                _make_room(db, force)
                for name in archive.manifest.parts:
                    _fill(db, metadata.tables[name], archive)
        except SQLAlchemyError as err:
            raise StateError(f"the backup was not restored, the store is as before: {err}.") from err
        finally:
            archive.close()
    return archive.manifest


def _check_columns(manifest: Manifest) -> None:
    for name, part in manifest.parts.items():
        if name not in metadata.tables or name in LIVE_TABLES:
            raise DataError(f"the backup has a table {name!r} that this release does not know.")
        if strange := sorted(set(part.columns) - set(metadata.tables[name].c.keys())):
            raise DataError(f"the backup's table {name!r} has a column {strange[0]!r} that is not known.")


def _check_idle(db: Connection) -> None:
    """Running routers would keep splits with higher versions, and a controller its own status."""
    now = time.time()
    seen = db.execute(select(routers.c.replica).where(routers.c.seen_at >= now - _FRESH_S)).scalars().first()
    if seen is not None:
        raise ConflictError(
            f"router {seen!r} runs on this store. End routers and controller first ('stillhouse down'), "
            f"wait {_FRESH_S:.0f} s after the last of them, restore, start them again."
        )
    holder = db.execute(select(leases.c.holder).where(leases.c.expires_at >= now)).scalars().first()
    if holder is not None:
        raise ConflictError(
            f"{holder!r} holds a lease on this store: end the controller first, then restore."
        )


def _make_room(db: Connection, force: bool) -> None:
    for name in sorted(set(metadata.tables) - {"schema_version"}):
        one = metadata.tables[name]
        if force or name in LIVE_TABLES:
            db.execute(delete(one))
        elif db.execute(select(literal_column("1")).select_from(one).limit(1)).first() is not None:
            raise ConflictError(
                f"the store has rows (in {name!r}); give an empty one, or --force to replace them all."
            )


def _fill(db: Connection, into: Table, archive: Archive) -> None:
    rows = iter(archive.rows(into.name))
    while batch := list(islice(rows, _ROWS)):
        db.execute(insert(into), rows_of(archive.manifest.schema_version, into.name, batch))
    if db.dialect.name == "postgresql" and "id" in into.c and into.c.id.autoincrement is True:
        # The rows brought their ids: the next one must come after them.
        last = select(func.coalesce(func.max(into.c.id), 1), func.count() > 0).select_from(into)
        highest, any_rows = db.execute(last).one()
        sequence = func.pg_get_serial_sequence(into.name, "id")
        db.execute(select(func.setval(sequence, highest, any_rows)))
