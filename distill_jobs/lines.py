"""JSON lines that need not fit in memory: streamed, appended to after a kill, found by a field.

Knows nothing about what a line means.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

import numpy as np

Item = TypeVar("Item")

_PLACE = np.dtype([("key", "V16"), ("file", np.int32), ("at", np.int64)])


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive pieces of at most `size`; the items are taken as the pieces are."""
    source = iter(items)
    while piece := list(islice(source, size)):
        yield piece


def stream_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines, one in memory at a time; a torn last line (a killed writer) is left out."""
    return (row for _, _, row in _places(path))


def write_stream(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """JSON lines, atomically, one in memory at a time. Returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    with tmp.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
            count += 1
        out.flush()
        os.fsync(out.fileno())
    tmp.replace(path)
    return count


def open_to_append(path: Path) -> TextIO:
    """A file of JSON lines (made when it is not there), open for more; a torn last line is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    end = 0
    for at, size, _ in _places(path):
        end = at + size
    os.truncate(path, end)
    sink = path.open("a+b")
    if end:
        sink.seek(end - 1)
        if sink.read(1) != b"\n":
            sink.write(b"\n")
    sink.close()
    return path.open("a", encoding="utf-8")


class LineIndex:
    """Lines of files by the value of a field, read again when asked for. 28 bytes of memory a line.

    Of several lines with one value the last counts.
    """

    def __init__(self, files: Sequence[Path], field: str) -> None:
        self._files, self._field = list(files), field
        self._open: tuple[int, BinaryIO] | None = None
        found = [_indexed(number, file, field) for number, file in enumerate(self._files)]
        places = np.concatenate([np.zeros(0, _PLACE), *found])
        places = places[np.argsort(places["key"], kind="stable")]
        last = np.append(places["key"][1:] != places["key"][:-1], True)[: len(places)]
        self._places = places[last]

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, value: object) -> bool:
        return self._at(value) is not None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The lines, in the order of the files."""
        for place in np.argsort(self._places, order=("file", "at")):
            yield self._read(int(place))

    def find(self, value: object) -> dict[str, Any] | None:
        """The line whose field has this value."""
        at = self._at(value)
        return None if at is None else self._read(at)

    def _at(self, value: object) -> int | None:
        key = np.frombuffer(_digest(value), dtype="V16")[0]
        at = int(np.searchsorted(self._places["key"], key))
        return at if at < len(self._places) and self._places["key"][at].tobytes() == key.tobytes() else None

    def _read(self, at: int) -> dict[str, Any]:
        number = int(self._places["file"][at])
        if self._open is None or self._open[0] != number:
            self._close()
            self._open = number, self._files[number].open("rb")
        source = self._open[1]
        source.seek(int(self._places["at"][at]))
        row: dict[str, Any] = json.loads(source.readline())
        return row

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()

    def __del__(self) -> None:
        self._close()


def _indexed(number: int, file: Path, field: str) -> np.ndarray:
    keys, starts = bytearray(), array("q")
    for at, _, row in _places(file):
        keys += _digest(row[field])
        starts.append(at)
    made = np.empty(len(starts), _PLACE)
    made["key"], made["file"] = np.frombuffer(bytes(keys), dtype="V16"), number
    made["at"] = np.frombuffer(starts, np.int64)
    return made


def _digest(value: object) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()


def _places(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(first byte, bytes, value) of each line before the first that is torn."""
    at = 0
    with path.open("rb") as source:
        for line in source:
            try:
                row = json.loads(line)
            except ValueError:  # JSONDecodeError, UnicodeDecodeError: what a killed writer left
                return
            yield at, len(line), row
            at += len(line)
