"""What a log policy keeps of a request: the stricter of two, whole conversations, and no text in metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.redaction import Redactor
from contracts.routes import LogPolicy
from contracts.traffic import LogMode, Outcome, RequestRow, hash_unit
from serve.request_log import RequestLog, SegmentWriter
from serve.request_log.policy import effective, metadata_only, mode_of
from tests.unit.test_request_log import Drafted, Hooks, by, opened, row, rows_in

ORDER = [LogMode.OFF, LogMode.METADATA, LogMode.REDACTED, LogMode.FULL]
policies = st.builds(LogPolicy, mode=st.sampled_from(ORDER), sample=st.floats(0, 1))


@given(policies, policies)
def test_the_stricter_of_two_policies_holds(route: LogPolicy, key: LogPolicy) -> None:
    """Neither a route nor a key can make the log keep more than the other allows."""
    both = effective(route, key)
    assert ORDER.index(both.mode) == min(ORDER.index(route.mode), ORDER.index(key.mode))
    assert both.sample == min(route.sample, key.sample)
    assert both == effective(key, route)
    assert effective(route, None) == route


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_sample_only_adds_conversations(unit: str, low: float, high: float) -> None:
    """What is logged at a share is logged at every larger one, and everything at 1, nothing at 0."""
    low, high = sorted((low, high))
    small, large = (mode_of(LogPolicy(sample=s), hash_unit(unit)) for s in (low, high))
    assert not (small is LogMode.FULL and large is LogMode.OFF)
    assert mode_of(LogPolicy(sample=1.0), hash_unit(unit)) is LogMode.FULL
    assert mode_of(LogPolicy(sample=0.0), hash_unit(unit)) is LogMode.OFF


def test_a_sample_is_its_share_of_the_conversations() -> None:
    """A tenth means a tenth, and the highest hash there is belongs to nothing but the whole."""
    kept = sum(
        mode_of(LogPolicy(sample=0.1), hash_unit(f"conversation {i}")) is LogMode.FULL for i in range(5000)
    )
    assert kept == pytest.approx(500, abs=75)
    assert mode_of(LogPolicy(sample=0.999999), "f" * 16) is LogMode.OFF
    assert mode_of(LogPolicy(sample=1.0), "f" * 16) is LogMode.FULL


SECRET = "sesame-7319"
BODY: dict[str, Any] = {
    "model": "support",
    "messages": [
        {"role": "system", "content": SECRET},
        {"role": "user", "content": [{"type": "text", "text": SECRET}]},
        {"role": SECRET, "content": "x", "tool_calls": [{"function": {"arguments": SECRET, SECRET: 1}}]},
    ],
    "temperature": 0.5,
    "stream": True,
    "stream_options": {"include_usage": True, "note": SECRET},
    "stop": [SECRET],
    "user": SECRET,
    "metadata": {"note": SECRET},
    "tools": [{"function": {"description": SECRET}}],
    "prompt": SECRET,
    "reasoning_effort": "low",
    "unheard_of": {"deep": [SECRET]},
}


def test_metadata_holds_no_text_but_its_size() -> None:
    """No string of a person is left anywhere in the row; parameters, sizes, usage and ids are."""
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    answer = {"id": "c1", "model": "big", "usage": usage, "choices": [{"message": {"content": SECRET}}]}
    full = row(1, text=SECRET).model_copy(
        update={"request": BODY, "response": answer, "error": SECRET, "prompt_tokens": 3}
    )
    kept = metadata_only(full)
    assert SECRET not in kept.model_dump_json()
    assert kept.log_mode is LogMode.METADATA
    assert kept.request["messages"] == [
        {"role": "system", "chars": 11},
        {"role": "user", "chars": 11 + len("text")},
        {"role": None, "chars": 1 + 11},
    ]
    assert (kept.request["model"], kept.request["temperature"], kept.request["stream"]) == (
        "support", 0.5, True,
    )  # fmt: skip
    assert kept.request["reasoning_effort"] == "low"
    assert kept.request["stream_options"] == {"include_usage": True}
    assert kept.request["prompt"] == {"chars": 11}
    assert kept.response == {"id": "c1", "model": "big", "usage": usage}
    assert (kept.response_text, kept.response_chars, kept.prompt_tokens) == (None, 11, 3)
    assert RequestRow.model_validate_json(kept.model_dump_json()) == kept


def test_off_writes_nothing_and_still_grades(tmp_path: Path) -> None:
    """Evidence must not depend on what is logged: every answer is graded, with its whole text."""
    seen: list[str] = []

    def grader(request: dict[str, Any], text: str) -> float:
        seen.append(text)
        return 1.0

    log, hooks = opened(tmp_path, graders=[by(grader)])
    for mode in ORDER:
        log.submit(Drafted(row(1, text=SECRET), mode))
    assert log.close()
    assert seen == [SECRET] * 4
    assert hooks.seen == {"grade 1": 4, "written": 3}
    assert [(r["log_mode"], r["scores"]["grade"]) for r in rows_in(tmp_path)] == [
        ("metadata", 1.0), ("redacted", 1.0), ("full", 1.0),
    ]  # fmt: skip


def test_off_without_a_grader_is_not_even_built(tmp_path: Path) -> None:
    """A route that is not logged costs nothing."""

    class Unbuilt(Drafted):
        def build(self) -> RequestRow:
            raise AssertionError("built")

    log, hooks = opened(tmp_path)
    log.submit(Unbuilt(row(1), LogMode.OFF))
    assert log.close()
    assert (hooks.seen, list(tmp_path.iterdir())) == ({}, [])


def test_a_detector_that_fails_costs_the_texts_and_leaks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The row is written as metadata and counted; the detector's message, which quotes the text, is not."""

    def broken(text: str) -> list[tuple[int, int, str]]:
        raise ValueError(f"cannot read {text}")

    hooks = Hooks()
    writer = SegmentWriter(tmp_path, "h-1-ab", 10**9, 3600)
    log = RequestLog(writer, hooks, 100, redactor=Redactor([broken]))
    log.start()
    log.submit(Drafted(row(1, text=SECRET).model_copy(update={"request": BODY}), LogMode.REDACTED))
    assert log.close()
    (written,) = rows_in(tmp_path)
    assert (written["log_mode"], SECRET in json.dumps(written)) == ("metadata", False)
    assert hooks.seen == {"unredacted": 1, "written": 1}
    assert "ValueError" in caplog.text
    assert SECRET not in caplog.text


def test_failed_requests_are_kept_under_every_mode(tmp_path: Path) -> None:
    """An upstream's error has no text to grade or redact, and its row is written all the same."""
    log, _ = opened(tmp_path)
    for mode in ORDER[1:]:
        log.submit(Drafted(row(1, text=None, outcome=Outcome.UPSTREAM_ERROR), mode))
    assert log.close()
    assert [r["outcome"] for r in rows_in(tmp_path)] == ["upstream_error"] * 3
