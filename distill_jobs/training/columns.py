"""Parquet parts as flat memory-mapped columns: rows are read at random, and need not fit in memory.

A parquet file can only be read a row group at a time, and a shuffled step touches all of them. So the parts
are streamed once, checked on the way, into one flat file a column beside them (`<folder>.columns/<key>`);
workers of a machine share its pages. Knows the columns' names and shapes, nothing of batches or losses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.errors import DataError

BATCH_ROWS = 4096
LAYOUT = 2
"""Version of the flat files; another one reads the parts again."""
SCHEMES = {
    "topk": ("topk_ids", "topk_logprobs"),
    "sampled": ("topk_ids", "topk_logprobs"),
    "hidden": ("hidden",),
}
DTYPES = {
    "input_ids": np.int32,
    "topk_ids": np.int32,
    "topk_logprobs": np.float16,
    "hidden": np.float16,
    "prompt_len": np.int32,
    "lengths": np.int32,
    "weight": np.float32,
    "difficulty": np.float32,
    "rationale": np.bool_,
    "teacher": np.uint32,
}


@dataclass(slots=True)
class Columns:
    """Flat columns of a folder: values of a row follow each other, rows follow each other."""

    arrays: dict[str, np.ndarray]
    width: (
        int  # values a completion position: k of the top-k columns, d of hidden states; 0 without a teacher
    )
    scheme: str
    largest_id: int


def tag_code(tag: str) -> int:
    """The number that stands for a teacher's tag in the flat files."""
    return zlib.crc32(tag.encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The `manifest.json` beside the parts, or nothing when there is none."""
    path = Path(folder) / "manifest.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def open_columns(folder: Path, max_length: int, with_teacher: bool) -> Columns:
    """The folder's columns, made from its parts unless they are there.

    Raises: DataError when there are no rows or they are malformed.
    """
    folder = Path(folder)
    files = sorted(folder.glob("part-*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no part-*.parquet; run the teach stage first.")
    scheme = _scheme(folder) if with_teacher else ""
    place = _place(folder, files, scheme)
    if not (place / "about.json").exists():
        _convert(files, place, _Checks(folder, scheme, read_manifest(folder).get("vocab_size")))
    about = json.loads((place / "about.json").read_text(encoding="utf-8"))
    arrays = {name: _map(place / f"{name}.bin", DTYPES[name]) for name in about["columns"]}
    longest = int(arrays["lengths"].max())
    if longest > max_length:
        raise DataError(f"{folder}: a row has {longest} tokens, more than max_length {max_length}.")
    return Columns(arrays, about["width"], scheme, about["largest_id"])


def _scheme(folder: Path) -> str:
    scheme = str(read_manifest(folder).get("scheme", "topk"))
    if scheme not in SCHEMES:
        raise DataError(f"{folder}/manifest.json: scheme {scheme!r} is not one of {', '.join(SCHEMES)}.")
    return scheme


def _map(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _place(folder: Path, files: list[Path], scheme: str) -> Path:
    """Beside the parts, or in the temporary folder where that cannot be written."""
    stamps = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files]
    manifest = read_manifest(folder)
    key = hashlib.sha256(json.dumps([LAYOUT, scheme, manifest, stamps], sort_keys=True).encode()).hexdigest()[
        :16
    ]
    beside = folder.resolve().with_name(folder.resolve().name + ".columns")
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside / key
    return Path(tempfile.gettempdir()) / f"stillhouse-columns-{os.getuid()}" / key


def _convert(files: list[Path], place: Path, checks: _Checks) -> None:
    """Stream the parts into a folder that appears whole; of several processes doing so, one wins."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with contextlib.ExitStack() as stack:
            outs: dict[str, BinaryIO] = {}
            for file in files:
                for arrays in _batches(file, checks):
                    for name, array in arrays.items():
                        if name not in outs:
                            outs[name] = stack.enter_context((temporary / f"{name}.bin").open("wb"))
                        array.astype(DTYPES[name], copy=False).tofile(outs[name])
        if not checks.rows:
            raise DataError(f"{checks.folder} holds no rows.")
        about = {"columns": sorted(outs), "width": checks.width, "largest_id": checks.largest_id}
        (temporary / "about.json").write_text(json.dumps(about), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was first: its folder is the same
            temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _batches(file: Path, checks: _Checks) -> Iterator[dict[str, np.ndarray]]:
    """A part's columns, some thousand rows at a time, checked."""
    try:
        source = pq.ParquetFile(file)
    except pa.ArrowInvalid as err:
        raise DataError(f"{file} is not a parquet file: {err}") from err
    with source:
        present = set(source.schema_arrow.names)
        needed = ["input_ids", "prompt_len", *SCHEMES.get(checks.scheme, ())]
        if missing := [name for name in needed if name not in present]:
            raise DataError(f"{file} has no column {missing[0]}; run the teach stage again.")
        optional = [name for name in ("weight", "task", "difficulty", "teacher") if name in present]
        for batch in source.iter_batches(BATCH_ROWS, columns=[*needed, *optional]):
            if batch.num_rows:
                yield checks.batch(file, batch)


@dataclass(slots=True)
class _Checks:
    """What must hold for every row, and what is learned on the way."""

    folder: Path
    scheme: str
    vocabulary: int | None
    rows: int = 0
    width: int = 0
    largest_id: int = 0
    _file: str = field(default="", init=False)

    def batch(self, file: Path, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """The batch's flat columns, all those that any batch has."""
        self._file = str(file)
        ids, lengths = _flatten(self._column(batch, "input_ids"))
        prompts = self._column(batch, "prompt_len").to_numpy(zero_copy_only=False)
        if not ((prompts < lengths) & (prompts > 0)).all():
            raise self._error("every row needs a prompt and a completion (0 < prompt_len < len(input_ids)).")
        self._ids("input_ids", ids)
        arrays = {"input_ids": ids, "lengths": lengths, "prompt_len": prompts}
        for name in SCHEMES.get(self.scheme, ()):
            arrays[name] = self._answers(name, batch, lengths - prompts)
        self.rows += batch.num_rows
        return arrays | self._of_rows(batch)

    def _error(self, what: str) -> DataError:
        return DataError(f"{self._file}: {what}")

    def _column(self, batch: pa.RecordBatch, name: str) -> Any:
        column = batch.column(name)
        if column.null_count:
            raise self._error(f"{name} has empty cells.")
        return column

    def _ids(self, name: str, ids: np.ndarray) -> None:
        if ids.dtype.kind not in "iu":
            raise self._error(f"{name} holds {ids.dtype}, not token ids.")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= (self.vocabulary or 2**31)):
            raise self._error(f"{name} holds token ids outside the vocabulary of {self.vocabulary or 2**31}.")
        self.largest_id = max(self.largest_id, int(ids.max(initial=0)))

    def _answers(self, name: str, batch: pa.RecordBatch, answers: np.ndarray) -> np.ndarray:
        """A column of `width` values for every completion token."""
        values, sizes = _flatten(self._column(batch, name))
        if name == "topk_ids":
            self._ids(name, values)
        elif values.dtype.kind != "f" or np.isnan(values).any():
            raise self._error(f"{name} must hold numbers, not {values.dtype} or NaN.")
        self.width = self.width or int(sizes[0] // answers[0])
        if not self.width or not (sizes == self.width * answers).all():
            raise self._error(f"{name} must hold k values for every completion token ({self.width} here).")
        return values

    def _of_rows(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """Weight, task and difficulty; what a part does not say is 1, "answer" and 0."""
        count, present = batch.num_rows, batch.schema.names
        arrays = {"weight": np.ones(count, np.float32), "difficulty": np.zeros(count, np.float32)}
        for name in arrays:
            if name in present:
                arrays[name] = self._column(batch, name).to_numpy(zero_copy_only=False).astype(np.float32)
                if not np.isfinite(arrays[name]).all():
                    raise self._error(f"{name} must be finite.")
        if (arrays["weight"] < 0).any():
            raise self._error("weight must not be negative.")
        arrays["rationale"] = np.zeros(count, bool)
        if "task" in present:
            tasks = self._column(batch, "task").to_numpy(zero_copy_only=False)
            if unknown := set(tasks) - {"answer", "rationale"}:
                raise self._error(f'task must be "answer" or "rationale", not {sorted(unknown)[0]!r}.')
            arrays["rationale"] = tasks == "rationale"
        arrays["teacher"] = np.zeros(count, np.uint32)
        if "teacher" in present:
            tags = self._column(batch, "teacher").to_pylist()
            arrays["teacher"] = np.array([tag_code(str(tag)) for tag in tags], np.uint32)
        return arrays


def _flatten(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values of a list column (of lists of one size, too) and how many each row has."""
    starts = column.offsets.to_numpy()
    values, inner = column.values.slice(starts[0], starts[-1] - starts[0]), 1
    if pa.types.is_fixed_size_list(values.type):
        inner, values = values.type.list_size, values.flatten()
    return values.to_numpy(zero_copy_only=False), np.diff(starts) * inner
