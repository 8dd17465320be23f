"""collect and what users said: corrections become labels, bad answers go, all of it counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import DataError
from distill_jobs.collecting.judgements import Judged
from distill_jobs.collecting.rows import refusal
from distill_jobs.collecting.window import pin_window
from distill_jobs.stage import Result
from tests.integration.pipeline_world import log_row
from tests.unit.test_collect import chat, collect, row, settings


def judgement(number: int, at: float = 1.0, name: str | None = None, **said: Any) -> str:
    """A line of a feedback segment, as the router writes it."""
    request_id = f"r{number:05d}"
    fields = {
        "id": name or request_id,
        "request_id": request_id,
        "ts": at,
        "route": "support",
        "arm": "stable",
    }
    return json.dumps({**fields, "split_version": 1, "log_mode": "full", **said})


def judged(tmp_path: Path, *lines: str, **config: Any) -> tuple[Result, dict[str, Any]]:
    """Collect eight requests with these judgements; returns the result and the answers by request id."""
    (tmp_path / "logs").mkdir()
    for number, line in enumerate(lines):  # each in a segment of its own, the later ones first by name
        (tmp_path / "logs" / f"feedback-{9 - number}.jsonl").write_text(line + "\n")
    rows = [json.dumps(log_row(n, chat(f"request {n} {n * 7919}"), response_text=f"a{n}")) for n in range(8)]
    result, sides = collect(tmp_path, rows, validation=0, calibration=0, near_duplicates=None, **config)
    return result, {r["request_id"]: r["answer"] for r in sides["train"]}


def test_a_correction_takes_the_place_of_the_answer(tmp_path: Path) -> None:
    """The last correction of a request is its label; a later thumb or comment leaves it."""
    result, answers = judged(
        tmp_path,
        judgement(1, 1.0, correction="first"),
        judgement(1, 3.0, "second person", correction="last ключ"),
        judgement(1, 2.0, "third person", correction="middle"),
        judgement(1, 9.0, "fourth person", good=False, comment="no"),
        judgement(2, 5.0, correction="withdrawn"),
        judgement(2, 6.0, good=True),
        judgement(77, correction="of a request that was not logged"),
    )
    wanted = {f"r{n:05d}": f"a{n}" for n in range(8)} | {"r00001": "last ключ"}
    assert answers == wanted
    counts = result.counts
    assert (counts["judgements"], counts["corrected"], counts["train"], counts["segments"]) == (6, 1, 8, 1)


def test_a_bad_answer_is_dropped_unless_it_was_corrected_or_forgiven(tmp_path: Path) -> None:
    """`good: false` alone is dropped; the latest thumb counts; an empty correction is no answer."""
    result, answers = judged(
        tmp_path,
        judgement(0, good=False),
        judgement(1, 1.0, good=False),
        judgement(1, 2.0, "later", good=True),
        judgement(2, good=False, correction="right"),
        judgement(3, correction=""),
        judgement(4, score=0.0, comment="meh"),
    )
    assert answers == {f"r{n:05d}": f"a{n}" for n in (1, 4, 5, 6, 7)} | {"r00002": "right"}
    assert (result.counts["bad_feedback"], result.counts["no_text"], result.counts["corrected"]) == (1, 1, 1)


def test_feedback_can_be_left_unheard(tmp_path: Path) -> None:
    """Where anybody may send feedback, what is trained on can be the log alone."""
    lines = judgement(0, good=False), judgement(1, correction="poison")
    result, answers = judged(tmp_path, *lines, corrections=False, drop_bad_feedback=False)
    assert answers == {f"r{n:05d}": f"a{n}" for n in range(8)}
    assert (result.counts["judgements"], result.counts["corrected"]) == (2, 0)


@pytest.mark.parametrize(
    ("config", "changes", "correction", "rule"),
    [
        ({}, {"finish_reason": "length"}, "whole", None),
        ({}, {"outcome": "broken_stream"}, "whole", None),
        ({"upstreams": ("big",)}, {}, "a person's", None),
        ({"drop_failed_grades": True}, {"scores": {"grade": 0.0}}, "right", None),
        ({"require_json": True}, {}, "{}", None),
        ({"require_json": True}, {}, "not json", "not_json"),
        ({"max_chars": 90}, {"response_text": "x"}, "x" * 90, "too_long"),
        ({"route": "sales"}, {}, "x", "other_route"),
        ({}, {"log_mode": "metadata"}, "x", "texts_not_logged"),
    ],
)
def test_a_corrected_row_is_held_to_the_rules_of_its_new_text(
    config: dict[str, Any], changes: dict[str, Any], correction: str, rule: str | None
) -> None:
    """How the first answer ended no longer matters; what requests and texts must be does."""
    assert refusal(row(**changes), settings(**config), Judged(correction)) == rule


def test_a_bad_answer_of_another_upstream_is_still_relabelled() -> None:
    """Its text is thrown away anyway; the request that went wrong is the one worth asking the teacher."""
    config = settings(upstreams=("big",), other_answers="relabel")
    assert refusal(row(), config, Judged(good=False)) is None
    assert refusal(row(), settings(), Judged(good=False)) == "bad_feedback"


def test_malformed_feedback_costs_a_line(tmp_path: Path) -> None:
    """It is counted; a folder with feedback alone has no requests, and says so."""
    result, answers = judged(tmp_path, "{nonsense", '{"id": "f"}', judgement(0, correction="yes"))
    assert (result.counts["feedback_malformed"], answers["r00000"]) == (2, "yes")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "feedback-1.jsonl").write_text(judgement(1, good=True) + "\n")
    with pytest.raises(DataError, match="no request-log segments"):
        pin_window(tmp_path / "other", tmp_path / "w.json")
