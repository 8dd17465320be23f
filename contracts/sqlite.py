"""Opening an SQLite file that other processes open at the same moment."""

from __future__ import annotations

import sqlite3
import time
from typing import Protocol

_PAUSE_S = 0.02


class Executes(Protocol):
    """A connection or a cursor of a DB-API driver."""

    def execute(self, sql: str, /) -> object:
        """Run one statement."""
        ...


def use_wal(db: Executes, wait_s: float) -> None:
    """Put the file into WAL mode: readers go on while one writes.

    SQLite refuses this one statement at once when another process holds the file (the busy timeout does
    not cover the change of the journal), so it is asked again. WAL mode is the file's and stays.

    Args:
        db: connection or cursor, outside a transaction.
        wait_s: seconds until another process' lock counts as stuck.

    Raises:
        sqlite3.OperationalError: still locked after `wait_s`, or the file cannot be written.
    """
    give_up = time.monotonic() + wait_s
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as err:
            if "locked" not in str(err) or time.monotonic() >= give_up:
                raise
        time.sleep(_PAUSE_S)
