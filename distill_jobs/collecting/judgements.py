"""What users said of logged answers, from the feedback segments beside the request log.

A judgement is the last line of its id; of several judgements on one request the latest correction counts, and
the latest thumb. Knows nothing about rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import orjson
from pydantic import ValidationError

from contracts.config import write_atomic
from contracts.feedback import FeedbackRow
from distill_jobs.collecting.window import Place, Segment, read_segment


class Judged(NamedTuple):
    """What is known of one request's answer."""

    correction: str | None = None
    """The text it should have been."""
    good: bool | None = None


def read_judgements(log_dir: Place, segments: Iterable[Segment], counts: Counter[str]) -> dict[str, Judged]:
    """Request id → what was said of its answer; comments and scores say nothing here. Raises: DataError."""
    latest: dict[str, FeedbackRow] = {}
    for segment in segments:
        for line in read_segment(log_dir, segment).split(b"\n"):
            if not line.strip():
                continue
            try:
                row = FeedbackRow.model_validate(orjson.loads(line))
            except (orjson.JSONDecodeError, ValidationError):
                counts["feedback_malformed"] += 1
                continue
            if row.id not in latest or latest[row.id].ts <= row.ts:
                latest[row.id] = row
    counts["judgements"] = len(latest)
    judged: dict[str, Judged] = {}
    for row in sorted(latest.values(), key=lambda r: (r.ts, r.id)):
        before = judged.get(row.request_id, Judged())
        judged[row.request_id] = Judged(
            before.correction if row.correction is None else row.correction,
            before.good if row.good is None else row.good,
        )
    return judged


def write_judged(path: Path, judged: dict[str, Judged]) -> None:
    """For the workers that parse segments."""
    write_atomic(path, json.dumps(judged))


def read_judged(path: Path) -> dict[str, Judged]:
    """What `write_judged` wrote."""
    return {name: Judged(*said) for name, said in json.loads(path.read_text(encoding="utf-8")).items()}
