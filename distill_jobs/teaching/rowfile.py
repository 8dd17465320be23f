"""All rows of a split in one sorted file, and what has to be known of them before one is scored.

Of the rows only a batch is in memory, whatever their number. Knows nothing about distributions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_jobs.sorting import Spilled, sort_windows
from distill_jobs.teaching.merge import JOIN
from distill_jobs.teaching.rows import CARRIED, Row, by_length

_SCHEMA = pa.schema(
    [
        ("sample_digest", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_len", pa.int32()),
        ("teacher_ids", pa.list_(pa.int32())),  # null: what the student reads
        ("teacher", pa.string()),
        ("weight", pa.float64()),
        ("task", pa.string()),
        ("difficulty", pa.float64()),
    ]
)


@dataclass(frozen=True)
class RowForm:
    """Rows as Arrow batches."""

    carried: frozenset[str] = frozenset(CARRIED)
    """Columns that rows come back with."""

    def pack(self, rows: Sequence[Row]) -> pa.RecordBatch:
        """One batch."""
        own = [None if r.teacher_ids is r.input_ids else r.teacher_ids for r in rows]
        columns: dict[str, list[Any]] = {
            "sample_digest": [r.sample_digest for r in rows],
            "input_ids": [r.input_ids for r in rows],
            "prompt_len": [r.prompt_len for r in rows],
            "teacher_ids": own,
            "teacher": [r.teacher for r in rows],
            **{name: [r.carried[name] for r in rows] for name in CARRIED},
        }
        return pa.record_batch([pa.array(columns[f.name], f.type) for f in _SCHEMA], schema=_SCHEMA)

    def unpack(self, batch: pa.RecordBatch) -> Iterator[Row]:
        """The rows; their ids are copies, so that a row does not keep its batch."""
        plain = {f.name: batch[f.name].to_pylist() for f in _SCHEMA if not pa.types.is_list(f.type)}
        for place in range(len(batch)):
            ids = _ids(batch["input_ids"][place])
            other = batch["teacher_ids"][place]
            yield Row(
                plain["sample_digest"][place],
                ids,
                plain["prompt_len"][place],
                _ids(other) if other.is_valid else ids,
                plain["teacher"][place],
                {name: plain[name][place] for name in CARRIED if name in self.carried},
            )


@dataclass
class RowFile:
    """The rows of a split in order, read as often as wanted."""

    rows: Spilled[Row]
    teachers: Counter[str] = field(default_factory=Counter)
    """Rows by the name of a teacher that scores them."""
    positions: int = 0
    """Completion positions."""
    scored: int = 0
    """Positions times the teachers that score them."""
    most_teachers: int = 1
    """Teachers of one row at most."""
    only: str | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.only is None else self.teachers[self.only]

    def __iter__(self) -> Iterator[Row]:
        return (r for r in self.rows if self.only is None or self.only in r.teacher.split(JOIN))

    def of(self, teacher: str) -> RowFile:
        """The rows that one teacher scores."""
        return replace(self, only=teacher)


def sort_rows(windows: Iterable[tuple[list[Row], set[str]]], folder: Path, size: int) -> RowFile:
    """Rows of all windows (of at most `size`), in the order of the parts. Beside its rows a window names the
    columns of CARRIED that its samples have: what one sample has is there for all.
    """
    made = RowFile(Spilled((), RowForm(), 0))
    carried: set[str] = set()

    def told() -> Iterator[list[Row]]:
        for rows, have in windows:
            carried.update(have)
            _tell(made, rows)
            yield rows

    rows = sort_windows(told(), by_length, RowForm(), folder, size)
    made.rows = replace(rows, form=RowForm(frozenset(carried)))
    return made


def _tell(made: RowFile, rows: Sequence[Row]) -> None:
    for row in rows:
        names = row.teacher.split(JOIN)
        made.teachers.update(names)
        made.positions += row.completion
        made.scored += row.completion * len(names)
        made.most_teachers = max(made.most_teachers, len(names))


def _ids(cell: pa.ListScalar) -> np.ndarray:
    ids: np.ndarray = cell.values.to_numpy(zero_copy_only=False).copy()
    return ids
