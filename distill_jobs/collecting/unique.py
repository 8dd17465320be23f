"""One partition of all segments' samples: exact duplicates and held-out requests dropped, the rest sorted by
digest and prepared for comparison.

Holds one partition in memory, whatever part of it are duplicates. Knows nothing about other partitions.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_jobs.collecting.bands import Bands, band_keys, choose_bands, sketches
from distill_jobs.collecting.difficulty import shingle_counts
from distill_jobs.collecting.parts import (
    SCHEMA,
    Texts,
    done,
    finish,
    read_part,
    save_array,
    write_table,
)
from distill_jobs.collecting.pruning import write_heads
from distill_jobs.collecting.shingles import U64, jaccard, shingles, signatures
from distill_jobs.collecting.split import SPLITS, side

_FOLD_BYTES = 64 << 20
"""Batches held before their duplicates are dropped: a request asked a million times must not fill memory."""
_CHUNK = 4096


def drop_exact(table: pa.Table) -> pa.Table:
    """One sample a digest, sorted by digest; of several answers the latest (the teacher of today) stays, a
    person's correction before any.
    """
    ranked = pa.table(
        {
            "digest": table["sample_digest"],
            "unanswered": pc.is_null(table["answer"]),
            "uncorrected": pc.invert(table["corrected"]),
            "ts": table["ts"],
            "request_id": table["request_id"],
        }
    )
    best_first = [("unanswered", "ascending"), ("uncorrected", "ascending"), ("ts", "descending")]
    order = pc.sort_indices(
        ranked, sort_keys=[("digest", "ascending"), *best_first, ("request_id", "descending")]
    )
    digests = ranked["digest"].take(order).combine_chunks()
    if len(digests) == 0:
        return table
    fresh = np.ones(len(digests), bool)
    fresh[1:] = pc.not_equal(digests[1:], digests[:-1]).to_numpy(zero_copy_only=False)
    return table.take(order.filter(pa.array(fresh)))


def make_unique(task: dict[str, Any]) -> dict[str, Any]:
    """Write partition `task["partition"]`: its table, texts, band keys, sketches and columns to decide by.

    `task` holds parts (the segments' files), partition, partitions, folder, held_out (a file), threshold and
    config. Done already: reads the report back.
    """
    finished = done(task)
    if finished is not None:
        return finished
    counts: Counter[str] = Counter()
    folder, number, threshold = Path(task["folder"]), task["partition"], task["threshold"]
    table = _gather(task, counts)
    table, signed = _free(table, task, counts)
    texts = table["text"].to_pylist()
    Texts.write(folder, number, texts)
    if threshold is not None:
        save_array(folder / f"{number:04d}.bands.npy", band_keys(signed, choose_bands(threshold)))
        save_array(folder / f"{number:04d}.sketches.npy", sketches(signed))
        save_array(folder / f"{number:04d}.same.npy", _text_keys(texts))
    if task["config"]["difficulty"] is not None:
        save_array(folder / f"{number:04d}.shingles.npy", shingle_counts(texts))
    if task["config"]["prune"] is not None:
        write_heads(folder, number, table, task["partitions"])
    classes = _decide_columns(table, folder, number, task["config"])
    write_table(folder / f"{number:04d}.arrow", table)
    return finish(task, {"rows": len(texts), "counts": dict(counts), "classes": classes})


def _gather(task: dict[str, Any], counts: Counter[str]) -> pa.Table:
    """The partition's samples without exact duplicates."""
    kept, held, size = SCHEMA.empty_table(), [], 0
    for path in task["parts"]:
        for batch in read_part(Path(path), task["partition"], task["partitions"]):
            counts["exact_duplicate"] += len(batch)
            held.append(pa.table(batch))
            size += batch.nbytes
        if size > _FOLD_BYTES:
            kept, held, size = drop_exact(pa.concat_tables([kept, *held])), [], 0
    kept = drop_exact(pa.concat_tables([kept, *held]))
    counts["exact_duplicate"] -= len(kept)
    return kept


def _free(table: pa.Table, task: dict[str, Any], counts: Counter[str]) -> tuple[pa.Table, Any]:
    """Samples that resemble no held-out text (without a threshold: that equal none), and their signatures."""
    threshold = task["threshold"]
    held_out = json.loads(Path(task["held_out"]).read_text("utf-8"))
    left = table.filter(pc.invert(pc.is_in(table["text"], pa.array(held_out, pa.string()))))
    signed = None
    if threshold is not None:
        texts = left["text"].to_pylist()
        signed = signatures(texts)
        if held_out and texts:
            free = ~_resembling(texts, signed, held_out, threshold)
            left, signed = left.filter(pa.array(free)), signed[free]
    counts["held_out"] += len(table) - len(left)
    return left, signed


def _resembling(texts: list[str], signed: Any, held_out: list[str], threshold: float) -> Any:
    """True for the texts that resemble a held-out one."""
    bands = choose_bands(threshold)
    theirs = band_keys(signatures(held_out), bands)
    found = np.zeros(len(texts), bool)
    for at, near in _candidates(signed, theirs, bands):
        mine = shingles(texts[at])
        found[at] = any(jaccard(mine, shingles(held_out[n])) >= threshold for n in near)
    return found


def _candidates(signed: Any, theirs: U64, bands: Bands) -> Iterator[tuple[int, list[int]]]:
    """(text, the held-out texts that share a band with it), for those that share one."""
    order = [np.argsort(keys, kind="stable") for keys in theirs]
    for start in range(0, len(signed), _CHUNK):
        near: dict[int, set[int]] = {}
        for mine, keys, by in zip(
            band_keys(signed[start : start + _CHUNK], bands), theirs, order, strict=True
        ):
            first = np.searchsorted(keys, mine, side="left", sorter=by)
            last = np.searchsorted(keys, mine, side="right", sorter=by)
            for at in np.flatnonzero(first < last):
                near.setdefault(int(at), set()).update(map(int, by[first[at] : last[at]]))
        yield from ((start + at, sorted(found)) for at, found in sorted(near.items()))


def _text_keys(texts: list[str]) -> U64:
    """64 bits of each text, equal for equal texts."""
    keys = (hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=8).digest() for t in texts)
    return np.frombuffer(b"".join(keys), np.uint64)


def _decide_columns(table: pa.Table, folder: Path, number: int, config: dict[str, Any]) -> list[str]:
    """Write what is decided over all partitions; returns the names of the class codes."""
    digests = table["sample_digest"].to_pylist()
    own = [SPLITS.index(side(d, config["calibration"], config["validation"])) for d in digests]
    save_array(folder / f"{number:04d}.side.npy", np.array(own, np.uint8))
    classes: list[str] = []
    if config["rank"] is not None:
        scores = table["score"].combine_chunks().fill_null(float("nan")).to_numpy(zero_copy_only=False)
        # A corrected answer is a person's: no judge's score of the old one speaks of it.
        scores = np.where(table["corrected"].combine_chunks().to_numpy(zero_copy_only=False), np.inf, scores)
        save_array(folder / f"{number:04d}.score.npy", scores.astype(np.float32))
    if config["balance"] is not None:
        coded = table["class"].combine_chunks().dictionary_encode()
        classes = coded.dictionary.to_pylist()
        save_array(
            folder / f"{number:04d}.class.npy",
            coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32),
        )
        drawn = (hashlib.sha256(f"{config['seed']}:{d}".encode()).digest()[:8] for d in digests)
        save_array(folder / f"{number:04d}.draw.npy", np.frombuffer(b"".join(drawn), np.uint64))
    return classes
