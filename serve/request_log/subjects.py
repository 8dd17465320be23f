"""Whose a row is: the hashed ids of people and conversations in it, and the targets of an erasure.

Ids themselves are never stored. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import orjson

from contracts.config import Record
from contracts.traffic import UnitKind, bounded_unit, hash_unit


class TargetKind(StrEnum):
    """What an erasure names."""

    CONVERSATION = "conversation"
    USER = "user"
    REQUEST = "request"


_BODY_FIELDS = (("user", TargetKind.USER), ("safety_identifier", TargetKind.USER))
_METADATA_FIELDS = (
    ("conversation_id", TargetKind.CONVERSATION),
    ("user_id", TargetKind.USER),  # Anthropic's place for it
    ("user", TargetKind.USER),
)
_UNIT_KINDS = {
    UnitKind.HEADER: TargetKind.CONVERSATION,
    UnitKind.METADATA: TargetKind.CONVERSATION,
    UnitKind.USER: TargetKind.USER,
}


def subject(kind: TargetKind, name: str) -> str:
    """An id as rows carry it, e.g. `user:0123456789abcdef`."""
    return f"{kind.value}:{hash_unit(bounded_unit(name))}"


def subjects_of(body: dict[str, Any]) -> tuple[str, ...]:
    """The ids that a request body names, hashed."""
    found = [subject(kind, body[f]) for f, kind in _BODY_FIELDS if _is_id(body.get(f))]
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        found += [subject(kind, metadata[f]) for f, kind in _METADATA_FIELDS if _is_id(metadata.get(f))]
    return tuple(dict.fromkeys(found))


def with_unit(subjects: Iterable[str], unit_kind: UnitKind, unit_hash: str) -> tuple[str, ...]:
    """Subjects of the body and the assignment's unit, where that is an id at all."""
    kind = _UNIT_KINDS.get(unit_kind)
    return tuple(dict.fromkeys((*subjects, *((f"{kind.value}:{unit_hash}",) if kind else ()))))


class Target(Record):
    """What is to be erased: every row of it that arrived until `at`."""

    kind: TargetKind
    key: str
    """A request id as it is, or the hash of a user's or conversation's id."""
    at: float
    """Unix seconds. A conversation that goes on after its erasure is logged again."""

    @property
    def subject(self) -> str:
        """As rows carry it."""
        return f"{self.kind.value}:{self.key}"

    def about(self, line: bytes) -> bool:
        """True when a row (of requests, feedback or scores) is the target's.

        A line that names the target and cannot be read is the target's too: better one damaged row less.
        """
        if self.key.encode() not in line:
            return False
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            return True
        if not isinstance(row, dict) or not isinstance(row.get("ts"), int | float):
            return True
        return row["ts"] <= self.at and self._named_by(row)

    def _named_by(self, row: dict[str, Any]) -> bool:
        if self.kind is TargetKind.REQUEST:
            return self.key in (row.get("request_id"), row.get("pair_id"))  # its copies hold its text too
        unit = (row.get("unit_kind"), row.get("unit_hash"))
        if any(unit == (kind.value, self.key) for kind, owner in _UNIT_KINDS.items() if owner is self.kind):
            return True
        return self.subject in (row.get("subjects") or ())


def make_target(kind: TargetKind, name: str, at: float) -> Target:
    """The target of an erasure by its plain id."""
    key = name if kind is TargetKind.REQUEST else hash_unit(bounded_unit(name))
    return Target(kind=kind, key=key, at=at)


def _is_id(value: object) -> bool:
    return isinstance(value, str) and bool(value)
