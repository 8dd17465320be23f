"""Writes one partition's chosen samples as parquet parts, a folder a side; counts what a card tells of them.

Rows are in order of their digests. Knows nothing about how they were chosen.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_jobs.collecting.parts import SCHEMA, done, finish, read_batches
from distill_jobs.collecting.pruning import prune
from distill_jobs.collecting.split import SPLITS

_EXAMPLES = 3
_EXAMPLE_CHARS = 1200


def out_schema(config: dict[str, Any]) -> pa.Schema:
    """Columns of the samples; what was not asked for has no column."""
    optional = {
        "score": config["rank"],
        "class": config["balance"],
        "student_messages": config["prune"],
        "weight": config["balance"] and config["balance"]["by"] == "weight",
        "difficulty": config["difficulty"],
        "bin": config["difficulty"],
    }
    fields = [
        *SCHEMA,
        pa.field("student_messages", pa.string()),
        pa.field("weight", pa.float32()),
        pa.field("difficulty", pa.float32()),
        pa.field("bin", pa.int16()),
    ]
    return pa.schema([f for f in fields if f.name != "logprob" and optional.get(f.name, True)])


def write_partition(task: dict[str, Any]) -> dict[str, Any]:
    """Write `task["partition"]` as `<out>/<side>/part-NNNNN.parquet`; returns counts and histograms.

    `task` holds folder, partition, out, config, constant (route → texts to take out), edges (of the bins of
    difficulty) and hard (which row of the difficulty array). Done already: reads the report back.
    """
    finished = done(task)
    if finished is not None:
        return finished
    schema = out_schema(task["config"])
    arrays = {name: _array(task, name) for name in ("copies", "chosen", "weight", "hard")}
    writers = {name: _Part(Path(task["out"]) / name, task["partition"], schema) for name in SPLITS}
    told = Told()
    at = 0
    for batch in read_batches(Path(task["folder"]) / f"{task['partition']:04d}.arrow"):
        rows = slice(at, at + len(batch))
        at += len(batch)
        columns = _columns(
            batch, {n: a if a is None else a[..., rows] for n, a in arrays.items()}, task, told
        )
        for number, name in enumerate(SPLITS):
            chosen = np.where(arrays["chosen"][rows] == number, arrays["copies"][rows], 0)
            picked = np.repeat(np.arange(len(batch)), chosen)
            table = pa.table([columns[f.name] for f in schema], schema=schema).take(pa.array(picked))
            writers[name].write(table)
            told.tell(name, table)
    for writer in writers.values():
        writer.close()
    return finish(task, told.report())


def _columns(
    batch: pa.RecordBatch, arrays: dict[str, Any], task: dict[str, Any], told: Told
) -> dict[str, pa.Array]:
    columns = {name: batch[name] for name in batch.schema.names}
    if task["constant"] is not None:
        kept = zip(
            batch["route"].to_pylist(), batch["messages"].to_pylist(), arrays["copies"].tolist(), strict=True
        )
        shorter = [
            prune(messages, task["constant"][route]) if copies and route in task["constant"] else None
            for route, messages, copies in kept
        ]
        told.counts["pruned"] += sum(text is not None for text in shorter)
        columns["student_messages"] = pa.array(shorter, pa.string())
    if arrays["weight"] is not None:
        columns["weight"] = pa.array(arrays["weight"], pa.float32())
    elif task["config"]["balance"] is not None:
        columns["weight"] = pa.array(np.ones(len(batch), np.float32))
    if arrays["hard"] is not None:
        hard = arrays["hard"][task["hard"]]
        columns["difficulty"] = pa.array(hard, pa.float32())
        columns["bin"] = pa.array(np.searchsorted(task["edges"], hard, side="left").astype(np.int16))
    return columns


def _array(task: dict[str, Any], name: str) -> Any:
    file = Path(task["folder"]) / f"{task['partition']:04d}.{name}.npy"
    return np.load(file) if file.is_file() else None


class _Part:
    """One part file, there when it has rows; the first partition's always, so that a side has columns."""

    def __init__(self, folder: Path, partition: int, schema: pa.Schema) -> None:
        self._path = folder / f"part-{partition:05d}.parquet"
        self._tmp = folder / f".part-{partition:05d}.{os.getpid()}.tmp"
        self._schema, self._always = schema, partition == 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        if len(table):
            self._open().write_table(table)

    def close(self) -> None:
        if self._writer is None and not self._always:
            return
        self._open().close()
        self._tmp.replace(self._path)

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._tmp, self._schema, compression="zstd", compression_level=1)
        return self._writer


class Told:
    """Counts of what was written, for the manifest and the card."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._by: dict[str, Counter[str]] = {}
        self._times: list[float] = []
        self._examples: list[dict[str, Any]] = []

    def tell(self, side: str, table: pa.Table) -> None:
        """Count the rows of one side."""
        self.counts[side] += len(table)
        if not len(table):
            return
        for column in ("route", "source"):
            found = table[column].value_counts().to_pylist()
            self._count(column, {str(f["values"]): f["counts"] for f in found})
        if side == "train" and "class" in table.schema.names:
            self._classes(table)
        self._lengths("request_chars", table["text"])
        self._lengths("answer_chars", table["answer"])
        times = table["ts"].to_numpy()
        self._times += [
            float(t) for t in (times[times > 0].min(initial=np.inf), times.max()) if 0 < t < np.inf
        ]
        if side == "train" and len(self._examples) < _EXAMPLES:
            wanted = table.select(["sample_digest", "messages", "answer", "source"]).slice(0, _EXAMPLES)
            self._examples += wanted.to_pylist()

    def _classes(self, table: pa.Table) -> None:
        weights = table["weight"] if "weight" in table.schema.names else pa.array(np.ones(len(table)))
        by = pa.table({"class": table["class"], "weight": weights}).group_by("class")
        for row in by.aggregate([("weight", "count"), ("weight", "sum")]).to_pylist():
            self._count("class", {str(row["class"]): row["weight_count"]})
            self._count("class_weight", {str(row["class"]): row["weight_sum"]})

    def _lengths(self, name: str, texts: pa.ChunkedArray) -> None:
        import pyarrow.compute as pc

        chars = pc.utf8_length(texts.drop_null()).to_numpy()
        powers, counts = np.unique(np.ceil(np.log2(np.maximum(chars, 1))).astype(int), return_counts=True)
        self._count(
            name, {str(1 << p): int(c) for p, c in zip(powers.tolist(), counts.tolist(), strict=True)}
        )

    def _count(self, name: str, found: dict[str, Any]) -> None:
        self._by.setdefault(name, Counter()).update(found)

    def report(self) -> dict[str, Any]:
        """All of it as JSON values."""
        shown = [
            {n: v[:_EXAMPLE_CHARS] if isinstance(v, str) else v for n, v in example.items()}
            for example in self._examples[:_EXAMPLES]
        ]
        times = [min(self._times), max(self._times)] if self._times else None
        by = {name: dict(found) for name, found in self._by.items()}
        return {"counts": dict(self.counts), "by": by, "times": times, "examples": shown}
