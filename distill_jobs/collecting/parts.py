"""How samples lie on disk between the steps of collect: partitioned by digest, so that each partition is
worked on alone.

A segment's samples are one Arrow IPC file in which batch k*P + p holds partition p of the k-th block; writing
them there at once spares a shuffle: no row passes through the object store. Partitions are ranges of the
digest, so their order is the digests' order. Knows nothing about what a sample means.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from numpy.typing import NDArray

SCHEMA = pa.schema(
    [
        ("sample_digest", pa.string()),
        ("request", pa.string()),
        ("messages", pa.string()),
        ("answer", pa.string()),
        ("text", pa.string()),
        ("request_id", pa.string()),
        ("ts", pa.float64()),
        ("upstream", pa.string()),
        ("answer_digest", pa.string()),
        ("corrected", pa.bool_()),
        ("route", pa.string()),
        ("source", pa.string()),
        ("score", pa.float32()),
        ("class", pa.string()),
        ("logprob", pa.float32()),
    ]
)

PARTITION_BYTES = 32 << 20
"""Log bytes in one partition; a worker holds some five times as much."""
MOST_PARTITIONS = 4096
_BLOCK_ROWS = 16_384
_OPTIONS = ipc.IpcWriteOptions(compression="lz4")


def partition_count(log_bytes: int) -> int:
    """Partitions for a log of this size."""
    return min(MOST_PARTITIONS, max(1, -(-log_bytes // PARTITION_BYTES)))


def partition_of(digest: str, count: int) -> int:
    """The partition of a digest: its first 16 bits, cut into `count` ranges."""
    return int(digest[:4], 16) * count >> 16


class PartWriter:
    """Writes one segment's samples; the file appears when all is written."""

    def __init__(self, path: Path, partitions: int) -> None:
        self._path, self._partitions = path, partitions
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tmp = path.with_suffix(f".{os.getpid()}.tmp")
        self._file = ipc.new_file(str(self._tmp), SCHEMA, options=_OPTIONS)
        self._rows: list[list[dict[str, Any]]] = [[] for _ in range(partitions)]
        self._held = 0
        self.written = 0

    def add(self, sample: dict[str, Any]) -> None:
        """Take one more sample."""
        self._rows[partition_of(sample["sample_digest"], self._partitions)].append(sample)
        self._held += 1
        self.written += 1
        if self._held >= _BLOCK_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is held, and let the file appear."""
        self._flush()
        self._file.close()
        self._tmp.replace(self._path)

    def _flush(self) -> None:
        for rows in self._rows:
            columns = [pa.array([row[f.name] for row in rows], f.type) for f in SCHEMA]
            self._file.write_batch(pa.record_batch(columns, schema=SCHEMA))
            rows.clear()
        self._held = 0


def read_part(path: Path, partition: int, partitions: int) -> Iterator[pa.RecordBatch]:
    """The batches of one partition in a file of PartWriter's."""
    # Read, not mapped: pages of a mapped file would count as this process's memory.
    with pa.OSFile(str(path)) as source, ipc.open_file(source) as file:
        for batch in range(partition, file.num_record_batches, partitions):
            yield file.get_batch(batch)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as Arrow IPC; the file appears when all is written."""
    tmp = path.with_suffix(f".{os.getpid()}.tmp")
    with ipc.new_file(str(tmp), table.schema, options=_OPTIONS) as file:
        file.write_table(table, max_chunksize=_BLOCK_ROWS)
    tmp.replace(path)


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a file of `write_table`'s, one in memory at a time."""
    with pa.OSFile(str(path)) as source, ipc.open_file(source) as file:
        for batch in range(file.num_record_batches):
            yield file.get_batch(batch)


def save_array(path: Path, values: NDArray[Any]) -> None:
    """Save an array; the file appears when all is written."""
    tmp = path.with_suffix(f".{os.getpid()}.tmp")
    with tmp.open("wb") as out:
        np.save(out, values)
    tmp.replace(path)


class Texts:
    """Texts of all partitions by number, read one by one; only their offsets (8 bytes each) are in memory."""

    def __init__(self, folder: Path, counts: Sequence[int]) -> None:
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._offsets = [np.load(folder / f"{p:04d}.ends.npy") for p in range(len(counts))]
        self._files = [os.open(folder / f"{p:04d}.txt", os.O_RDONLY) for p in range(len(counts))]

    def __getitem__(self, number: int) -> str:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        ends, at = self._offsets[part], number - int(self._starts[part])
        first = int(ends[at - 1]) if at else 0
        return os.pread(self._files[part], int(ends[at]) - first, first).decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)

    @staticmethod
    def write(folder: Path, partition: int, texts: Sequence[str]) -> None:
        """Write one partition's texts."""
        data = [text.encode("utf-8", "surrogatepass") for text in texts]
        tmp = folder / f"{partition:04d}.{os.getpid()}.tmp"
        tmp.write_bytes(b"".join(data))
        tmp.replace(folder / f"{partition:04d}.txt")
        lengths = np.fromiter(map(len, data), np.int64, len(data))
        save_array(folder / f"{partition:04d}.ends.npy", np.cumsum(lengths))


def done(task: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a task that an earlier run finished."""
    file = Path(task["report"])
    if not file.is_file():
        return None
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


def finish(task: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Write a task's report, its last act."""
    file = Path(task["report"])
    pa.default_memory_pool().release_unused()  # a worker lives on, and its neighbours need the memory
    tmp = file.with_suffix(f".{os.getpid()}.tmp")
    tmp.write_text(json.dumps(report), encoding="utf-8")
    tmp.replace(file)
    return report
