"""What the flywheel knows, in one SQLite file: a transition is a transaction, so any line may be the last.

The daemon writes runs and what it has read; commands only leave requests. That a route has one active run is
a unique index, not a habit. Knows nothing about logs, processes or decisions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contracts.config import Record
from contracts.errors import ConflictError, NotFoundError, StateError
from contracts.sqlite import use_wal
from distill_jobs.flywheel.admit import ACTIVE, Spent, State
from distill_jobs.flywheel.drift import Look

FILE = "flywheel.db"
VERSION = 1
DAY_S = 86_400.0
_HOUR_S = 3_600.0
_BUSY_S = 30.0

_ACTIVE_SQL = ", ".join(f"'{s.value}'" for s in ACTIVE)
_SCHEMA = f"""
CREATE TABLE routes (
  route TEXT PRIMARY KEY, watching_since REAL NOT NULL, paused_by TEXT, requested_by TEXT,
  failures INTEGER NOT NULL DEFAULT 0, last_queued_at REAL, last_ended_at REAL, watch TEXT NOT NULL,
  said TEXT NOT NULL DEFAULT ''
);
CREATE TABLE files (route TEXT, file TEXT, bytes INTEGER NOT NULL, PRIMARY KEY (route, file)) WITHOUT ROWID;
CREATE TABLE units (
  route TEXT, role TEXT, key INTEGER, seq INTEGER NOT NULL, ts REAL NOT NULL, words BLOB NOT NULL,
  length INTEGER NOT NULL, PRIMARY KEY (route, role, key)
) WITHOUT ROWID;
CREATE TABLE grades (
  route TEXT, digest TEXT, role TEXT, key INTEGER, seq INTEGER NOT NULL, score REAL NOT NULL,
  PRIMARY KEY (route, digest, role, key)
) WITHOUT ROWID;
CREATE TABLE judgements (
  route TEXT, id TEXT, seq INTEGER NOT NULL, bad INTEGER NOT NULL, PRIMARY KEY (route, id)
) WITHOUT ROWID;
CREATE TABLE runs (
  id INTEGER PRIMARY KEY AUTOINCREMENT, route TEXT NOT NULL, name TEXT NOT NULL UNIQUE, trigger TEXT NOT NULL,
  reason TEXT NOT NULL, state TEXT NOT NULL, workdir TEXT NOT NULL, cwd TEXT NOT NULL,
  queued_at REAL NOT NULL, started_at REAL, ended_at REAL, seen_at REAL, stopped_at REAL, term_at REAL,
  becomes TEXT, attempt INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0, pid INTEGER,
  pid_started REAL, mark TEXT, worked_s REAL NOT NULL DEFAULT 0, tokens INTEGER NOT NULL DEFAULT 0,
  exit_code INTEGER, why TEXT NOT NULL DEFAULT '', cancel_by TEXT, ref TEXT, hook TEXT
);
CREATE UNIQUE INDEX one_active_run ON runs (route) WHERE state IN ({_ACTIVE_SQL});
CREATE TABLE usage (run INTEGER, hour INTEGER, seconds REAL NOT NULL, PRIMARY KEY (run, hour)) WITHOUT ROWID;
CREATE TABLE events (
  at REAL NOT NULL, run INTEGER NOT NULL, was TEXT, state TEXT NOT NULL, why TEXT NOT NULL
);
CREATE TABLE daemon (one INTEGER PRIMARY KEY CHECK (one = 1), pid INTEGER, at REAL, pressure TEXT);
PRAGMA user_version = {VERSION};
"""


class Mark(Record):
    """Where a route's log was when something happened: what came later is new."""

    seen: int = 0
    """Rows of the route, of any kind; also the number of the last one."""
    usable: int = 0
    units: int = 0
    """Conversations, each counted again when it comes back after `DriftTrigger.units` others."""
    judged: int = 0
    """Judgements of users; also the number of the last one."""


class Watch(Record):
    """What was read of a route's log, and the looks that were taken since the last run."""

    now: Mark = Mark()
    base: Mark = Mark()
    """At the start of the last run that did not fail."""
    looks: dict[str, int] = {}
    """Kind of a look (requests, grades, feedback) → how many were taken."""
    next_at: dict[str, int] = {}
    """Kind → how many observations the next look wants."""
    fired: tuple[Look, ...] = ()
    """Looks that call for a run; kept until one answers them."""
    last: tuple[Look, ...] = ()
    """The latest look of each kind."""
    caught_up: bool = False
    """The whole log was read; nothing is decided before."""


class Route(Record):
    """A row of `routes`."""

    route: str
    watching_since: float
    paused_by: str | None
    requested_by: str | None
    failures: int
    last_queued_at: float | None
    last_ended_at: float | None
    watch: Watch
    said: str
    """The last decision, in words."""


class Run(Record):
    """A row of `runs`."""

    id: int
    route: str
    name: str
    """`<route>/<date>-<n>`."""
    trigger: str
    reason: str
    state: State
    workdir: str
    cwd: str
    queued_at: float
    started_at: float | None
    ended_at: float | None
    seen_at: float | None
    """Until when its working time was counted."""
    stopped_at: float | None
    term_at: float | None
    becomes: State | None
    """What an ending run will be."""
    attempt: int
    failures: int
    pid: int | None
    pid_started: float | None
    mark: Mark | None
    worked_s: float
    tokens: int
    exit_code: int | None
    why: str
    cancel_by: str | None
    ref: str | None
    hook: str | None
    """pending, running, done, or what went wrong."""


class Store:
    """One connection. Commands and the daemon each have their own."""

    def __init__(self, folder: Path) -> None:
        """Open, or make, the file. Raises: StateError when it is not ours or of another version."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / FILE
        try:
            self._db = sqlite3.connect(self.file, timeout=_BUSY_S, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            use_wal(self._db, _BUSY_S)
            self._db.execute("PRAGMA synchronous = FULL")
            with self.transaction() as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in _SCHEMA.split(";\n"):
                        db.execute(statement)
        except sqlite3.Error as err:
            raise StateError(
                f"{self.file} cannot be used ({err}). Is it the flywheel's, and writable?"
            ) from err
        if version not in (0, VERSION):
            raise StateError(f"{self.file} has schema {version}, this version knows {VERSION}.")

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def query(self, sql: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
        """Rows of a read."""
        return self._db.execute(sql, values).fetchall()

    # Routes.

    def know_routes(self, routes: Iterator[str] | list[str], now: float) -> None:
        """Begin to watch routes that are new."""
        with self.transaction() as db:
            for route in routes:
                db.execute(
                    "INSERT OR IGNORE INTO routes (route, watching_since, watch) VALUES (?, ?, ?)",
                    (route, now, Watch().model_dump_json()),
                )

    def routes(self) -> dict[str, Route]:
        """All routes that were ever watched, by name."""
        rows = self._db.execute("SELECT * FROM routes ORDER BY route").fetchall()
        return {row["route"]: _route(row) for row in rows}

    def route(self, name: str) -> Route:
        """One route. Raises: NotFoundError naming those there are."""
        found = self.routes()
        if name not in found:
            raise NotFoundError(
                f"The flywheel watches no route {name!r}. Routes: {', '.join(found) or 'none'}."
            )
        return found[name]

    def request(self, route: str, by: str) -> None:
        """A person asks for a run. Raises: ConflictError when one is active already."""
        self.route(route)
        active = self.active_of(route)
        if active is not None:
            raise ConflictError(f"Run {active.name} of route {route!r} is {active.state.value} already.")
        self._db.execute("UPDATE routes SET requested_by = ? WHERE route = ?", (by, route))

    def pause(self, routes: list[str], by: str | None) -> None:
        """Pause routes; by None lets them go on."""
        with self.transaction() as db:
            for route in routes:
                self.route(route)
                db.execute("UPDATE routes SET paused_by = ? WHERE route = ?", (by, route))

    def say(self, route: str, text: str) -> None:
        """Keep the last decision for `status`."""
        self._db.execute("UPDATE routes SET said = ? WHERE route = ? AND said <> ?", (text, route, text))

    # Runs.

    def queue(
        self, route: str, trigger: str, reason: str, folder: Path, date: str, cwd: str, now: float
    ) -> Run:
        """A new run of a route in <folder>/<route>/<date>-<n>; a person's request is answered by it.

        Raises: ConflictError when the route has an active run.
        """
        with self.transaction() as db:
            taken = db.execute(
                "SELECT count(*) FROM runs WHERE route = ? AND name LIKE ?", (route, f"{route}/{date}-%")
            ).fetchone()[0]
            name = f"{route}/{date}-{taken + 1}"
            try:
                made = db.execute(
                    "INSERT INTO runs (route, name, trigger, reason, state, workdir, cwd, queued_at)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (route, name, trigger, reason, State.QUEUED, str(folder / name), cwd, now),
                )
            except sqlite3.IntegrityError as err:
                raise ConflictError(f"Route {route!r} has an active run already.") from err
            run_id = int(made.lastrowid or 0)
            db.execute(
                "UPDATE routes SET requested_by = NULL, last_queued_at = ? WHERE route = ?", (now, route)
            )
            self._event(db, run_id, None, State.QUEUED, f"{trigger}: {reason}", now)
        return self.run(run_id)

    def move(self, run: Run, state: State, why: str, now: float, **fields: Any) -> Run:
        """A transition. Raises: ConflictError when the run is no longer in the state that it was read in."""
        with self.transaction() as db:
            self.move_in(db, run, state, why, now, **fields)
        return self.run(run.id)

    def move_in(
        self, db: sqlite3.Connection, run: Run, state: State, why: str, now: float, **fields: Any
    ) -> None:
        """The same as a part of a transaction."""
        values = {"state": state, "why": why, **fields}
        columns = ", ".join(f"{name} = ?" for name in values)
        done = db.execute(
            f"UPDATE runs SET {columns} WHERE id = ? AND state = ?", (*values.values(), run.id, run.state)
        )
        if done.rowcount != 1:
            raise ConflictError(f"Run {run.name} is no longer {run.state.value}.")
        self._event(db, run.id, run.state, state, why, now)

    def note(self, run: Run, **fields: Any) -> Run:
        """Facts about a run that are no transition."""
        columns = ", ".join(f"{name} = ?" for name in fields)
        self._db.execute(f"UPDATE runs SET {columns} WHERE id = ?", (*fields.values(), run.id))
        return self.run(run.id)

    def cancel(self, run: Run, by: str) -> None:
        """A person asks for a run's end. Raises: ConflictError when it has ended."""
        done = self._db.execute(
            f"UPDATE runs SET cancel_by = ? WHERE id = ? AND state IN ({_ACTIVE_SQL})", (by, run.id)
        )
        if done.rowcount != 1:
            raise ConflictError(f"Run {run.name} has ended: it is {self.run(run.id).state.value}.")

    def worked(self, run: Run, now: float, counts: bool) -> None:
        """Count the time since the run was last seen as working time (`counts`), or leave it out."""
        seconds = max(0.0, now - run.seen_at) if counts and run.seen_at is not None else 0.0
        with self.transaction() as db:
            db.execute(
                "UPDATE runs SET seen_at = ?, worked_s = worked_s + ? WHERE id = ?", (now, seconds, run.id)
            )
            if seconds:
                db.execute(
                    "INSERT INTO usage VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET seconds = seconds + ?",
                    (run.id, int(now // _HOUR_S), seconds, seconds),
                )

    def spent(self, now: float) -> Spent:
        """What all runs took in the last 24 hours, to the hour."""
        since = int((now - DAY_S) // _HOUR_S)
        seconds = self._db.execute("SELECT sum(seconds) FROM usage WHERE hour > ?", (since,)).fetchone()[0]
        tokens = self._db.execute(
            "SELECT sum(tokens) FROM runs WHERE coalesce(ended_at, ?) > ?", (now, now - DAY_S)
        ).fetchone()[0]
        return Spent(float(seconds or 0.0), int(tokens or 0))

    def run(self, run_id: int) -> Run:
        """One run by its number. Raises: NotFoundError."""
        row = self._db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone()
        if row is None:
            raise NotFoundError(f"There is no run {run_id}. `stillhouse flywheel status` lists them.")
        return _run(row)

    def find(self, text: str) -> Run:
        """One run by its number or its name. Raises: NotFoundError."""
        if text.isdigit():
            return self.run(int(text))
        row = self._db.execute("SELECT * FROM runs WHERE name = ?", (text,)).fetchone()
        if row is None:
            raise NotFoundError(f"There is no run {text!r}. `stillhouse flywheel status` lists them.")
        return _run(row)

    def active(self) -> list[Run]:
        """Runs that have not ended, in the order in which they were queued."""
        return self._runs(f"WHERE state IN ({_ACTIVE_SQL}) ORDER BY id")

    def active_of(self, route: str) -> Run | None:
        """The active run of a route."""
        return next((run for run in self.active() if run.route == route), None)

    def latest(self, limit: int) -> list[Run]:
        """The last runs, newest first."""
        return self._runs("ORDER BY id DESC LIMIT ?", limit)

    def with_hook(self) -> list[Run]:
        """Published runs whose hook has not ended."""
        return self._runs("WHERE hook IN ('pending', 'running') ORDER BY id")

    def last_tokens(self, route: str) -> int:
        """Teacher tokens of the route's last run that ended."""
        row = self._db.execute(
            "SELECT tokens FROM runs WHERE route = ? AND ended_at IS NOT NULL ORDER BY id DESC", (route,)
        ).fetchone()
        return int(row[0]) if row else 0

    def events(self, run: Run) -> list[tuple[float, str | None, str, str]]:
        """(at, was, state, why) of a run's transitions, oldest first."""
        rows = self._db.execute("SELECT * FROM events WHERE run = ? ORDER BY rowid", (run.id,)).fetchall()
        return [(row["at"], row["was"], row["state"], row["why"]) for row in rows]

    def counts(self) -> dict[tuple[str, str], int]:
        """(route, state) → runs."""
        rows = self._db.execute("SELECT route, state, count(*) FROM runs GROUP BY route, state").fetchall()
        return {(row[0], row[1]): int(row[2]) for row in rows}

    # The daemon.

    def beat(self, pid: int, now: float, pressure: str) -> None:
        """The daemon lives, and this is what it thinks of the machine."""
        self._db.execute("INSERT OR REPLACE INTO daemon VALUES (1, ?, ?, ?)", (pid, now, pressure))

    def last_beat(self) -> tuple[int, float, str] | None:
        """(pid, at, pressure) of the last beat."""
        row = self._db.execute("SELECT pid, at, pressure FROM daemon").fetchone()
        return None if row is None else (int(row[0]), float(row[1]), str(row[2]))

    def _runs(self, rest: str, *values: Any) -> list[Run]:
        return [_run(row) for row in self._db.execute(f"SELECT * FROM runs {rest}", values).fetchall()]

    def _event(
        self, db: sqlite3.Connection, run: int, was: State | None, state: State, why: str, now: float
    ) -> None:
        db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", (now, run, was, state, why))


def _route(row: sqlite3.Row) -> Route:
    return Route(**{**dict(row), "watch": Watch.model_validate_json(row["watch"])})


def _run(row: sqlite3.Row) -> Run:
    mark = row["mark"]
    return Run(**{**dict(row), "mark": None if mark is None else Mark.model_validate_json(mark)})
