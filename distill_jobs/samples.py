"""Samples on disk, a window at a time: a parquet file, or a folder of parts in the order of their names.

Plain Parquet batches in one process: what follows (one engine, one model, one sorted file) is sequential, and
Ray Data would only move the same batches through an object store. Knows nothing about what a sample means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.errors import DataError

Sample = dict[str, Any]

_READ_ROWS = 256


def windows(path: Path, size: int, columns: Sequence[str] | None = None) -> Iterator[list[Sample]]:
    """The samples, `size` at a time (the last window may be smaller); `columns` that a file has, or all."""
    held: list[Sample] = []
    for file in _files(path):
        with pq.ParquetFile(file) as source:
            wanted = [c for c in columns if c in source.schema_arrow.names] if columns else None
            for batch in source.iter_batches(min(size, _READ_ROWS), columns=wanted):
                held += batch.to_pylist()
                while len(held) >= size:
                    yield held[:size]
                    held = held[size:]
    if held:
        yield held


def each(path: Path, columns: Sequence[str] | None = None) -> Iterator[Sample]:
    """The samples one by one."""
    for window in windows(path, _READ_ROWS, columns):
        yield from window


def count(path: Path) -> int:
    """How many samples there are."""
    return sum(pq.read_metadata(file).num_rows for file in _files(path))


def schema_of(path: Path) -> pa.Schema:
    """Columns of the samples."""
    return pq.read_schema(_files(path)[0])


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob("part-*.parquet"))
    if not files:
        raise DataError(f"{path} holds no part-*.parquet. Run the collect stage first.")
    return files
