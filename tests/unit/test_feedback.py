"""Feedback: what is accepted, what one judgement is, and which requests it may be about."""

from __future__ import annotations

import threading
import time
from typing import Any

import orjson
import pytest
from sqlalchemy import Engine

from contracts.errors import ConflictError
from contracts.feedback import Feedback
from contracts.routes import LogPolicy
from contracts.traffic import Arm, LogMode, Outcome, Split, UnitKind, Upstream, hash_unit
from serve.router.assign import assign
from serve.router.errors import RequestRefused
from serve.router.exchange import Exchange
from serve.router.feedback import parse_feedback, verdict_of
from serve.router.metrics import Metrics
from serve.router.served import ServedIds, rows_of
from serve.router.table import Route
from serve.state.feedback import FeedbackState, Served, Stored

SPLIT = Split(
    route="support", version=3, salt="s", stable=Upstream(name="t", model="big", url="http://127.0.0.1:9")
)


@pytest.fixture
def state(engine: Engine) -> FeedbackState:
    """An empty store."""
    return FeedbackState(engine)


def served(request_id: str, subjects: str = "", at: float = 100.0) -> Served:
    return Served(request_id, "support", "stable", "random", None, 3, "full", subjects, at)


def judgement(name: str, request_id: str = "r1", **fields: Any) -> Feedback:
    return Feedback(**{"id": name, "request_id": request_id, "ts": 100.0, "good": True, **fields})


def exchange(request_id: str, status: int = 200, **body: Any) -> Exchange:
    made = Exchange(
        request_id, "/v1/chat/completions", Route(SPLIT), assign(SPLIT, UnitKind.HEADER, "c1"), body, 0.0, b""
    )
    made.status, made.outcome = status, Outcome.OK
    return made


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"", None, "not valid JSON"),
        (b"[1]", None, "JSON object"),
        (b'{"good": true}', "request_id", "Field required"),
        (b'{"request_id": "r"}', None, "at least one of"),
        (b'{"request_id": "r", "good": "yes"}', "good", "valid boolean"),
        (b'{"request_id": "r", "score": 1.5}', "score", "less than or equal to 1"),
        (b'{"request_id": "r", "good": true, "ts": 1}', "ts", "Unknown field 'ts'"),
        (b'{"request_id": "r", "good": true, "id": ""}', "id", "at least 1 character"),
        (b'{"request_id": "r", "good": true, "id": "a\\u0000"}', "id", "printable"),
        (orjson.dumps({"request_id": "r", "comment": "x" * 10_001}), "comment", "at most 10000"),
        (orjson.dumps({"request_id": "r" * 129, "good": True}), "request_id", "at most 128"),
    ],
)
def test_a_wrong_judgement_is_refused_by_field(body: bytes, param: str | None, says: str) -> None:
    """Every mistake is a 400 in OpenAI's shape that names the field."""
    with pytest.raises(RequestRefused, match=says) as refused:
        parse_feedback(body, 5.0)
    assert refused.value.status == 400
    assert refused.value.body["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"good": True, "score": 0.1}, "good"),
        ({"good": False}, "bad"),
        ({"score": 1}, "scored"),
        ({"correction": "", "good": None}, "corrected"),
        ({"comment": "meh"}, "commented"),
    ],
)
def test_a_judgement_is_read_and_named(fields: dict[str, Any], verdict: str) -> None:
    """Its id is the request's unless the client gives one, its time is ours; nulls are as good as absent."""
    made = parse_feedback(orjson.dumps({"request_id": "r1", **fields}), 5.0)
    assert (made.id, made.ts, verdict_of(made)) == ("r1", 5.0, verdict)


def test_a_judgement_counts_once_and_the_later_one_holds(state: FeedbackState) -> None:
    """A retry changes nothing, a change of mind replaces, and an id belongs to one request."""
    assert state.store(judgement("a")) is Stored.NEW
    assert state.store(judgement("a", ts=200.0)) is Stored.SAME
    assert state.store(judgement("a", ts=300.0, good=False)) is Stored.CHANGED
    assert state.store(judgement("b", comment="also this", ts=400.0)) is Stored.NEW
    assert [(f.id, f.good, f.ts) for f in state.feedback_on(["r1"])] == [
        ("a", False, 300.0),
        ("b", True, 400.0),
    ]
    with pytest.raises(ConflictError, match="another request"):
        state.store(judgement("a", request_id="r2"))


def test_one_id_from_many_routers_at_once_is_one_judgement(state: FeedbackState) -> None:
    """Retries that race each other through several routers are counted once."""
    results: list[Stored] = []
    threads = [threading.Thread(target=lambda: results.append(state.store(judgement("a")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.value for r in results) == ["created"] + ["unchanged"] * 7


def test_served_requests_are_found_until_they_are_pruned(state: FeedbackState) -> None:
    """Writing twice is harmless, and what is too old is forgotten with what was said of it."""
    state.add_served([served("r1"), served("r2", at=200.0)])
    state.add_served([served("r1", at=900.0)])
    state.add_served([])
    assert state.find_served("r1") == served("r1")
    assert state.find_served("nobody") is None
    state.store(judgement("a"))
    assert state.prune(before=150.0) == 2
    assert (state.find_served("r1"), state.find_served("r2")) == (None, served("r2", at=200.0))
    assert state.feedback_on(["r1"]) == []


def test_served_requests_come_back_as_they_were(state: FeedbackState) -> None:
    """They go in as one JSON parameter: quotes, backslashes, other scripts, floats and None survive."""
    odd = served("r'1\"\\ü漢")._replace(
        rollout_id=None, subjects='user:0 conversation:"1"', at=1795702920.2575834
    )
    state.add_served([odd, served("r2")._replace(rollout_id="x", split_version=2**31 - 1)])
    assert state.find_served(odd.request_id) == odd
    assert state.find_served("r2") == served("r2")._replace(rollout_id="x", split_version=2**31 - 1)


def test_erasing_forgets_requests_and_judgements(state: FeedbackState) -> None:
    """By request, or by whose it was: nothing of it is left, and feedback on it is refused from then on."""
    state.add_served(
        [
            served("r1", "conversation:aa user:bb"),
            served("r2", "user:bb"),
            served("r3", "user:b_"),
            served("r4"),
        ]
    )
    for number in range(1, 5):
        state.store(judgement(f"f{number}", f"r{number}"))
    assert state.erase(subject="user:bb") == 2
    assert state.erase(request_id="r4") == 1
    assert state.erase(subject="user:__") == 0
    left = [r for r in ("r1", "r2", "r3", "r4") if state.find_served(r)]
    assert (left, [f.id for f in state.feedback_on(["r1", "r2", "r3", "r4"])]) == (["r3"], ["f3"])


async def test_ids_are_found_before_they_are_stored_and_again_if_that_fails() -> None:
    """An id is known from the moment its answer ended; a store that is down loses none of the queue."""
    metrics = Metrics()
    ids = ServedIds(3, metrics)
    first = exchange("r1", user="ann")
    first.log_policy = LogPolicy(mode=LogMode.METADATA)
    ids.note(first)
    found = ids.find("r1")
    assert found is not None
    assert found._replace(at=0.0) == Served(
        "r1", "support", Arm.STABLE.value, "only_arm", None, 3, "metadata",
        f"user:{hash_unit('ann')} conversation:{hash_unit('c1')}", 0.0,
    )  # fmt: skip
    assert [row.request_id for row in rows_of(ids.cut())] == ["r1"]
    ids.note(exchange("r2"))
    assert ids.find("r1") is not None  # being written
    assert [row.request_id for row in rows_of(ids.cut())] == ["r1", "r2"]  # the first write failed
    ids.note(exchange("r3"))
    ids.note(exchange("r4"))
    assert ids.find("r4") is None
    assert b"stillhouse_served_ids_dropped_total 1.0" in await metrics.scrape()
    ids.stored()
    assert ids.find("r1") is None
    assert [row.request_id for row in rows_of(ids.cut())] == ["r3"]


def test_only_answers_can_be_judged() -> None:
    """An error has no answer; the beginning of a stream that its reader stopped is one."""
    ids = ServedIds(100, Metrics())
    ids.note(exchange("failed", status=502))
    stopped = exchange("stopped", status=499)
    stopped.streamed = True
    ids.note(stopped)
    vectors = exchange("vectors")
    vectors.endpoint = "/v1/embeddings"
    ids.note(vectors)
    assert [row.request_id for row in rows_of(ids.cut())] == ["stopped"]
    assert time.time() - 60 < rows_of(ids.cut())[0].at <= time.time()
