"""Logged requests asked again: which rows count, what the first is asked, and the command over all of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cli.cascade import app
from contracts.cascade import CascadeFields, Signal
from contracts.errors import ConfigError, DataError, EngineError, NotFoundError
from contracts.traffic import Upstream
from serve.cascade.replay import First, Row, items_of, rows_of
from serve.router.client import HttpClient
from serve.router.config import RouterConfig
from serve.router.pool import Pools
from tests.unit.fake_openai import FakeOpenAI, serving

CHAT = "/v1/chat/completions"
MEAN, LEAST, MARGIN, SAME = (
    Signal.MEAN_LOGPROB, Signal.MIN_LOGPROB, Signal.MARGIN, Signal.SELF_CONSISTENCY
)  # fmt: skip


def asks(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": str(number)}]


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A line of the log: the teacher answered `number` to a request about it."""
    return {
        "request_id": f"r{number}", "ts": float(number), "route": "support", "endpoint": CHAT,
        "arm": "stable", "served_arm": "stable", "reason": "random", "unit_kind": "header",
        "unit_hash": "0" * 16, "split_version": 1, "upstream": "teacher", "model": "big", "stream": True,
        "status": 200, "outcome": "ok", "e2e_s": 1.0, "overhead_s": 0.0, "response_text": f"yes {number}",
        "request": {"model": "support", "messages": asks(number), "stream": True},
        **changes,
    }  # fmt: skip


def written(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"requests-{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


class Student(FakeOpenAI):
    """Answers 'yes N' to request N; unsure, and wrong, about every tenth."""

    def __init__(self) -> None:
        super().__init__(chat=self.say)

    def say(self, body: dict[str, Any]) -> list[str]:
        number = int(body["messages"][0]["content"])
        return ["no" if number % 10 == 0 else f"Yes  {number}"] * body.get("n", 1)

    def _said(self, body: dict[str, Any]) -> Any:
        from aiohttp import web

        number = int(body["messages"][0]["content"])
        logprob = -0.9 if number % 10 == 0 else -0.01 - 1e-6 * number
        tops = [{"token": "a", "logprob": logprob}, {"token": "b", "logprob": -1.0}]
        token = {**tops[0], "top_logprobs": tops[: body.get("top_logprobs", 0)]}
        content = [token] * 3
        told = {"content": content} if body.get("logprobs") else None
        choices = [{"message": {"content": text}, "logprobs": told} for text in self.say(body)]
        return web.json_response({"choices": choices})


@pytest.fixture
def student() -> Iterator[Student]:
    with serving(Student()) as fake:
        yield fake  # type: ignore[misc]


def test_which_rows_count(tmp_path: Path) -> None:
    """Whole answers of the second on this route that a signal could judge, the latest ones, and no others."""
    written(tmp_path, "20260101-a", *(row(i) for i in range(3)))
    others = [
        row(10, route="other"), row(11, upstream="student"), row(12, outcome="timeout"),
        row(13, log_mode="redacted"), row(14, response_text=None), row(15, served_arm="fallback"),
        row(16, endpoint="/v1/messages"), row(17, request={"model": "support", "n": 2, "messages": []}),
    ]  # fmt: skip
    written(tmp_path, "20260102-a", *others, row(3), row(4))
    (tmp_path / "requests-20260103-a.open.jsonl").write_text(
        json.dumps(row(5)) + "\n" + '{"route": "support", '
    )
    found = rows_of(tmp_path, "support", "teacher", [MEAN], 100)
    assert [r.answer for r in found] == [f"yes {i}" for i in (5, 4, 3, 2, 1, 0)]
    assert [r.answer for r in rows_of(tmp_path, "support", "teacher", [MEAN], 2)] == ["yes 5", "yes 4"]
    with pytest.raises(DataError, match="holds no answer of 'nobody' on route 'support'"):
        rows_of(tmp_path, "support", "nobody", [MEAN], 100)


def asked(student: Student, rows: list[Row], wanted: list[Signal], **fields: Any) -> list[Any]:
    pools = Pools(RouterConfig(state_url="sqlite://"))
    upstream = Upstream(name="student", model="small", url=student.url)

    async def run() -> list[Any]:
        http = HttpClient(5.0)
        first = First(
            upstream, CascadeFields(threshold=-0.1, **fields), http, pools, {"temperature": 0, "seed": 3}
        )
        try:
            return await first.answers(rows, wanted, 4)
        finally:
            http.close()

    return asyncio.run(run())


def rows_about(*numbers: int) -> list[Row]:
    return [Row(CHAT, row(n)["request"], row(n)["response_text"]) for n in numbers]


def test_the_first_is_asked_as_the_router_asks_it(student: Student) -> None:
    """Its own model name, the route's defaults, whole answers; every signal of one answer."""
    answers = asked(student, rows_about(1, 10), [MEAN, LEAST, MARGIN, SAME], samples=2)
    assert answers[0].text == "Yes  1"
    assert answers[0].signals == pytest.approx(
        {MEAN: -0.010001, LEAST: -0.010001, MARGIN: 0.989999, SAME: 1.0}
    )
    assert answers[1].signals[MARGIN] == pytest.approx(0.1)
    whole = next(b for b in student.asked if b.get("logprobs"))
    assert (whole["model"], whole["stream"], whole["top_logprobs"]) == ("small", False, 2)
    assert (whole["temperature"], whole["seed"]) == (0, 3)
    samples = next(b for b in student.asked if b.get("n"))
    assert (samples["n"], samples["temperature"]) == (2, 0.7)
    items, left_out = items_of(rows_about(1, 10), answers, None)
    assert ([(i.first, i.then) for i in items], left_out) == ([(1.0, 1.0), (0.0, 1.0)], 0)


def test_a_grader_says_what_is_right_and_may_abstain(student: Student) -> None:
    """Both answers are graded; a row without a grade of either is left out and counted."""

    def grade(request: dict[str, Any], text: str) -> float | None:
        number = int(request["messages"][0]["content"])
        return None if number == 2 else float(text.casefold().split() == ["yes", str(number)])

    rows = rows_about(1, 2, 10)
    items, left_out = items_of(rows, asked(student, rows, [MEAN]), grade)
    assert ([(i.first, i.then) for i in items], left_out) == ([(1.0, 1.0), (0.0, 1.0)], 1)


def test_a_few_failures_are_left_out_and_many_are_an_error(student: Student) -> None:
    """An answer lost here and there is no reason to begin again; a first that is down is."""
    student.failures = [(500, {})] * 3
    answers = asked(student, rows_about(*range(1, 10)), [MEAN])
    assert sum(a is None for a in answers) == 3
    student.failures = [(500, {})] * 40
    with pytest.raises(ExceptionGroup) as failed:
        asked(student, rows_about(*range(1, 40)), [MEAN])
    assert failed.group_contains(EngineError, match="upstream student: answered 500")


def stack(folder: Path, url: str) -> Path:
    file = folder / "stack.yaml"
    config = {
        "run_dir": str(folder / "run"),
        "upstreams": {
            "teacher": {"url": "http://127.0.0.1:9", "model": "big"},
            "student": {"url": url, "model": "small"},
            "smart": {"cascade": {"first": "student", "then": "teacher", "threshold": -0.5}},
        },
        "routes": {"support": "teacher"},
    }
    file.write_text(yaml.safe_dump(config))
    return file


def test_the_command_finds_the_threshold_and_writes_it_down(tmp_path: Path, student: Student) -> None:
    """From a log to a threshold between what the student knows and what it does not, as JSON and picture."""
    file = stack(tmp_path, student.url)
    written(tmp_path / "run" / "requests", "20260101-a", *(row(i) for i in range(500)))
    args = ["calibrate", "support", "smart", "--config", str(file), "--target", "0.99", "--confidence", "0.9"]
    done = CliRunner().invoke(app, args, catch_exceptions=False)
    assert done.exit_code == 0
    assert "with confidence 90 % at least 99 % of its quality is kept" in " ".join(done.output.split())
    found = json.loads((tmp_path / "run" / "cascades" / "support-smart.json").read_text())
    assert found["rows"] == 500
    assert -0.0106 < found["best"]["threshold"] <= -0.0102
    assert found["best"]["calls"] == pytest.approx(0.1, abs=0.05)
    assert found["best"]["kept"] == 1.0
    assert found["first"] == pytest.approx(0.9, abs=0.05)
    assert "<svg" in (tmp_path / "run" / "cascades" / "support-smart.svg").read_text()
    as_json = CliRunner().invoke(app, [*args, "--json", "--signal", "margin"], catch_exceptions=False)
    assert json.loads(as_json.output)["signal"] == "margin"


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["nobody", "smart"], NotFoundError, "no route 'nobody'; there are: support"),
        (["support", "teacher"], NotFoundError, "no cascade 'teacher'; there are: smart"),
        (["support", "smart", "--grader", "nobody"], ConfigError, "--grader: 'nobody' is no grader"),
        (["support", "smart", "--signal", "grader"], ConfigError, "the cascade names no grader"),
        (["support", "smart", "--target", "0.999"], DataError, "too few requests: 300"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    tmp_path: Path, student: Student, args: list[str], error: type[Exception], message: str
) -> None:
    """Each with the option, what there is, or how many requests it takes; nothing is written."""
    file = stack(tmp_path, student.url)
    written(tmp_path / "run" / "requests", "20260101-a", *(row(i) for i in range(300)))
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, ["calibrate", *args, "--config", str(file)], catch_exceptions=False)
    assert not (tmp_path / "run" / "cascades").exists()
