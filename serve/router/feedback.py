"""`POST /v1/feedback`: what a user says about an answer, joined to its request, whichever router answered.

A judgement is stored once, counted once, and written as a line beside the request log. Its texts are kept as
far as the request's own were. What it says of an arm is evidence, once: a judgement that is changed later
stays counted as it was. Off the path of requests; the store is only touched in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Container
from typing import Any

import orjson
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from contracts.errors import ConflictError, StateError
from contracts.feedback import Feedback, FeedbackRow
from contracts.metrics import FEEDBACK as BY_USERS
from contracts.redaction import Redactor
from contracts.traffic import LogMode, Reason
from serve.request_log import SegmentWriter
from serve.router.config import RouterConfig
from serve.router.errors import RequestRefused, error_body
from serve.router.guard import Receive
from serve.router.intake import Intake, request_id_of
from serve.router.keys import KeyTable
from serve.router.ledger import EvidenceKey, Ledger
from serve.router.metrics import Metrics
from serve.router.openapi import FEEDBACK
from serve.router.relay import Send
from serve.router.replies import send_json
from serve.router.served import ServedIds, rows_of
from serve.router.table import RouteTable
from serve.state.feedback import FeedbackState, Served, Stored
from serve.state.tables import open_state

_log = logging.getLogger("stillhouse.router")

_FIELDS = ("request_id", "id", "good", "score", "comment", "correction")
_MAX_BODY = 2**20
_MAX_WAITING = 256
_LOOK_S = 0.25
_OTHERS_FLUSH_S = 1.0
"""What another router's write may take on top of its flush interval."""
_DAY_S = 86400.0
_PRUNE_S = 3600.0


class FeedbackDesk:
    """Takes feedback, and keeps the store's list of served requests up to date, for one router process."""

    def __init__(
        self,
        config: RouterConfig,
        table: RouteTable,
        keys: KeyTable,
        metrics: Metrics,
        served: ServedIds,
        ledger: Ledger,
        redactor: Redactor,
        lines: SegmentWriter | None,
    ) -> None:
        """`lines`: where judgements are written beside the request log; None without a request log."""
        self._config = config
        self._metrics = metrics
        self._served = served
        self._ledger = ledger
        self._redactor = redactor
        self._lines = lines
        self._lines_lock = threading.Lock()
        small = config.model_copy(update={"max_body_bytes": min(_MAX_BODY, config.max_body_bytes)})
        self._intake = Intake(small, table, keys)
        self._wait_s = config.flush_s + _OTHERS_FLUSH_S
        self._waiting = 0
        self._store: FeedbackState | None = None
        self._open_lock = threading.Lock()
        self._failing = False
        self._pruned_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the store (one that is down does not stop the router) and begin to keep the list."""
        await self._flush()
        self._task = asyncio.create_task(self._flush_forever())

    async def stop(self) -> None:
        """Store the last ids, and make the feedback segment final."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._flush()
        if self._lines is not None:
            try:
                await asyncio.to_thread(self._lines.close)
            except OSError as err:
                _log.error("the feedback segment could not be closed: %r", err)

    async def handle(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one POST; a key may only speak of the routes in its scope."""
        headers = self._intake.headers(scope)
        request_id = request_id_of(headers)
        try:
            key = self._intake.admit(scope)
            body = await self._intake.read_body(headers, receive)
            reply = await self._take(body, None if key is None else key.routes)
        except RequestRefused as refused:
            self._metrics.refused(refused.status, FEEDBACK)
            await send_json(send, refused.status, refused.body, request_id, refused.headers)
        except (StateError, SQLAlchemyError) as err:
            self._failed("store feedback", err)
            self._metrics.refused(503, FEEDBACK)
            why = error_body("The feedback could not be stored; try again.", "server_error")
            await send_json(send, 503, why, request_id, [(b"retry-after", b"1")])
        else:
            await send_json(send, 200, reply, request_id)

    # one judgement -------------------------------------------------------------------------------------

    async def _take(self, body: bytes, routes: Container[str] | None) -> dict[str, Any]:
        given = parse_feedback(body, time.time())
        row = await self._find(given.request_id)
        if row is None or row.at < self._oldest() or (routes is not None and row.route not in routes):
            raise RequestRefused(
                f"No answered request has the id {given.request_id!r}. Send the x-request-id of an answer, "
                f"within {self._config.feedback_days:g} days.",
                404, "request_not_found", "request_id",
            )  # fmt: skip
        stored = await asyncio.to_thread(self._keep, given, row)
        if stored is Stored.NEW:
            self._metrics.feedback.labels(row.route, row.arm, verdict_of(given)).inc()
            self._count(given, row)
        return {"object": "feedback", "id": given.id, "request_id": given.request_id, "status": stored.value}

    def _count(self, given: Feedback, row: Served) -> None:
        """Count a new judgement as evidence on the arm that its request was drawn for.

        In the window of that request's split version, however late it comes. A stable answer counts for one
        rollout only, so no A/B/n test is decided by feedback. A router killed before its next flush loses the
        count, not the judgement: none is ever counted twice.
        """
        score = score_of(given)
        if score is not None and row.rollout_id is not None and row.reason == Reason.RANDOM:
            key = EvidenceKey(row.route, row.rollout_id, row.arm, row.split_version)
            self._ledger.score(key, BY_USERS, score)

    async def _find(self, request_id: str) -> Served | None:
        """The served request; one that another router has not stored yet is waited for."""
        found = self._served.find(request_id)
        if found is None:
            found = await asyncio.to_thread(self._look_up, request_id)
        if found is not None:
            return found
        if self._waiting >= _MAX_WAITING:
            raise RequestRefused("Too much feedback on unknown requests; try again later.", 429, "busy")
        self._waiting += 1
        try:
            deadline = time.monotonic() + self._wait_s
            while found is None and time.monotonic() < deadline:
                await asyncio.sleep(_LOOK_S)
                found = await asyncio.to_thread(self._look_up, request_id)
        finally:
            self._waiting -= 1
        return found

    def _keep(self, given: Feedback, row: Served) -> Stored:
        """Store a judgement and write its line. Runs in a thread."""
        mode = LogMode(row.log_mode)
        kept = self._without_texts(given, mode)
        try:
            stored = self._state().store(kept)
        except ConflictError as err:
            raise RequestRefused(str(err), 409, "id_taken", "id") from err
        if stored is not Stored.SAME and self._lines is not None:
            line = FeedbackRow(
                **kept.model_dump(),
                route=row.route,
                arm=row.arm,
                rollout_id=row.rollout_id,
                split_version=row.split_version,
                log_mode=mode,
                subjects=tuple(row.subjects.split()),
            )
            self._write_line(line.model_dump_json().encode() + b"\n")
        return stored

    def _without_texts(self, given: Feedback, mode: LogMode) -> Feedback:
        if mode is LogMode.FULL:
            return given
        comment = correction = None
        if mode is LogMode.REDACTED:
            try:
                comment = given.comment and self._redactor.text(given.comment)
                correction = given.correction and self._redactor.text(given.correction)
            except Exception as err:  # noqa: BLE001 reason: a detector is the user's code; its text is not kept then
                self._metrics.log_unredacted.inc()
                _log.error("feedback could not be redacted: %s", type(err).__name__)
                comment = correction = None
        if given.good is None and given.score is None and not comment and not correction:
            raise RequestRefused(
                "The texts of this request are not kept, so those of its feedback are not either; "
                "give 'good' or 'score'.",
                param="good",
            )
        return given.model_copy(update={"comment": comment, "correction": correction})

    def _write_line(self, line: bytes) -> None:
        assert self._lines is not None
        try:
            with self._lines_lock:
                self._lines.append([line])
        except OSError as err:  # the judgement is in the store; only its copy is missing
            self._metrics.log_dropped.inc()
            _log.error("feedback could not be written beside the request log: %r", err)

    # the list of served requests -----------------------------------------------------------------------

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.flush_s)
            await self._flush()

    async def _flush(self) -> None:
        notes = self._served.cut()
        prune = time.monotonic() - self._pruned_at > _PRUNE_S

        def write() -> None:
            if self._lines is not None:
                with self._lines_lock:
                    self._lines.tick()
            state = self._state()
            state.add_served(rows_of(notes))
            if prune:
                state.prune(self._oldest())

        try:
            await asyncio.to_thread(write)
        except (StateError, SQLAlchemyError, OSError) as err:
            self._failed("store the ids of served requests", err)
            return
        self._served.stored()
        if prune:
            self._pruned_at = time.monotonic()
        if self._failing:
            self._failing = False
            _log.warning("can store the ids of served requests again")

    def _look_up(self, request_id: str) -> Served | None:
        return self._state().find_served(request_id)

    def _state(self) -> FeedbackState:
        with self._open_lock:
            if self._store is None:
                self._store = FeedbackState(open_state(self._config.state_url))
            return self._store

    def _oldest(self) -> float:
        return time.time() - self._config.feedback_days * _DAY_S

    def _failed(self, what: str, err: Exception) -> None:
        self._metrics.state_errors.inc()
        if not self._failing:
            self._failing = True
            _log.error("cannot %s, will try again: %s", what, err)


def parse_feedback(body: bytes, now: float) -> Feedback:
    """The judgement in a request body. Raises: RequestRefused naming the field."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as err:
        raise RequestRefused(f"The request body is not valid JSON: {err}.") from err
    if not isinstance(data, dict):
        raise RequestRefused("The request body must be a JSON object.")
    if unknown := sorted(set(data) - set(_FIELDS)):
        raise RequestRefused(
            f"Unknown field {unknown[0][:64]!r}; feedback has {', '.join(_FIELDS)}.", param=unknown[0][:64]
        )
    given = {name: value for name, value in data.items() if value is not None}
    if "request_id" in given:
        given.setdefault("id", given["request_id"])
    try:
        made = Feedback.model_validate({**given, "ts": now}, strict=True)
    except ValidationError as err:
        wrong = err.errors(include_input=False, include_url=False)
        first = min(wrong, key=lambda e: e["loc"] != ("request_id",))  # the id is its copy by default
        field = str(first["loc"][0]) if first["loc"] else None
        why = first["msg"].removeprefix("Value error, ")
        raise RequestRefused(f"{field}: {why}." if field else f"{why}.", param=field) from err
    for name in ("id", "request_id"):
        if not getattr(made, name).isprintable():
            raise RequestRefused(f"{name}: must be printable characters.", param=name)
    return made


def verdict_of(given: Feedback) -> str:
    """The metric's label of a judgement."""
    if given.good is not None:
        return "good" if given.good else "bad"
    if given.score is not None:
        return "scored"
    return "commented" if given.correction is None else "corrected"


def score_of(given: Feedback) -> float | None:
    """A judgement as a score in [0, 1]: a given score, else the thumb; None for words alone."""
    if given.score is not None:
        return given.score
    return None if given.good is None else float(given.good)
