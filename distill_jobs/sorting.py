"""Sorting what need not fit in memory: sorted runs of a window each on disk, merged some at a time.

An external merge sort (Knuth, TAOCP 3, 5.4); stable, so that the order does not depend on the window. Knows
nothing about what it sorts.
"""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import pyarrow.ipc as ipc

from distill_jobs.collecting.parts import read_batches
from distill_jobs.lines import chunks

_FAN_IN = 16
"""Runs merged at once: together their batches hold one window."""
_BATCH = 256

T = TypeVar("T")


class Form(Protocol[T]):
    """How things lie in a file."""

    def pack(self, things: Sequence[T]) -> pa.RecordBatch: ...

    def unpack(self, batch: pa.RecordBatch) -> Iterable[T]: ...


@dataclass(frozen=True)
class DictForm:
    """Dicts of a schema's columns."""

    schema: pa.Schema

    def pack(self, things: Sequence[dict[str, Any]]) -> pa.RecordBatch:
        """Columns that a dict lacks are null; what the schema lacks is left out."""
        return pa.RecordBatch.from_pylist(list(things), schema=self.schema)

    def unpack(self, batch: pa.RecordBatch) -> Iterable[dict[str, Any]]:
        """The dicts."""
        made: list[dict[str, Any]] = batch.to_pylist()
        return made


@dataclass(frozen=True)
class Spilled(Generic[T]):
    """Things in files, in order; read as often as wanted, a batch in memory at a time."""

    files: tuple[Path, ...]
    form: Form[T]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[T]:
        for file in self.files:
            for batch in read_batches(file):
                yield from self.form.unpack(batch)


def spill(file: Path, things: Iterable[T], form: Form[T], batch: int = _BATCH) -> Spilled[T]:
    """Write things as they come; nothing is written of none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    writer: ipc.RecordBatchFileWriter | None = None
    for piece in chunks(things, batch):
        packed = form.pack(piece)
        writer = writer or ipc.new_file(
            str(file), packed.schema, options=ipc.IpcWriteOptions(compression="lz4")
        )
        writer.write_batch(packed)
        count += len(piece)
    if writer is not None:
        writer.close()
    return Spilled((file,) if count else (), form, count)


def sort_windows(
    windows: Iterable[Sequence[T]], key: Callable[[T], Any], form: Form[T], folder: Path, size: int
) -> Spilled[T]:
    """All things of the windows (of `size`) in the order of their keys, equal ones as they came.

    `folder` is emptied first: it holds nothing that is worth keeping over a kill.
    """
    shutil.rmtree(folder, ignore_errors=True)
    batch = max(1, min(_BATCH, size // _FAN_IN))
    runs = []
    for number, window in enumerate(windows):
        runs.append(spill(folder / f"0-{number:06d}.arrow", sorted(window, key=key), form, batch))
    level = 0
    while len(runs) > 1:
        level += 1
        runs = [
            _merged(group, key, form, folder / f"{level}-{number:06d}.arrow", batch)
            for number, group in enumerate(chunks(runs, _FAN_IN))
        ]
    return runs[0] if runs else Spilled((), form, 0)


def _merged(
    runs: Sequence[Spilled[T]], key: Callable[[T], Any], form: Form[T], file: Path, batch: int
) -> Spilled[T]:
    merged = spill(file, heapq.merge(*runs, key=key), form, batch)
    for old in (f for run in runs for f in run.files):
        old.unlink()
    return merged
