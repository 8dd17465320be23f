"""Erasing one person's, conversation's or request's rows, while routers write, upload and expire segments.

A tombstone is written first, then every final segment is rewritten without the rows. Whoever makes a segment
final afterwards reads the tombstones after the rename, so a row is met on one way or the other. Knows rows
only through `Target`.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from contracts.config import Record, write_atomic
from serve.request_log.locks import ERASE, REWRITE, locked
from serve.request_log.remote import Remote
from serve.request_log.segments import final_segments, open_segments
from serve.request_log.subjects import Target

_log = logging.getLogger("stillhouse.request_log")
_TOMBSTONES = ".erase"
_KEPT_S = 30 * 86400.0
"""How long tombstones are kept: far longer than any segment stays open."""


class Erased(Record):
    """What an erasure did."""

    local: int = 0
    """Rows removed from final segments in the log's folder."""
    remote: int = 0
    """Rows removed from uploaded segments; a row that is kept in both places counts in both."""
    waiting: int = 0
    """Rows in segments that are still being written; they go when those are closed."""


def erase(folder: Path, remote: Remote | None, target: Target) -> Erased:
    """Remove every row of the target. Safe beside running routers, and to be run again."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, ERASE):
        name = f"{int(target.at)}-{uuid.uuid4().hex[:8]}.json"
        write_atomic(folder / _TOMBSTONES / name, target.model_dump_json())
        # Before the final ones: a segment that is closed meanwhile is met as final, or by its writer.
        waiting = sum(_count(path, target) for path in open_segments(folder))
        local = sum(strike(path, [target]) for path in final_segments(folder))
        # After the local ones: an upload that took the old bytes notices the rewrite and is repeated.
        far = _strike_remote(remote, target) if remote is not None else 0
    return Erased(local=local, remote=far, waiting=waiting)


def settle(path: Path) -> int:
    """Apply all tombstones to a segment that has just become final; returns the rows removed."""
    targets = tombstones(path.parent)
    return strike(path, targets) if targets else 0


def tombstones(folder: Path) -> list[Target]:
    """The erasures that later segments still have to obey."""
    found = []
    for file in sorted((folder / _TOMBSTONES).glob("*.json")):
        try:
            found.append(Target.model_validate_json(file.read_bytes()))
        except FileNotFoundError:  # expired in this moment
            continue
        except ValidationError as err:
            _log.error("tombstone %s cannot be read and is not applied: %s", file, type(err).__name__)
    return found


def expire_tombstones(folder: Path) -> None:
    """Forget erasures that no open segment can be older than."""
    for file in (folder / _TOMBSTONES).glob("*.json"):
        stamp = file.name.partition("-")[0]
        if stamp.isdigit() and int(stamp) < time.time() - _KEPT_S:
            file.unlink(missing_ok=True)


def strike(path: Path, targets: Sequence[Target]) -> int:
    """Rewrite a final segment without the targets' rows. An emptied segment stays, as an empty file."""
    with locked(path.parent, REWRITE):
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # uploaded and removed, or expired
            return 0
        kept, removed = without(data, targets)
        if removed:
            _replace(path, kept)
        return removed


def without(data: bytes, targets: Sequence[Target]) -> tuple[bytes, int]:
    """A segment's lines that are none of the targets', and how many are."""
    targets = [target for target in targets if target.key.encode() in data]
    if not targets:
        return data, 0
    lines = data.splitlines(keepends=True)
    kept = [line for line in lines if not any(target.about(line) for target in targets)]
    return b"".join(kept), len(lines) - len(kept)


def _strike_remote(remote: Remote, target: Target) -> int:
    total = 0
    for name in remote.names():
        try:
            kept, removed = without(remote.read(name), [target])
        except FileNotFoundError:
            continue
        if removed:
            remote.write(name, kept)
            total += removed
    return total


def _count(path: Path, target: Target) -> int:
    try:
        return without(path.read_bytes(), [target])[1]
    except FileNotFoundError:  # closed in this moment: its rows are counted there
        return 0


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
