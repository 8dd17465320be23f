"""One segment to samples: parse its lines, apply the filters, and write what is left, partitioned by digest.

Pure but for reading the segment and writing its part; runs in Ray Data's workers or in process. Knows nothing
about other segments: duplicates, ranking and splits are decided over all of them later.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from contracts.detectors import load_detectors
from contracts.plugins import load_function
from contracts.redaction import Redactor
from contracts.traffic import LogMode, Outcome, RequestRow
from distill_jobs.collecting.judgements import Judged, read_judged
from distill_jobs.collecting.parts import PartWriter, done, finish
from distill_jobs.collecting.rules import TextRules
from distill_jobs.collecting.window import Segment, lines, place
from distill_jobs.keys import sha256_of

CHAT = "chat"
NOT_JUDGED = Judged()
MAX_NAMED = 20
"""Malformed lines named by number in a segment's report."""

Config = dict[str, Any]
"""A CollectConfig as JSON values: what a worker gets."""


def parse_segment(task: dict[str, Any]) -> dict[str, Any]:
    """Filter a pinned segment into `task["out"]`; returns its counts. Done already: reads them back.

    `task` holds log_dir, segment, out, report, partitions, judged (a file) and config (a CollectConfig), all
    as JSON values.
    """
    finished = done(task)
    if finished is not None:
        return finished
    counts: Counter[str] = Counter()
    malformed: list[int] = []
    segment = Segment.model_validate(task["segment"])
    take = Taker(task["config"], segment, read_judged(Path(task["judged"])), counts)
    writer = PartWriter(Path(task["out"]), task["partitions"])
    for number, value in records(place(task["log_dir"]), segment):
        counts["read"] += 1
        try:
            row = _log_row(value) if segment.kind == "log" else _file_row(value, number, segment)
        except ValueError:  # pydantic's ValidationError, orjson's JSONDecodeError, and ours
            counts["malformed"] += 1
            malformed.append(number)
            continue
        sample = take(row)
        if sample is not None:
            writer.add(sample)
    writer.close()
    counts["kept"] = writer.written
    result = {"name": segment.name, "counts": dict(counts), "malformed_lines": malformed[:MAX_NAMED]}
    return finish(task, result)


def records(log_dir: Path | str, segment: Segment) -> Iterator[tuple[int, Any]]:
    """(number from 1, line or row) of a segment; empty lines are left out."""
    if segment.kind != "parquet":
        yield from ((n, line) for n, line in enumerate(lines(log_dir, segment), start=1) if line.strip())
        return
    import pyarrow.parquet as pq

    number = 0
    for batch in pq.ParquetFile(Path(segment.folder or ".") / segment.name).iter_batches(batch_size=4096):
        for row in batch.to_pylist():
            number += 1
            yield number, row


class Taker:
    """Turns one record after another into a sample, or counts why not."""

    def __init__(
        self, config: Config, segment: Segment, judged: dict[str, Judged], counts: Counter[str]
    ) -> None:
        self._from_log, self._source = segment.kind == "log", segment.source
        # A file's rows are taken as they are: no upstream answered them.
        self._config = config if self._from_log else config | {"upstreams": ()}
        self._judged, self._counts = judged, counts
        self._rules = TextRules(config["rules"])
        self._class = _classifier(config)
        self._redactor = None
        if config["redact"] is not None:
            names = config["redact"]["detectors"]
            self._redactor = Redactor(load_detectors(names, "collect.redact.detectors"))

    def __call__(self, row: RequestRow) -> dict[str, Any] | None:
        """The sample of a row; None when a rule drops it."""
        said = _heeded(self._judged.get(row.request_id), self._config) if self._from_log else NOT_JUDGED
        why = refusal(row, self._config, said) if self._from_log else file_refusal(row, self._config)
        if why is None and self._redactor is not None:
            row, said = self._redacted(self._redactor, row, said)
        sample = to_sample(row, self._config, said) if why is None else None
        if sample is not None:
            why = self._rules.broken(sample["text"], sample["answer"])
        if sample is None or why is not None:
            self._counts[str(why)] += 1
            return None
        self._counts["corrected"] += said.correction is not None
        sample["source"] = self._source
        sample["class"] = self._class(sample) if self._class is not None else None
        return sample

    def _redacted(self, redactor: Redactor, row: RequestRow, said: Judged) -> tuple[RequestRow, Judged]:
        clean = redactor.row(row)
        correction = None if said.correction is None else redactor.text(said.correction)
        changed = clean.request != row.request or answer_of(clean) != answer_of(row)
        self._counts["redacted"] += changed or correction != said.correction
        return clean, said._replace(correction=correction)


def _log_row(line: bytes) -> RequestRow:
    return RequestRow.model_validate(orjson.loads(line))


def _file_row(value: Any, number: int, segment: Segment) -> RequestRow:
    """A row of a source's file, as if it had been logged. Raises: ValueError."""
    row = orjson.loads(value) if isinstance(value, bytes) else value
    if not isinstance(row, dict):
        raise ValueError("a row is no object")
    request, answer = row.get("request"), row.get("answer")
    if isinstance(request, str):
        request = orjson.loads(request)
    if not isinstance(request, dict) or not (answer is None or isinstance(answer, str)):
        raise ValueError('a row is not {"request": {...}, "answer"?: "..."}')
    scores = row.get("scores") or {}
    if not isinstance(scores, dict) or not all(isinstance(s, int | float) for s in scores.values()):
        raise ValueError('"scores" is not {name: number}')
    return RequestRow.model_construct(
        request_id=f"{segment.source}/{segment.name}:{number}",
        ts=0.0,  # files have no time; of equal requests a logged answer is the later one
        route=segment.route or "",
        upstream=segment.source,
        request=_without_nulls(request) if segment.kind == "parquet" else request,
        response_text=answer,
        scores={name: float(score) for name, score in scores.items()},
    )


def _without_nulls(value: Any) -> Any:
    """A parquet struct names every field in every row; the ones that a request did not have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def file_refusal(row: RequestRow, config: Config) -> str | None:
    """The first rule that a source's row breaks; one without an answer waits for the teacher's."""
    if config["route"] is not None and row.route and row.route != config["route"]:
        return "other_route"
    if conversation(row.request) is None:
        return "not_text"
    if len(str(row.request.get("messages"))) + len(row.response_text or "") > config["max_chars"]:
        return "too_long"
    return None if row.response_text is None else _bad_text(row.response_text, config)


def _heeded(said: Judged | None, config: Config) -> Judged:
    """As much of a judgement as the configuration wants to hear."""
    if said is None:
        return NOT_JUDGED
    correction = said.correction if config["corrections"] else None
    return Judged(correction, said.good if config["drop_bad_feedback"] else None)


def refusal(row: RequestRow, config: Config, said: Judged = NOT_JUDGED) -> str | None:
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


def _bad_answer(row: RequestRow, config: Config) -> str | None:
    """What is wrong with a teacher's answer."""
    if row.outcome is not Outcome.OK:
        return "not_ok"
    if row.finish_reason != "stop":
        return "not_finished"
    if config["drop_failed_grades"] and 0.0 in row.scores.values() and answer_of(row):
        return "failed_grade"
    return _bad_text(answer_of(row), config)


def _bad_text(answer: str | None, config: Config) -> str | None:
    if not answer:
        return "no_text"
    if config["require_json"] and not _is_json(answer):
        return "not_json"
    return None


def _by_other(row: RequestRow, config: Config) -> bool:
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


def logprob_of(row: RequestRow) -> float | None:
    """Mean log-probability of the answer's tokens, where the whole response was logged with `logprobs`."""
    try:
        tokens = row.response["choices"][0]["logprobs"]["content"]  # type: ignore[index]
        return sum(float(t["logprob"]) for t in tokens) / len(tokens)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        return None


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


def to_sample(row: RequestRow, config: Config, said: Judged = NOT_JUDGED) -> dict[str, Any]:
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
        "route": row.route,
        "source": "log",
        "score": row.scores.get(config["rank"]["score"]) if config["rank"] is not None else None,
        "class": None,
        "logprob": None if row.response is None or said.correction is not None else logprob_of(row),
    }


def _classifier(config: Config) -> Callable[[dict[str, Any]], str | None] | None:
    """The class of a sample, as `balance.classes` names it."""
    if config["balance"] is None:
        return None
    module, _, field = config["balance"]["classes"].partition(":")
    if module == "json":
        return partial(_class_field, field.split("."))
    return partial(_class_by, load_function(config["balance"]["classes"], "collect.balance.classes"))


def _class_field(path: list[str], sample: dict[str, Any]) -> str | None:
    try:
        value = orjson.loads(sample["answer"] or "null")
    except orjson.JSONDecodeError:
        return None
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) or value is None else orjson.dumps(value).decode()


def _class_by(function: Callable[..., Any], sample: dict[str, Any]) -> str | None:
    found = function(orjson.loads(sample["request"]), sample["answer"])
    return None if found is None else str(found)


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
