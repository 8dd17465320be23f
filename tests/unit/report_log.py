"""A request log for report tests: rows of both arms as a router would have written them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contracts.metrics import GRADE
from contracts.traffic import Arm, LogMode, Outcome, Reason, RequestRow, UnitKind

SEGMENT = "requests-19700101T000000.000000Z-router-a.jsonl"
"""Older than any rollout: segments are chosen by when they were opened and last written."""


def row(number: int, rollout_id: str, arm: Arm, **changes: Any) -> RequestRow:
    """One answered request; `asked` and `said` are its texts."""
    asked, said = changes.pop("asked", f"Where is order {number}?"), changes.pop("said", "On its way.")
    upstream = changes.pop("upstream", "student-v1" if arm is Arm.CANARY else "teacher")
    if (grade := changes.pop("grade", None)) is not None:
        changes["scores"] = {GRADE: float(grade)}
    values: dict[str, Any] = {
        "request_id": f"req-{number}",
        "ts": 1_000_010.0 + number,
        "route": "support",
        "endpoint": "/v1/chat/completions",
        "arm": arm,
        "served_arm": arm,
        "reason": Reason.RANDOM,
        "unit_kind": UnitKind.USER,
        "unit_hash": f"{number:016x}",
        "split_version": 2,
        "rollout_id": rollout_id,
        "upstream": upstream,
        "model": upstream,
        "stream": False,
        "status": 200,
        "outcome": Outcome.OK,
        "finish_reason": "stop",
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "ttft_s": 0.05,
        "e2e_s": 0.4,
        "overhead_s": 0.001,
        "log_mode": LogMode.FULL,
        "request": {"model": "support", "messages": [{"role": "user", "content": asked}]},
        "response_text": said,
    }
    return RequestRow(**{**values, **changes})


def write(folder: Path, rows: list[RequestRow], tail: str = "") -> Path:
    """Write a final segment; `tail` is what a torn or foreign line holds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SEGMENT
    path.write_text("".join(r.model_dump_json() + "\n" for r in rows) + tail, encoding="utf-8")
    return folder
