"""Ids of answered requests on their way to the state store, so that feedback on them can be told from noise.

Owned by one event loop; noting an id is two dictionary look-ups. Knows nothing about feedback or SQL.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from contracts.routes import LogPolicy
from contracts.traffic import Assignment, Split
from serve.request_log.policy import mode_of
from serve.request_log.subjects import subjects_of, with_unit
from serve.router.exchange import EVIDENCE_ENDPOINTS, Exchange
from serve.router.metrics import Metrics
from serve.state.feedback import Served

_IDS: tuple[str, ...] = ("user", "safety_identifier", "metadata")


class _Note(NamedTuple):
    """What a row is made of later; the request's body itself is not held."""

    request_id: str
    split: Split
    assignment: Assignment
    log_policy: LogPolicy
    ids: dict[str, Any]
    at: float


class ServedIds:
    """The ids that are not stored yet."""

    def __init__(self, bound: int, metrics: Metrics) -> None:
        self._bound = bound
        self._metrics = metrics
        self._new: dict[str, _Note] = {}
        self._writing: dict[str, _Note] = {}

    def note(self, ex: Exchange) -> None:
        """A request ended: remember it if its client saw an answer, or the beginning of one."""
        if ex.endpoint not in EVIDENCE_ENDPOINTS or not (ex.streamed or ex.status < 400):
            return
        if len(self._new) + len(self._writing) >= self._bound:
            self._metrics.served_dropped.inc()
            return
        body = ex.body
        ids = {name: body[name] for name in _IDS if name in body}
        self._new[ex.request_id] = _Note(
            ex.request_id, ex.route.split, ex.assignment, ex.log_policy, ids, ex.ts
        )

    def find(self, request_id: str) -> Served | None:
        """A request that is not stored yet."""
        note = self._new.get(request_id) or self._writing.get(request_id)
        return None if note is None else _row(note)

    def cut(self) -> list[_Note]:
        """Everything not stored yet; call `stored` once it is."""
        self._writing.update(self._new)
        self._new = {}
        return list(self._writing.values())

    def stored(self) -> None:
        """What was cut is in the state store."""
        self._writing = {}


def rows_of(notes: list[_Note]) -> list[Served]:
    """The rows to store; hashes are made here, in the thread that writes them."""
    return [_row(note) for note in notes]


def _row(note: _Note) -> Served:
    assignment = note.assignment
    subjects = with_unit(subjects_of(note.ids), assignment.unit_kind, assignment.unit_hash)
    return Served(
        request_id=note.request_id,
        route=note.split.route,
        arm=assignment.arm.value,
        reason=assignment.reason.value,
        rollout_id=note.split.rollout_of(assignment),
        split_version=assignment.split_version,
        log_mode=mode_of(note.log_policy, assignment.unit_hash).value,
        subjects=" ".join(subjects),
        at=note.at,
    )
