"""Read what a route's log has gained, keep counts and samples of it, and look whether it calls for a run.

Reads each byte once: the place in a segment is stored in the transaction that stores what was found there.
Keeps no text, only hashes of words. Knows nothing about runs.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from typing import Any

import orjson
from pydantic import ValidationError

from contracts.feedback import FeedbackRow
from contracts.traffic import Arm, RequestRow, UnitKind
from distill_jobs.collecting.rows import conversation, refusal, request_text
from distill_jobs.collecting.window import Place, closed_name, is_feedback, log_files, read_range
from distill_jobs.flywheel.config import DriftTrigger, FeedbackTrigger, RouteConfig
from distill_jobs.flywheel.drift import (
    Look,
    Unit,
    compare_grades,
    compare_requests,
    features,
    judge_feedback,
    spend,
)
from distill_jobs.flywheel.due import Observation
from distill_jobs.flywheel.store import Mark, Store, Watch

REFERENCE, WINDOW, RECENT, RUN = "reference", "window", "recent", "run"
"""Samples: of the last training window, of everything, the latest, and of the window of a run at work."""
FIRST = "first"
_BAD_SCORE = 0.5
_DAY_S = 86_400.0
_BLOCK = 8 << 20
_DIGESTS = 4
"""Students whose grades are kept at a time."""


class Watcher:
    """One route's log. `collect` is the route's resolved CollectConfig as JSON values."""

    def __init__(
        self, store: Store, route: str, config: RouteConfig, log_dir: Place, collect: dict[str, Any]
    ) -> None:
        self._store = store
        self._route = route
        self._config = config
        self._log_dir = log_dir
        self._collect = collect
        self._drift = config.triggers.drift or DriftTrigger()

    def read(self, limit: int) -> Watch:
        """Take in at most about `limit` bytes of what is new."""
        left = limit
        for name, size in self._news():
            while left > 0 and (taken := self._take(name, size, min(left, _BLOCK))):
                left -= taken
            if left <= 0:
                break
        watch = self._store.route(self._route).watch.model_copy(update={"caught_up": left > 0})
        with self._store.transaction() as db:
            self._keep(db, watch)
        return watch

    def look(self) -> Observation:
        """Take the looks that are due, and say what the log calls for."""
        watch = self._store.route(self._route).watch
        for kind, have, want, growth, test in self._tests(watch):
            count = watch.looks.get(kind, 0) + 1
            if have < max(want, watch.next_at.get(kind, 0)):
                continue
            found = test(count)
            if not found:
                continue
            kinds = {look.kind for look in found}
            watch = watch.model_copy(
                update={
                    "looks": {**watch.looks, kind: count},
                    "next_at": {**watch.next_at, kind: int(have * growth) + 1},
                    "last": (*(look for look in watch.last if look.kind not in kinds), *found),
                    "fired": (*watch.fired, *(look for look in found if look.fired)),
                }
            )
            with self._store.transaction() as db:
                self._keep(db, watch)
        judged, bad = self._judged()
        rows = watch.now.usable - watch.base.usable
        return Observation(rows=rows, looks=watch.fired, judged=judged, bad=bad)

    def pin(self, db: sqlite3.Connection, since: float | None) -> Mark:
        """A run begins: its training window is what was read until now. In the caller's transaction."""
        db.execute("DELETE FROM units WHERE route = ? AND role = ?", (self._route, RUN))
        db.execute(
            "INSERT INTO units SELECT route, ?, key, seq, ts, words, length FROM units"
            " WHERE route = ? AND role = ? AND ts >= ?",
            (RUN, self._route, WINDOW, since or 0.0),
        )
        return self._watch(db).now

    def answered(self, db: sqlite3.Connection, mark: Mark, trained: bool) -> None:
        """A run's end answers what called for it: rows and judgements up to its mark are no news any more.
        Only a published student (`trained`) makes its window the one that drift is measured from. In the
        caller's transaction.
        """
        own = (self._route,)
        if trained:
            db.execute("DELETE FROM units WHERE route = ? AND role = 'reference'", own)
            db.execute("UPDATE units SET role = 'reference' WHERE route = ? AND role = 'run'", own)
            db.execute(
                "DELETE FROM units WHERE route = ? AND role = 'recent' AND seq <= ?", (*own, mark.seen)
            )
        db.execute("DELETE FROM grades WHERE route = ?", own)
        db.execute("DELETE FROM judgements WHERE route = ? AND seq <= ?", (*own, mark.judged))
        before = self._watch(db)
        self._keep(db, Watch(now=before.now, base=mark, caught_up=before.caught_up))

    def _news(self) -> Iterator[tuple[str, int]]:
        """(name, size) of files with bytes that were not read, by closed name; oldest names first."""
        found = log_files(self._log_dir)
        for name in sorted(found, key=closed_name):
            if found[name] > self._place(name):
                yield name, found[name]

    def _place(self, name: str) -> int:
        row = self._store.query(
            "SELECT bytes FROM files WHERE route = ? AND file = ?", (self._route, closed_name(name))
        )
        return int(row[0][0]) if row else 0

    def _take(self, name: str, size: int, limit: int) -> int:
        """Read whole lines of one file in one transaction; returns the bytes taken, 0 at its end."""
        start = self._place(name)
        end, whole = min(size, start + limit), 0
        while not whole:
            data = read_range(self._log_dir, name, start, end)
            whole = data.rfind(b"\n") + 1
            if end == size:
                break
            end = min(size, end + end - start)  # a line longer than that: read on to its end
        if not whole:
            return 0
        with self._store.transaction() as db:
            lines = data[:whole].splitlines()
            if is_feedback(name):
                self._take_judgements(db, lines)
            else:
                self._take_rows(db, lines)
            db.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
                (self._route, closed_name(name), start + whole),
            )
        return whole

    def _take_rows(self, db: sqlite3.Connection, lines: list[bytes]) -> None:
        watch = self._watch(db)
        seen, usable, units = watch.now.seen, watch.now.usable, watch.now.units
        for line in lines:
            row = _request(line)
            if row is None or row.route != self._route or row.arm is Arm.SHADOW:
                continue
            seen += 1
            usable += refusal(row, self._collect) is None
            units += self._take_unit(db, row, seen)
        self._trim(db)
        now = Mark(seen=seen, usable=usable, units=units, judged=watch.now.judged)
        self._keep(db, watch.model_copy(update={"now": now}))

    def _take_unit(self, db: sqlite3.Connection, row: RequestRow, seq: int) -> int:
        """Into the samples; 1 when it is a conversation that is not among the latest."""
        key = unit_key(row)
        score = row.scores.get(self._drift.grader)
        if row.digest is not None and score is not None:
            db.execute(
                "INSERT OR IGNORE INTO grades SELECT ?1, ?2, 'recent', ?3, ?4, ?5 WHERE NOT EXISTS"
                " (SELECT 1 FROM grades WHERE route = ?1 AND digest = ?2 AND role = 'first' AND key = ?3)",
                (self._route, row.digest, key, seq, score),
            )
        messages = conversation(row.request)
        if messages is None:
            return 0
        unit = (key, seq, row.ts, *features(request_text(messages)))
        new = db.execute(
            "INSERT OR IGNORE INTO units VALUES (?, 'recent', ?, ?, ?, ?, ?)", (self._route, *unit)
        )
        db.execute("INSERT OR IGNORE INTO units VALUES (?, 'window', ?, ?, ?, ?, ?)", (self._route, *unit))
        return new.rowcount

    def _trim(self, db: sqlite3.Connection) -> None:
        """Samples back to their sizes: the window's smallest keys, the latest conversations and grades."""
        limit = self._drift.units
        for role, order in ((WINDOW, "key"), (RECENT, "seq DESC")):
            db.execute(
                "DELETE FROM units WHERE route = ?1 AND role = ?2 AND key NOT IN"
                f" (SELECT key FROM units WHERE route = ?1 AND role = ?2 ORDER BY {order} LIMIT ?3)",
                (self._route, role, limit),
            )
        digests = db.execute(
            "SELECT digest, max(seq) AS last FROM grades WHERE route = ? GROUP BY digest ORDER BY last DESC",
            (self._route,),
        ).fetchall()
        for number, row in enumerate(digests):
            self._trim_grades(db, row["digest"], limit if number < _DIGESTS else 0)

    def _trim_grades(self, db: sqlite3.Connection, digest: str, limit: int) -> None:
        """A student's first grades are what its latest are held against."""
        own = (self._route, digest)
        if limit:
            have = db.execute(
                "SELECT count(*) FROM grades WHERE route = ? AND digest = ? AND role = 'first'", own
            ).fetchone()[0]
            db.execute(
                "UPDATE grades SET role = 'first' WHERE route = ?1 AND digest = ?2 AND role = 'recent'"
                " AND key IN (SELECT key FROM grades WHERE route = ?1 AND digest = ?2 AND role = 'recent'"
                "  ORDER BY seq LIMIT ?3)",
                (*own, max(0, limit - have)),
            )
        db.execute(
            "DELETE FROM grades WHERE route = ?1 AND digest = ?2 AND (?3 = 0 OR role = 'recent'"
            " AND key NOT IN (SELECT key FROM grades WHERE route = ?1 AND digest = ?2 AND role = 'recent'"
            "  ORDER BY seq DESC LIMIT ?3))",
            (*own, limit),
        )

    def _take_judgements(self, db: sqlite3.Connection, lines: list[bytes]) -> None:
        watch = self._watch(db)
        seq = watch.now.judged
        for line in lines:
            row = _feedback(line)
            if row is None or row.route != self._route or (row.good is None and row.score is None):
                continue
            seq += 1
            good = row.good if row.good is not None else (row.score or 0.0) >= _BAD_SCORE
            values = (self._route, row.id, seq, not good)
            db.execute("INSERT OR REPLACE INTO judgements VALUES (?, ?, ?, ?)", values)
        now = watch.now.model_copy(update={"judged": seq})
        self._keep(db, watch.model_copy(update={"now": now}))

    def _tests(self, watch: Watch) -> Iterator[tuple[str, int, int, float, Any]]:
        """(kind, observations since the last run, the first look's, growth, the test by its number)."""
        drift, feedback = self._config.triggers.drift, self._config.triggers.feedback
        if drift is not None:
            have = watch.now.units - watch.base.units
            yield "requests", have, drift.min_units, drift.growth, lambda n: self._requests(drift, n)
            yield "grades", self._graded(), drift.min_units, drift.growth, lambda n: self._grades(drift, n)
        if feedback is not None:
            judged, _ = self._judged()
            want = feedback.min_judgements
            yield "feedback", judged, want, feedback.growth, lambda n: self._feedback(feedback, n)

    def _requests(self, drift: DriftTrigger, look: int) -> list[Look]:
        """None before there was a training window, or while too few of the latest are left."""
        reference, recent = self._units(REFERENCE), self._units(RECENT)
        if min(len(reference), len(recent)) < drift.min_units:
            return []
        return compare_requests(
            reference, recent, drift.at_least, spend(drift.alpha, look), drift.seed + look
        )

    def _grades(self, drift: DriftTrigger, look: int) -> list[Look]:
        digest = self._student()
        first, recent = self._scores(digest, FIRST), self._scores(digest, RECENT)
        if min(len(first), len(recent)) < drift.min_units:
            return []
        alpha = spend(drift.alpha, look)
        return [compare_grades(first, recent, drift.grade_drop, alpha, drift.seed + look)]

    def _feedback(self, feedback: FeedbackTrigger, look: int) -> list[Look]:
        judged, bad = self._judged()
        return [judge_feedback(bad, judged, feedback.bad_share, spend(feedback.alpha, look))]

    def _units(self, role: str) -> list[Unit]:
        rows = self._store.query(
            "SELECT key, ts, words, length FROM units WHERE route = ? AND role = ? ORDER BY key",
            (self._route, role),
        )
        return [Unit(*row) for row in rows]

    def _student(self) -> str:
        """The student whose grades came last."""
        rows = self._store.query(
            "SELECT digest FROM grades WHERE route = ? ORDER BY seq DESC LIMIT 1", (self._route,)
        )
        return str(rows[0][0]) if rows else ""

    def _graded(self) -> int:
        """Rows since the student's first grades were complete: what the looks at its grades are spaced by."""
        row = self._store.query(
            "SELECT max(seq) FILTER (WHERE role = 'recent') - max(seq) FILTER (WHERE role = 'first')"
            " FROM grades WHERE route = ? AND digest = ?",
            (self._route, self._student()),
        )[0]
        return int(row[0] or 0)

    def _scores(self, digest: str, role: str) -> list[float]:
        rows = self._store.query(
            "SELECT score FROM grades WHERE route = ? AND digest = ? AND role = ? ORDER BY key",
            (self._route, digest, role),
        )
        return [float(row[0]) for row in rows]

    def _judged(self) -> tuple[int, int]:
        row = self._store.query(
            "SELECT count(*), coalesce(sum(bad), 0) FROM judgements WHERE route = ?", (self._route,)
        )[0]
        return int(row[0]), int(row[1])

    def _watch(self, db: sqlite3.Connection) -> Watch:
        row = db.execute("SELECT watch FROM routes WHERE route = ?", (self._route,)).fetchone()
        return Watch.model_validate_json(row[0])

    def _keep(self, db: sqlite3.Connection, watch: Watch) -> None:
        db.execute("UPDATE routes SET watch = ? WHERE route = ?", (watch.model_dump_json(), self._route))


def window_start(config: RouteConfig, now: float) -> float | None:
    """Where a run's training window begins; None takes the whole log."""
    return None if config.window_days is None else now - config.window_days * _DAY_S


def unit_key(row: RequestRow) -> int:
    """63 bits of a hash of the conversation, or of the request where the router knew no conversation."""
    unit = row.request_id if row.unit_kind is UnitKind.REQUEST else row.unit_hash
    return int.from_bytes(hashlib.sha256(unit.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def _request(line: bytes) -> RequestRow | None:
    """None for what is no row of the request log: collect counts those, the flywheel passes them by."""
    try:
        return RequestRow.model_validate(orjson.loads(line))
    except (orjson.JSONDecodeError, ValidationError):
        return None


def _feedback(line: bytes) -> FeedbackRow | None:
    try:
        return FeedbackRow.model_validate(orjson.loads(line))
    except (orjson.JSONDecodeError, ValidationError):
        return None
