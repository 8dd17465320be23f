"""Nested subsets of training rows: a larger share holds every row of a smaller one.

A row's place is the sha256 of seed and sample digest, so neither part files nor their order matter. Knows
nothing about what a row teaches; columns, and files beside the parts, are carried along.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.config import write_atomic
from contracts.errors import DataError


def write_subset(rows: Path, share: float, seed: int, out: Path) -> Path:
    """The first `share` of the rows by digest, as a folder like the one they come from; at least one row.

    Done before: left as it is (the manifest is written last). All of them: the folder itself.
    """
    if share >= 1.0:
        return rows
    if (out / "manifest.json").is_file():
        return out
    parts = sorted(rows.glob("part-*.parquet"))
    places = [_places(part, seed) for part in parts]
    everything = sorted(place for part in places for place in part)
    if not everything:
        raise DataError(f"{rows} holds no rows to take a share of.")
    kept = max(1, round(share * len(everything)))
    last = everything[kept - 1]
    out.mkdir(parents=True, exist_ok=True)
    for part, mine in zip(parts, places, strict=True):
        chosen = pa.array([place <= last for place in mine])
        tmp = out / f".{part.name}.tmp"
        pq.write_table(pq.read_table(part).filter(chosen), tmp)
        tmp.replace(out / part.name)
    _carry(rows, out)
    about = json.loads((rows / "manifest.json").read_text(encoding="utf-8"))
    about |= {"rows": kept, "subset": {"share": share, "seed": seed}}
    write_atomic(out / "manifest.json", json.dumps(about, indent=1) + "\n")
    return out


def _places(part: Path, seed: int) -> list[str]:
    digests = pq.read_table(part, columns=["sample_digest"])["sample_digest"].to_pylist()
    return [hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest() for digest in digests]


def _carry(rows: Path, out: Path) -> None:
    """Link what lies beside the parts (a teacher's head, say)."""
    for file in rows.iterdir():
        target = out / file.name
        beside = file.is_file() and not file.name.startswith(("part-", ".")) and file.name != "manifest.json"
        if beside and not target.exists():
            os.link(file, target)
