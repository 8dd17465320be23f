"""Log lines: one format everywhere, with request ids, without texts and secrets, off the caller's path."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from contracts import logs
from contracts.errors import ConfigError, StateError
from contracts.logs import LogConfig, about
from contracts.masking import is_secret, mask, masked
from contracts.traffic import Arm, Outcome
from serve.router.lines import RequestLines

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hunter2hunter2"
TEXT = "my knee hurts since Tuesday"
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[Lines]:
    """Logging of a process as it is set up for real, into memory; call it for the lines so far."""
    out = io.StringIO()
    before = logging.getLogger("serve").level
    listener = logs.start(getattr(request, "param", LogConfig(level="info")), "router", ("serve",), out)

    def written() -> list[dict[str, Any]]:
        logs._stop(listener)
        return [json.loads(line) for line in out.getvalue().splitlines()]

    yield written
    logs._stop(listener)
    logger = logging.getLogger("serve")
    logger.handlers.clear()
    logger.setLevel(before)
    logger.propagate = True


def exchange(outcome: Outcome = Outcome.OK, e2e_s: float = 0.1, trace: int | None = None) -> Any:
    """What lines are made of, of a request that said something private."""
    return SimpleNamespace(
        request_id="req-7",
        route=SimpleNamespace(split=SimpleNamespace(route="support")),
        assignment=SimpleNamespace(arm=Arm.CANARY),
        served=SimpleNamespace(name="student-v1"),
        endpoint="/v1/chat/completions",
        body={"messages": [{"content": TEXT}]},
        error=TEXT,
        outcome=outcome,
        status=502 if outcome.failed else 200,
        fell_back=False,
        e2e_s=e2e_s,
        ttft_s=None,
        key_id="team-1",
        span=None if trace is None else SimpleNamespace(trace_id=trace),
    )


def test_a_failed_request_has_one_line_with_its_ids_and_no_texts(lines: Lines) -> None:
    """Who, where, how it ended, how long it took; never what was said."""
    RequestLines(LogConfig()).ended(exchange(Outcome.UPSTREAM_ERROR, trace=0xABC))
    (line,) = lines()
    assert {k: line[k] for k in ("level", "process", "message", "request_id", "route", "arm", "status")} == {
        "level": "warning", "process": "router", "message": "request failed", "request_id": "req-7",
        "route": "support", "arm": "canary", "status": 502,
    }  # fmt: skip
    assert line["trace_id"] == f"{0xABC:032x}"
    assert (line["outcome"], line["upstream"], line["key"]) == ("upstream_error", "student-v1", "team-1")
    assert TEXT not in json.dumps(line)


def test_only_failed_and_slow_requests_have_lines(lines: Lines) -> None:
    """One that went well costs two comparisons; a slow one is told without being a warning."""
    said = RequestLines(LogConfig(slow_request_s=5.0))
    said.ended(exchange(e2e_s=4.9))
    said.ended(exchange(Outcome.CLIENT_ERROR))
    said.ended(exchange(e2e_s=5.1))
    RequestLines(LogConfig(slow_request_s=None)).ended(exchange(e2e_s=1e6))
    assert [(one["level"], one["message"]) for one in lines()] == [("info", "request slow")]


def test_a_storm_of_failures_is_told_in_few_lines(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream that is away must not make a router write a line a request; what is left out is counted."""
    now = [100.0]
    monkeypatch.setattr("serve.router.lines.time.monotonic", lambda: now[0])
    said = RequestLines(LogConfig(request_lines_per_s=3))
    for _ in range(1000):
        said.ended(exchange(Outcome.UPSTREAM_ERROR))
    now[0] += 1.0
    said.ended(exchange(Outcome.UPSTREAM_ERROR))
    found = lines()
    assert len(found) == 4
    assert [one.get("left_out") for one in found] == [None, None, None, 997]


def test_of_a_foreign_exception_only_type_and_places_are_kept(lines: Lines) -> None:
    """A validation error quotes its input, which may be somebody's text; our own are written to be read."""
    log = logging.getLogger("serve.x")
    try:
        LogConfig.model_validate({"level": TEXT})
    except ValidationError:
        log.exception("it failed", extra=about("req-1"))
    try:
        raise StateError("postgresql://me:hunter2hunter2@db/x cannot be opened")
    except StateError:
        log.exception("the store failed")
    foreign, own = lines()
    assert foreign["exception"]["type"] == "ValidationError"
    assert "test_logs.py" in foreign["exception"]["at"][0]
    assert TEXT not in json.dumps(foreign)
    assert foreign["request_id"] == "req-1"
    assert own["exception"]["message"] == "postgresql://***@db/x cannot be opened"


def test_messages_and_fields_are_searched_for_secrets(lines: Lines) -> None:
    """Whatever an error message of a library carries along."""
    logging.getLogger("serve.x").error(
        "cannot ask %s",
        f"https://u:{SECRET}@h/x?api_key={SECRET}",
        extra=about(None, note=f"Bearer {SECRET}"),
    )
    (line,) = lines()
    assert SECRET not in json.dumps(line)
    assert line["note"] == "Bearer ***"


def test_lines_are_made_in_another_thread() -> None:
    """The caller, an event loop that serves, only puts the record into a queue."""
    threads = []

    class Slow:
        def __str__(self) -> str:
            threads.append(threading.current_thread())
            return "slow"

    out = io.StringIO()
    # Begun here: where a logger passes nothing on when a test begins, pytest adds a handler of its own.
    listener = logs.start(LogConfig(), "router", ("serve.threads",), out)
    logging.getLogger("serve.threads").warning("%s", Slow())
    logs._stop(listener)
    logging.getLogger("serve.threads").handlers.clear()
    assert [json.loads(line)["message"] for line in out.getvalue().splitlines()] == ["slow"]
    assert threads
    assert threading.current_thread() not in threads


def test_text_on_a_terminal_json_elsewhere() -> None:
    """`auto` looks where lines go; both say the request's id."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, as_json in ((Terminal(), False), (io.StringIO(), True)):
        listener = logs.start(LogConfig(), "admin", ("serve.tty",), out)
        logging.getLogger("serve.tty").info("hello", extra=about("req-9"))
        logs._stop(listener)
        logging.getLogger("serve.tty").handlers.clear()
        if as_json:
            assert json.loads(out.getvalue())["request_id"] == "req-9"
        else:
            assert out.getvalue().endswith("INFO serve.tty: hello request_id=req-9\n")


def test_starting_again_replaces_what_was_set_up() -> None:
    """A replica that is made twice in one process writes each line once, at the later level."""
    first, second = io.StringIO(), io.StringIO()
    listeners = [logs.start(LogConfig(level="info"), "a", ("serve.twice",), first)]
    listeners.append(logs.start(LogConfig(level="error"), "b", ("serve.twice",), second))
    logging.getLogger("serve.twice").warning("quiet")
    logging.getLogger("serve.twice").error("loud")
    for one in listeners:
        logs._stop(one)
    logging.getLogger("serve.twice").handlers.clear()
    assert first.getvalue() == ""
    assert [json.loads(line)["message"] for line in second.getvalue().splitlines()] == ["loud"]


def test_a_level_of_the_command_line_wins_and_is_checked() -> None:
    """A mistyped one is an error that names what there is."""
    assert logs.levelled(LogConfig(), None).level == "info"
    assert logs.levelled(LogConfig(), "DEBUG").level == "debug"
    with pytest.raises(ConfigError, match="--log-level"):
        logs.levelled(LogConfig(), "loud")


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql+psycopg://me:{SECRET}@db:5432/x",
        f"s3://AKIA:ab/{SECRET}/cd@bucket/x",
        f"Authorization: Bearer {SECRET}",
        f"Authorization: Basic {SECRET}",
        "sk-sh-abcdefghijklmnop",
        f'{{"api_key": "{SECRET}"}}',
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"password = '{SECRET}'",
        "ghp_abcdefghijklmnopqrst",
        "AKIAABCDEFGHIJKLMNOP",
        "eyJhbGciOiJI.eyJzdWIiOiIx.abcdefgh",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_secrets_of_known_forms_are_masked(text: str) -> None:
    """By pattern, wherever they stand in a text."""
    found = mask(f"before {text} after")
    for secret in (SECRET, "abcdefghijklmnop", "AKIAABCDEFGHIJKLMNOP", "eyJhbGciOiJI"):
        assert secret not in found
    assert found.startswith("before ")


def test_what_is_no_secret_stays() -> None:
    """A bundle that masks everything helps nobody."""
    for text in (
        "http://127.0.0.1:8000/v1",
        "postgresql://db:5432/x",
        "max_tokens=512",
        "tokens: 12",
        "a@b.c",
    ):
        assert mask(text) == text
    kept = {"api_key_env": "KEY", "max_tokens": 5, "tokens_per_minute": 9, "keys": True, "url": "http://h/v1"}
    assert masked(kept) == kept
    assert masked({"password": "x", "deep": [{"Authorization": "y", "n": 1}]}) == {
        "password": "***", "deep": [{"Authorization": "***", "n": 1}],
    }  # fmt: skip
    assert [is_secret(n) for n in ("db_password", "monkey", "apiKey", "token", "max_tokens")] == [
        True, False, True, True, False,
    ]  # fmt: skip


def test_every_logger_of_ours_is_known_by_name() -> None:
    """In a Ray worker only loggers below these names are sent to our lines: one of another name is lost."""
    for file in [f for folder in ("serve", "registry", "contracts") for f in (ROOT / folder).rglob("*.py")]:
        for named in re.findall(r"getLogger\(\"([\w.]+)\"\)", file.read_text()):
            assert named.split(".")[0] in (*logs.OURS, "ray"), (file, named)
