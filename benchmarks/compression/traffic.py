"""Requests of the demo's world as a route's log would hold them, with the world's own answers.

Two tasks, by language; the tune part's requests open with one system prompt, as a product's do. Knows nothing
of what is measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.recipes.data import FIRST_EVALUATION, TEACHER, body, requests
from contracts.traffic import Arm, LogMode, Outcome, Reason, RequestRow, UnitKind
from distill_jobs.tokens import ChatTokenizer
from serve.tuning.traffic import CHAT

ROUTE = "support"
SYSTEM = (
    "You are the support desk. Read the message, decide which tools it asks for, and answer with the calls "
    "alone, as JSON, in the order in which the message asks for them. Answer an empty list where it asks for "
    "none."
)
ARRIVALS_A_S = 4.0
E2E_S = 2.0
"""What the log says of them: eight requests in flight, by Little's law."""


def write_log(folder: Path, count: int, system: bool = False) -> None:
    """Fill a request log's folder with one segment of `count` rows, unless it is there."""
    file = folder / "requests-1.jsonl"
    if file.exists() and len(file.read_text().splitlines()) == count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ChatTokenizer(TEACHER)
    lines = []
    for number, one in enumerate(requests("evaluation", FIRST_EVALUATION, count)):
        asked: dict[str, Any] = {**body(one), "model": ROUTE, "metadata": {"task": one.language}}
        if system:
            asked["messages"] = [{"role": "system", "content": SYSTEM}, *asked["messages"]]
        text = json.dumps(one.answer, ensure_ascii=False)
        lines.append(_row(number, asked, text, tokenizer).model_dump_json())
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(number: int, asked: dict[str, Any], text: str, tokenizer: ChatTokenizer) -> RequestRow:
    return RequestRow(
        request_id=f"bench-{number}",
        ts=1_800_000_000 + number / ARRIVALS_A_S,
        route=ROUTE,
        endpoint=CHAT,
        arm=Arm.STABLE,
        served_arm=Arm.STABLE,
        reason=Reason.ONLY_ARM,
        unit_kind=UnitKind.REQUEST,
        unit_hash=str(number),
        split_version=1,
        upstream="teacher",
        model="teacher",
        stream=False,
        status=200,
        outcome=Outcome.OK,
        prompt_tokens=len(tokenizer.prompt(asked)),
        completion_tokens=max(1, len(tokenizer.answer(text))),
        e2e_s=E2E_S,
        overhead_s=0.0,
        log_mode=LogMode.FULL,
        request=asked,
        response_text=text,
    )
