"""State stores as older releases left them: dumps made by those releases' own code, and how to load one.

`state_v2` is commit f1612ee's: one ramping rollout with its audit trail and ledger, a key with usage, route
settings, a served request with feedback, a command that waits. `state_v1` is commit 9146941's.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import psycopg

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "state"
RELEASED_S = 1_000_014.0
"""The world's clock when the dump of version 2 was made."""


def load_old(url: str, version: int) -> None:
    """Fill an empty database with the store of an older schema."""
    if url.startswith("sqlite:///"):
        file = Path(url.removeprefix("sqlite:///"))
        file.parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(file) as lite:
            lite.executescript((FIXTURES / f"state_v{version}.sqlite.sql").read_text())
        lite.close()
        return
    with psycopg.connect(url.replace("postgresql+psycopg", "postgresql"), autocommit=True) as db:
        db.execute((FIXTURES / f"state_v{version}.postgresql.sql").read_text())  # type: ignore[arg-type]
