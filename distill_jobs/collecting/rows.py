"""One log segment to samples: parse its lines, apply the filters, and write what is left as parquet.

Pure but for reading the segment and writing its part; runs in Ray Data's workers or in process. Knows nothing
about other segments: duplicates and splits are decided over all of them in dedupe.py and split.py.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from contracts.traffic import LogMode, Outcome, RequestRow
from distill_jobs.collecting.judgements import Judged, read_judged
from distill_jobs.collecting.shingles import signature
from distill_jobs.collecting.window import Segment, place, read_segment
from distill_jobs.keys import sha256_of

CHAT = "chat"
NOT_JUDGED = Judged()
MAX_NAMED = 20
"""Malformed lines named by number in a segment's report."""

SCHEMA = pa.schema(
    [
        ("sample_digest", pa.string()),
        ("request", pa.string()),
        ("messages", pa.string()),
        ("answer", pa.string()),
        ("text", pa.string()),
        ("request_id", pa.string()),
        ("ts", pa.float64()),
        ("upstream", pa.string()),
        ("answer_digest", pa.string()),
        ("corrected", pa.bool_()),
        ("signature", pa.list_(pa.uint32())),
    ]
)


def parse_segment(task: dict[str, Any]) -> dict[str, Any]:
    """Filter a pinned segment into `task["out"]`; returns its counts. Done already: reads them back.

    `task` holds log_dir, segment, out, judged (a file) and config (a CollectConfig), all as JSON values.
    """
    out = Path(task["out"])
    report = out.with_suffix(".json")
    if report.is_file():
        done: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return done
    counts: Counter[str] = Counter()
    malformed: list[int] = []
    samples: list[dict[str, Any]] = []
    segment = Segment.model_validate(task["segment"])
    judged = read_judged(Path(task["judged"]))
    for number, line in enumerate(read_segment(place(task["log_dir"]), segment).split(b"\n"), start=1):
        if not line.strip():
            continue
        counts["read"] += 1
        try:
            row = RequestRow.model_validate(orjson.loads(line))
        except (orjson.JSONDecodeError, ValidationError):
            counts["malformed"] += 1
            malformed.append(number)
            continue
        said = _heeded(judged.get(row.request_id), task["config"])
        why = refusal(row, task["config"], said)
        if why is not None:
            counts[why] += 1
            continue
        counts["corrected"] += said.correction is not None
        samples.append(to_sample(row, task["config"], said))
    counts["kept"] = len(samples)
    _write(out, samples, task["config"]["near_duplicates"] is not None)
    result = {"name": segment.name, "counts": dict(counts), "malformed_lines": malformed[:MAX_NAMED]}
    tmp = report.with_suffix(f".{os.getpid()}.tmp")
    tmp.write_text(json.dumps(result), encoding="utf-8")
    tmp.replace(report)
    return result


def _heeded(said: Judged | None, config: dict[str, Any]) -> Judged:
    """As much of a judgement as the configuration wants to hear."""
    if said is None:
        return NOT_JUDGED
    correction = said.correction if config["corrections"] else None
    return Judged(correction, said.good if config["drop_bad_feedback"] else None)


def refusal(row: RequestRow, config: dict[str, Any], said: Judged = NOT_JUDGED) -> str | None:
    """The first rule that a row breaks, as the name it is counted under; None keeps it."""
    if CHAT not in row.endpoint:
        return "not_chat"
    if config["route"] is not None and row.route != config["route"]:
        return "other_route"
    if (config["since"] is not None and row.ts < config["since"]) or (
        config["until"] is not None and row.ts >= config["until"]
    ):
        return "outside_window"
    if row.log_mode in (LogMode.METADATA, LogMode.OFF):
        return "texts_not_logged"
    if conversation(row.request) is None:
        return "not_text"
    answer = answer_of(row) if said.correction is None else said.correction
    if len(str(row.request.get("messages"))) + len(answer or "") > config["max_chars"]:
        return "too_long"
    if (
        said.correction is not None
    ):  # a person's text: whose answer it corrects, and how that ended, is no matter
        return _bad_text(said.correction, config)
    if _by_other(row, config):
        return None if config["other_answers"] == "relabel" else "other_upstream"
    if said.good is False:
        return "bad_feedback"
    return _bad_answer(row, config)


def _bad_answer(row: RequestRow, config: dict[str, Any]) -> str | None:
    """What is wrong with a teacher's answer."""
    if row.outcome is not Outcome.OK:
        return "not_ok"
    if row.finish_reason != "stop":
        return "not_finished"
    if config["drop_failed_grades"] and 0.0 in row.scores.values() and answer_of(row):
        return "failed_grade"
    return _bad_text(answer_of(row), config)


def _bad_text(answer: str | None, config: dict[str, Any]) -> str | None:
    if not answer:
        return "no_text"
    if config["require_json"] and not _is_json(answer):
        return "not_json"
    return None


def _by_other(row: RequestRow, config: dict[str, Any]) -> bool:
    # After a fallback `upstream` names who was charged, not who answered: such a text is nobody's for sure.
    return bool(config["upstreams"]) and (
        row.upstream not in config["upstreams"] or row.served_arm != row.arm
    )


def answer_of(row: RequestRow) -> str | None:
    """The assistant's text, from the stream's assembly or the whole response."""
    if row.response_text is not None:
        return row.response_text
    choices = (row.response or {}).get("choices") or [{}]
    content = (choices[0].get("message") or {}).get("content") if isinstance(choices[0], dict) else None
    return content if isinstance(content, str) else None


def conversation(request: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The request's messages with plain-text contents; None when it is not a text conversation."""
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        return None
    plain = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return None
        content = message.get("content")
        if isinstance(content, list):
            parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
            if len(parts) != len(content) or not all(isinstance(p, str) for p in parts):
                return None
            content = "".join(str(p) for p in parts)
        if not isinstance(content, str):
            return None
        plain.append(message | {"content": content})
    return plain


def normalise(text: str) -> str:
    """Unicode-normalised, case-folded, white space collapsed: what equality of requests means here."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def request_text(messages: list[dict[str, Any]]) -> str:
    """The text by which requests are compared: all that is not the system's, so shared instructions don't
    count.
    """
    spoken = [m["content"] for m in messages if m["role"] not in ("system", "developer")]
    return normalise("\n".join(spoken))


def to_sample(row: RequestRow, config: dict[str, Any], said: Judged = NOT_JUDGED) -> dict[str, Any]:
    """The sample of a kept row. Its digest is over the normalised conversation (and tools), not the
    answer.
    """
    messages = conversation(row.request) or []
    answer = None if _by_other(row, config) else answer_of(row)
    identity = [[m["role"], normalise(m["content"])] for m in messages]
    return {
        "sample_digest": sha256_of([identity, row.request.get("tools")]),
        "request": orjson.dumps(row.request).decode(),
        "messages": orjson.dumps(messages).decode(),
        "answer": answer if said.correction is None else said.correction,
        "text": request_text(messages),
        "request_id": row.request_id,
        "ts": row.ts,
        "upstream": row.upstream,
        "answer_digest": row.digest,
        "corrected": said.correction is not None,
    }


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _write(out: Path, samples: list[dict[str, Any]], with_signature: bool) -> None:
    for sample in samples:
        sample["signature"] = signature(sample["text"]) if with_signature else []
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(pa.Table.from_pylist(samples, schema=SCHEMA), tmp)
    tmp.replace(out)
