"""Part files: rows with what their teacher thinks, whole or not there, recognised by their rows' keys.

Columns: sample_digest, token_digest, row_key, input_ids, prompt_len, the sample's weight, task or difficulty
when it has one, and by scheme topk_ids and topk_logprobs, or hidden: row-major, `width` values a completion
position. Position j is the distribution that predicts input_ids[prompt_len + j], natural log, untempered.
Knows nothing about where values come from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_jobs.teaching.config import Scheme
from distill_jobs.teaching.local import Scored
from distill_jobs.teaching.rows import Row

VALUES: dict[Scheme, dict[str, pa.DataType]] = {
    "topk": {"topk_ids": pa.int32(), "topk_logprobs": pa.float16()},
    "sampled": {"topk_ids": pa.int32(), "topk_logprobs": pa.float16()},
    "hidden": {"hidden": pa.float16()},
    "text": {},
}
"""A scheme's columns, each a list of so many values a row."""

_CARRIED = {"weight": pa.float32(), "task": pa.string(), "difficulty": pa.float32()}


def part_name(start: int, shard_rows: int) -> str:
    """The file of the rows from `start` on."""
    return f"part-{start // shard_rows:05d}.parquet"


def is_complete(part: Path, rows: Sequence[Row]) -> bool:
    """True when a part of an earlier run holds exactly these samples and token ids."""
    if not part.is_file():
        return False
    table = pq.read_table(part, columns=["row_key", "token_digest"])
    have = list(zip(table["row_key"].to_pylist(), table["token_digest"].to_pylist(), strict=True))
    return have == [(r.key, r.token_digest) for r in rows]


def write_part(part: Path, rows: Sequence[Row], scored: Sequence[Scored], scheme: Scheme) -> None:
    """Write rows and their values, atomically."""
    columns: dict[str, pa.Array] = {
        "sample_digest": pa.array([r.sample_digest for r in rows], pa.string()),
        "token_digest": pa.array([r.token_digest for r in rows], pa.string()),
        "row_key": pa.array([r.key for r in rows], pa.string()),
        "input_ids": _lists([r.input_ids for r in rows], pa.int32()),
        "prompt_len": pa.array([r.prompt_len for r in rows], pa.int32()),
    }
    for name in rows[0].carried if rows else ():
        columns[name] = pa.array([r.carried[name] for r in rows], _CARRIED[name])
    for name, kind in VALUES[scheme].items():
        columns[name] = _lists([s[name].reshape(-1) for s in scored], kind)
    part.parent.mkdir(parents=True, exist_ok=True)
    tmp = part.with_name(f".{part.name}.{os.getpid()}.tmp")
    pq.write_table(pa.table(columns), tmp)
    tmp.replace(part)


def read_values(table: pa.Table, scheme: Scheme, place: int, completion: int) -> Scored:
    """The values of a table's row, each (completion, width)."""
    found = {}
    for name in VALUES[scheme]:
        values = table.column(name)[place].values
        found[name] = values.to_numpy(zero_copy_only=False).reshape(completion, -1)
    return found


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    """A list column without a Python object a value."""
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat.astype(kind.to_pandas_dtype()), type=kind)
    )
