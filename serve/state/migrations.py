"""Older schemas of the state store, brought to today's: ordered, forward only, in one transaction.

A step adds what was added to the tables, never renames, changes or drops: processes of the release before
go on writing beside the new ones while an upgrade rolls through. New tables need no step, opening a store
creates those that are missing. Knows nothing about what the rows mean, nor who opens the store.

To change the schema: change tables.py, raise SCHEMA_VERSION there, append a step here whose columns have a
default that is right for rows of the release before, and for rows it still writes; then keep a dump of the
older schema beside those in tests/fixtures/state/.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import Column, Connection, MetaData, Table, inspect, select, update
from sqlalchemy.schema import CreateColumn

from contracts.errors import StateError

SCHEMA_VERSION = 3
OLDEST_VERSION = 2
"""Stores of schema 1 existed for half a day of development; their rollouts count grades in another form."""

_SCHEMA_TABLE = "schema_version"


class AddedColumn(NamedTuple):
    """A column that a step adds, and what rows from before it hold."""

    table: str
    column: str
    default: str


class Step(NamedTuple):
    """From the version before `to` to `to`."""

    to: int
    columns: tuple[AddedColumn, ...]
    what: str
    """For people who ask what an upgrade would do."""


STEPS: tuple[Step, ...] = (
    # "" is no reason of an assignment: a request that was served before it was noted is no evidence.
    Step(3, (AddedColumn("served", "reason", ""),), "why a served request got its arm; checks of judges"),
)


def steps_from(version: int) -> list[Step]:
    """The steps from a version to today's, in order."""
    return [step for step in STEPS if step.to > version]


def check_version(version: int) -> None:
    """Refuse a schema that this code cannot bring up to date. Raises: StateError saying what to do."""
    if version > SCHEMA_VERSION:
        raise StateError(
            f"the state store has schema version {version}, written by a newer release; this one knows "
            f"{SCHEMA_VERSION}. Run the newer release, or restore a backup made before the upgrade."
        )
    if version < OLDEST_VERSION:
        raise StateError(
            f"the state store has schema version {version}, from before any release; this one upgrades "
            f"{OLDEST_VERSION} and later. Start with an empty store: set another state_url."
        )


def stored_version(db: Connection) -> int | None:
    """The version in a store; None for one without tables. Writes nothing."""
    if not inspect(db).has_table(_SCHEMA_TABLE):
        return None
    return db.execute(select(Column("version")).select_from(Table(_SCHEMA_TABLE, MetaData()))).scalar()


def migrate(db: Connection, metadata: MetaData, version: int) -> list[Step]:
    """Run the steps from a version; the caller holds the schema lock and the transaction.

    Args:
        metadata: today's tables, already created where they were missing.

    Raises:
        StateError: the version is newer than this code, or older than it can upgrade.
    """
    check_version(version)
    steps = steps_from(version)
    for step in steps:
        for added in step.columns:
            _add(db, metadata.tables[added.table], added)
    if steps:
        db.execute(update(metadata.tables[_SCHEMA_TABLE]).values(version=steps[-1].to))
    return steps


def rows_of(version: int, table: str, rows: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """Rows of an older schema (in a backup) as today's table holds them after the steps."""
    defaults = {a.column: a.default for s in steps_from(version) for a in s.columns if a.table == table}
    return [{**defaults, **row} for row in rows]


def _add(db: Connection, table: Table, added: AddedColumn) -> None:
    if any(column["name"] == added.column for column in inspect(db).get_columns(table.name)):
        return  # a table that was missing, and is created as it is today
    column = table.c[added.column]
    bare = Column(column.name, column.type, nullable=column.nullable, server_default=added.default)
    Table(table.name, MetaData(), bare)
    definition = CreateColumn(bare).compile(dialect=db.dialect)
    db.exec_driver_sql(
        f"ALTER TABLE {db.dialect.identifier_preparer.format_table(table)} ADD COLUMN {definition}"
    )
