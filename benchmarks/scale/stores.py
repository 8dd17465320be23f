"""The two state stores that are measured: SQLite on this machine's disk, a PostgreSQL server of its own."""

from __future__ import annotations

import importlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, text

STORES = ("sqlite", "postgresql")


@contextmanager
def stores(kind: str) -> Iterator[Callable[[], str]]:
    """Gives URLs of empty state stores; they go when this ends."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix="sh-scale-") as folder:
            numbers = itertools.count()
            yield lambda: f"sqlite:///{Path(folder) / f'state-{next(numbers)}.db'}"
        return
    server = importlib.import_module("tests.integration.postgres").Postgres()
    try:
        yield server.new_database
    finally:
        server.close()


def ledger_bytes(engine: Engine) -> int:
    """Bytes of the ledger with its indexes (SQLite: of the whole file)."""
    with engine.connect() as db:
        if engine.dialect.name == "sqlite":
            pages = db.execute(text("PRAGMA page_count")).scalar_one()
            return int(pages) * int(db.execute(text("PRAGMA page_size")).scalar_one())
        return int(db.execute(text("SELECT pg_total_relation_size('ledger')")).scalar_one())
