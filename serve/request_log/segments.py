"""Segments of JSON lines: appended whole, synced every second, closed by an atomic rename.

`requests-<utc>-<replica>.open.jsonl` is being written, `requests-<utc>-<replica>.jsonl` is final: only an
erasure rewrites it, whole. `feedback-…` and `scores-…` segments lie beside them. A process killed in between
leaves an open segment that `recover` trims and closes. Knows nothing about what a line holds.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from contracts.errors import DataError

_log = logging.getLogger("stillhouse.request_log")
_OPEN = ".open.jsonl"
_OWNER = re.compile(r"^(?:requests|feedback|scores)-[^-]+-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]+\.open\.jsonl$")
_NAME = re.compile(r"^(?:requests|feedback|scores)-(?P<stamp>\d{8}T\d{6}\.\d+Z)-.+\.jsonl$")
_STAMP = "%Y%m%dT%H%M%S.%fZ"
_SYNC_S = 1.0


class SegmentWriter:
    """Appends lines to the open segment of one replica. Used by one thread."""

    def __init__(
        self,
        folder: Path,
        replica: str,
        rotate_bytes: int,
        rotate_s: float,
        prefix: str = "requests",
        settle: Callable[[Path], object] | None = None,
    ) -> None:
        """`settle` is called with every segment once it is final, e.g. to apply erasures to it."""
        self._prefix = prefix
        self._settle = settle
        self._folder = folder
        self._replica = replica
        self._rotate_bytes = rotate_bytes
        self._rotate_s = rotate_s
        self._fd: int | None = None
        self._path = folder
        self._size = 0
        self._opened_at = 0.0
        self._synced_at = 0.0
        self._dirty = False

    def append(self, lines: Iterable[bytes]) -> None:
        """Write whole lines, each ending in a newline. Raises OSError, and leaves no torn line then."""
        data = b"".join(lines)
        if not data:
            return
        fd = self._open() if self._fd is None else self._fd
        self._write_whole(fd, data)
        self._size += len(data)
        self._dirty = True

    def tick(self) -> None:
        """Sync and rotate when it is time; call it at least every second."""
        now = time.monotonic()
        if self._fd is None:
            return
        if self._size >= self._rotate_bytes or now - self._opened_at >= self._rotate_s:
            self.close()
        elif self._dirty and now - self._synced_at >= _SYNC_S:
            os.fsync(self._fd)
            self._dirty, self._synced_at = False, now

    def close(self) -> None:
        """Make the open segment final."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        os.fsync(fd)
        os.close(fd)
        final = self._path.rename(_final_name(self._path))
        if self._settle is not None:
            self._settle(final)

    def _open(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).strftime(_STAMP)
        self._path = self._folder / f"{self._prefix}-{stamp}-{self._replica}{_OPEN}"
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640)
        self._size, self._dirty = 0, False
        self._opened_at = self._synced_at = time.monotonic()
        return self._fd

    def _write_whole(self, fd: int, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.write(fd, data[written:])
        except OSError:
            if written:
                os.ftruncate(fd, self._size)  # a full disk may take half a line; take it back
            raise


def recover(folder: Path, host: str) -> list[Path]:
    """Close the segments that dead processes of this host left open; a torn last line is cut off.

    Returns the final segments. Safe to run in several processes at once.
    """
    closed = []
    for path in open_segments(folder):
        owner = _OWNER.match(path.name)
        if owner is None or owner["host"] != host or _alive(int(owner["pid"])):
            continue
        try:
            kept = _trim(path)
            if kept == 0:
                path.unlink()
                continue
            closed.append(path.rename(_final_name(path)))
        except FileNotFoundError:  # another replica was faster
            continue
        _log.warning("closed segment %s left by a process that died (%d bytes)", path.name, kept)
    return closed


def open_segments(folder: Path) -> list[Path]:
    """Segments that are being written, or were left by a process that died."""
    return sorted(
        path
        for path in folder.glob(f"*{_OPEN}")
        if path.name.startswith(("requests-", "feedback-", "scores-"))
    )


def final_segments(folder: Path) -> list[Path]:
    """Closed segments, oldest first; files of other names are not ours to touch."""
    return sorted(path for path in folder.glob("*.jsonl") if is_final(path.name))


def is_final(name: str) -> bool:
    """True for the name of a closed segment."""
    return _NAME.match(name) is not None and not name.endswith(_OPEN)


def opened_at(name: str) -> float:
    """When the segment of this name was begun, in Unix seconds: no row of it is older."""
    found = _NAME.match(name)
    if found is None:
        raise DataError(f"{name!r} is not the name of a segment.")
    return datetime.strptime(found["stamp"], _STAMP).replace(tzinfo=UTC).timestamp()


def _final_name(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(_OPEN) + ".jsonl")


def _trim(path: Path) -> int:
    """Cut everything after the last newline; returns the bytes kept."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        kept = 0
        while end > 0 and kept == 0:
            start = max(0, end - 65536)
            file.seek(start)
            kept = start + file.read(end - start).rfind(b"\n") + 1
            if kept == start:  # no newline in this block: look further back
                kept, end = 0, start
        file.truncate(kept)
        return kept


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
