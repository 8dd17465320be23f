"""Teacher outputs shared between jobs: a folder of part files, found by the rows' keys.

A folder holds one teacher and one form of output (its name is their digest), so a row's key is enough. Files
are hard links to the jobs' own parts where the file system allows it; they appear whole and never change, so
jobs that run at once need no lock: the worst they can do is to compute a row twice. Knows nothing about
teachers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.config import write_atomic
from distill_jobs.keys import sha256_of
from distill_jobs.teaching.config import Scheme
from distill_jobs.teaching.local import Scored
from distill_jobs.teaching.parts import VALUES, read_values
from distill_jobs.teaching.rows import Row

_OPEN_FILES = 4
"""Parts kept decoded: rows are asked for in the order that an earlier job wrote them in."""


class Store:
    """Part files of one folder, as a mapping from row keys to values. 20 bytes of memory a row.

    A file that cannot be read is as if it were not there: its rows are computed again.
    """

    def __init__(self, folder: Path, scheme: Scheme, about: dict[str, object] | None = None) -> None:
        self._scheme: Scheme = scheme
        self._folder = folder
        self._open: OrderedDict[int, pa.Table] = OrderedDict()
        if about is not None and not (folder / "about.json").is_file():
            write_atomic(folder / "about.json", json.dumps(about, indent=1) + "\n")
        self._files = sorted(folder.glob("*.parquet"))
        keys, files, places = [], [], []
        for number, file in enumerate(self._files):
            found = _keys(file)
            keys.append(found)
            files.append(np.full(len(found), number, dtype=np.int32))
            places.append(np.arange(len(found), dtype=np.int32))
        self._keys = np.concatenate(keys) if keys else np.zeros(0, dtype="V16")
        order = np.argsort(self._keys, kind="stable")
        self._keys = self._keys[order]
        self._file = np.concatenate(files)[order] if files else np.zeros(0, dtype=np.int32)
        self._place = np.concatenate(places)[order] if places else np.zeros(0, dtype=np.int32)

    def find(self, row: Row) -> Scored | None:
        """The values of a row; None when nobody stored them."""
        at = int(np.searchsorted(self._keys, np.frombuffer(bytes.fromhex(row.key), dtype="V16")[0]))
        if at == len(self._keys) or self._keys[at].tobytes() != bytes.fromhex(row.key):
            return None
        table = self._table(int(self._file[at]))
        return (
            None if table is None else read_values(table, self._scheme, int(self._place[at]), row.completion)
        )

    def adopt(self, part: Path) -> None:
        """Let other jobs find a finished part (this object, already open, does not)."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = sha256_of([_keys(part).tobytes().hex()])[:32]
        target = self._folder / f"{name}.parquet"
        if target.exists():
            return
        tmp = target.with_name(f".{name}.{os.getpid()}-{threading.get_ident()}.tmp")
        tmp.unlink(missing_ok=True)
        try:
            os.link(part, tmp)
        except OSError:  # another file system, or one without links
            shutil.copyfile(part, tmp)
        tmp.replace(target)
        # Renaming onto a link to the same file (another job was first) leaves the source's name behind.
        tmp.unlink(missing_ok=True)

    def _table(self, number: int) -> pa.Table | None:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        try:
            table = pq.read_table(self._files[number], columns=list(VALUES[self._scheme])).combine_chunks()
        except (OSError, pa.ArrowException):
            return None
        self._open[number] = table
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return table


def _keys(file: Path) -> np.ndarray:
    """The row keys of a part as 16 bytes each; of an unreadable file, none."""
    with contextlib.suppress(OSError, pa.ArrowException, ValueError):
        hexes = pq.read_table(file, columns=["row_key"])["row_key"].to_pylist()
        return np.frombuffer(bytes.fromhex("".join(hexes)), dtype="V16")
    return np.zeros(0, dtype="V16")
