"""Samples as collect writes them, and the teach stage run over them. Knows nothing about what is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_jobs import teach
from distill_jobs.config import EngineConfig
from distill_jobs.progress import Progress
from distill_jobs.stage import Result
from distill_jobs.teaching.config import TeachConfig


def sample(text: str, answer: str | None, **more: Any) -> dict[str, Any]:
    """A collected sample of one user message."""
    messages = [{"role": "user", "content": text}]
    return {
        "sample_digest": f"d-{text}",
        "request": json.dumps({"model": "support", "messages": messages}),
        "messages": json.dumps(messages),
        "answer": answer,
        "text": text,
        "corrected": False,
        **more,
    }


SAMPLES = [sample("refund", "[1]"), sample("a much longer request", "ok then"), sample("hi", "x")]


def run(
    tmp: Path,
    teacher: Path,
    samples: list[dict[str, Any]],
    config: TeachConfig,
    answer: Any = None,
    cache_dir: Path | None = None,
    digest: str = "digest",
    max_model_len: int = 512,
) -> Result:
    """Run the stage in `<tmp>/teach` with one validation sample."""
    (tmp / "teach").mkdir(exist_ok=True, parents=True)
    collected = {"train": tmp / "train.parquet", "validation": tmp / "validation.parquet"}
    columns = sorted({c for s in samples for c in s})
    table = pa.Table.from_pylist([{c: s.get(c) for c in columns} for s in samples])
    pq.write_table(table, collected["train"])
    pq.write_table(pa.Table.from_pylist([sample("v", "v")]), collected["validation"])
    extra = {"answer": answer} if answer else {}
    return teach.run(
        config,
        EngineConfig(max_model_len=max_model_len),
        teacher,
        digest,
        collected,
        tmp / "teach",
        Progress(tmp / "progress.json"),
        lambda text: None,
        cache_dir=cache_dir,
        **extra,
    )


def rows_of(result: Result, split: str = "train") -> dict[str, dict[str, Any]]:
    """Rows by sample digest."""
    table = pq.read_table(sorted(Path(result.outputs[split].path).glob("part-*.parquet")))
    return {r["sample_digest"]: r for r in table.to_pylist()}
