"""PromQL of a rollout against a scripted Prometheus: counts between two looks, and never a pass out of
nothing."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import pytest

from contracts.errors import ConfigError
from contracts.grading import PrometheusConfig
from contracts.metrics import MetricKind, MetricSpec, QuerySpec
from contracts.rollout import RolloutSpec, RolloutStatus, Step
from contracts.traffic import Split, Upstream
from serve.rollout.observation import QueryReading
from serve.rollout.prometheus import Problem, Prometheus
from serve.rollout.queries import CURSOR, QueryReader, check_queries, fill

Answer = Callable[[str, float], Any]
COUNTERS = QuerySpec(
    bad='sum(bad{arm="{{arm}}",up="{{ upstream }}"})', total='sum(all{arm="{{arm}}",route="{{route}}"})'
)
STABLE = Upstream(name="teacher", model="m", url="http://t:1")
CANARY = Upstream(name="student", model="m", url="http://s:1")
SPLIT = Split(route="support", version=2, salt="s", stable=STABLE, canary=CANARY, weight=0.1, rollout_id="r")


def vector(*values: object) -> dict[str, Any]:
    """A successful answer of as many series as there are values."""
    result = [{"metric": {"i": str(i)}, "value": [0, str(v)]} for i, v in enumerate(values)]
    return {"status": "success", "data": {"resultType": "vector", "result": result}}


class FakePrometheus:
    """Answers every query with what `answer` makes of (query, time): JSON, bytes, or (status, JSON)."""

    def __init__(self) -> None:
        self.answer: Answer = lambda _query, _at: vector(1)
        self.asked: list[tuple[str, float]] = []
        self.headers: list[dict[str, str]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
                query, at = form["query"][0], float(form["time"][0])
                fake.asked.append((query, at))
                fake.headers.append({k.lower(): v for k, v in self.headers.items()})
                said = fake.answer(query, at)
                status, said = said if isinstance(said, tuple) else (200, said)
                body = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePrometheus]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = FakePrometheus()
    yield made
    made.close()


def config(fake: FakePrometheus, **fields: Any) -> PrometheusConfig:
    return PrometheusConfig(**{"url": f"{fake.url}/", "lag_s": 10.0, **fields})


def spec(query: QuerySpec = COUNTERS) -> RolloutSpec:
    metric = MetricSpec(kind=MetricKind.QUERY, name="bounced", margin=0.02, query=query)
    return RolloutSpec(
        id="r", route="support", model_ref="m:1", candidate=CANARY, steps=(Step(weight=0.1),),
        metrics=(metric,), created_at=0.0,
    )  # fmt: skip


def look(
    fake: FakePrometheus, now: float, query: QuerySpec = COUNTERS, split: Split = SPLIT, **status: Any
) -> tuple[QueryReading, dict[str, int]]:
    """One look, of a step that began at second 1000 unless told otherwise."""
    reader = QueryReader(config(fake))
    readings, cursor = reader.read(
        spec(query), RolloutStatus(**{"id": "r", "step_since": 1000.0, **status}), split, now
    )
    reader.close()
    return readings["bounced"], cursor


def test_counts_are_what_counters_gained_since_the_last_look(fake: FakePrometheus) -> None:
    """Both arms at the same two instants, integers, windows that touch: three looks sum to the whole."""

    def answer(query: str, at: float) -> Any:
        per_s = {
            'sum(bad{arm="stable",up="teacher"})': 1, 'sum(all{arm="stable",route="support"})': 9,
            'sum(bad{arm="canary",up="student"})': 2, 'sum(all{arm="canary",route="support"})': 5,
        }[query]  # fmt: skip
        return vector(int(per_s * at))

    fake.answer = answer
    first, cursor = look(fake, now=1070.0)
    assert first == QueryReading(stable_total=540, stable_bad=60, canary_total=300, canary_bad=120)
    assert cursor == {CURSOR: 1_060_000}
    assert {at for _, at in fake.asked} == {1000.0, 1060.0}
    second, cursor = look(fake, now=1130.5, cursor=cursor)
    assert (second.stable_total, cursor) == (int(9 * 1120.5) - 9540, {CURSOR: 1_120_500})
    third, _ = look(fake, now=1190.0, cursor=cursor)
    assert first.stable_total + second.stable_total + third.stable_total == 9 * 180


def test_a_new_step_never_counts_what_was_before_it(fake: FakePrometheus) -> None:
    """Weights differ between steps; a window that spans two would mix them."""
    fake.answer = lambda _query, at: vector(int(at))
    reading, cursor = look(fake, now=1170.0, step_since=1100.0, cursor={CURSOR: 1_060_000})
    assert reading.stable_total == 60
    early, same = look(fake, now=1105.0, step_since=1100.0, cursor=cursor)
    assert early == QueryReading()
    assert same == cursor  # never backwards


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (vector(), r"returned nothing: is every metric and label in it named right\?"),
        (vector("NaN"), "is NaN: there is no data"),
        (vector("+Inf"), r"is \+Inf"),
        (vector(1, 2), "returned 2 series; make it one"),
        (vector("1.5"), "is 1.5, which is no count"),
        (vector(-1), "is -1, which is no count"),
        ({"status": "success", "data": {"resultType": "matrix", "result": []}}, "gives a matrix"),
        ({"status": "success", "data": {"resultType": "string", "result": [0, "x"]}}, "gives a string"),
        (
            {"status": "success", "data": {"resultType": "vector", "result": [{"histogram": []}]}},
            "has no value",
        ),
        (
            (400, {"status": "error", "errorType": "bad_data", "error": "parse error: unexpected )"}),
            "was refused: bad_data: parse error: unexpected",
        ),
        ((503, {"status": "error", "errorType": "timeout", "error": "query timed out"}), "timeout: query"),
        ((502, b"<html>bad gateway</html>"), "answered 502, and not as Prometheus does"),
        ((200, b"[]"), "not as Prometheus does"),
        ({"status": "success"}, "no reason given"),
    ],
)
def test_odd_answers_are_no_data_with_a_reason(fake: FakePrometheus, answer: Any, why: str) -> None:
    """Nothing, NaN, several series, errors: a sentence, and no figure that could pass for evidence."""
    fake.answer = lambda _query, _at: answer
    reading, _ = look(fake, now=1070.0)
    assert reading.problem is not None
    assert re.search(why, reading.problem), reading.problem
    assert (reading.stable_total, reading.canary_total, reading.value) == (0, 0, None)


def test_a_reset_counter_costs_the_look_and_invents_nothing(fake: FakePrometheus) -> None:
    """A sum that fell says that some replica began again; how much it had counted meanwhile nobody knows."""
    fake.answer = lambda query, at: (
        vector(5000 if at < 1050 else 80) if "canary" in query else vector(int(at))
    )
    reading, cursor = look(fake, now=1070.0)
    assert reading.problem is not None
    assert "fell from 5000 to 80: a counter was reset" in reading.problem
    assert (reading.stable_total, reading.canary_total) == (0, 0)
    after, _ = look(fake, now=1130.0, cursor=cursor)
    assert (after.problem, after.canary_total, after.stable_total) == (None, 0, 60)


def test_more_bad_than_all_is_a_mistake_in_the_queries(fake: FakePrometheus) -> None:
    """Two queries that do not belong together must not become a share above one."""
    fake.answer = lambda query, at: vector(int(at) * (2 if "bad" in query else 1))
    reading, _ = look(fake, now=1070.0)
    assert reading.problem == "stable: `bad` grew by 120 and `total` by 60; `bad` must be part of `total`."


def test_a_value_is_the_canarys_at_the_end_of_the_look(fake: FakePrometheus) -> None:
    """Scalars and one-series vectors are numbers; NaN is a problem, not a bound that was kept."""
    query = QuerySpec(value='q{arm="{{arm}}"} / 2', at_most=0.5)
    fake.answer = lambda _query, _at: vector(0.25)
    assert look(fake, 1070.0, query) == (QueryReading(value=0.25), {CURSOR: 1_060_000})
    assert fake.asked == [('q{arm="canary"} / 2', 1060.0)]
    scalar = {"status": "success", "data": {"resultType": "scalar", "result": [0, "3"]}}
    fake.answer = lambda _query, _at: scalar
    assert look(fake, 1070.0, query)[0].value == 3.0
    fake.answer = lambda _query, _at: vector("NaN")
    found, _ = look(fake, 1070.0, query)
    assert found.value is None
    assert found.problem is not None


def test_a_prometheus_that_is_down_is_waited_for_once(fake: FakePrometheus) -> None:
    """A controller of many rollouts must not wait at every query of every one of them; it asks again
    later."""
    clock = [0.0]
    dead = PrometheusConfig(url="http://127.0.0.1:9", timeout_s=0.2)
    asked = Prometheus(dead, monotonic=lambda: clock[0])
    with pytest.raises(Problem, match=r"http://127\.0\.0\.1:9 cannot be asked: .*refused"):
        asked.number("up", 1.0)
    object.__setattr__(dead, "url", fake.url)
    with pytest.raises(Problem, match="cannot be asked"):
        asked.number("up", 1.0)
    assert fake.asked == []
    clock[0] = 11.0
    assert asked.number("up", 1.0) == 1.0


def test_a_slow_prometheus_is_given_up(fake: FakePrometheus) -> None:
    """Its silence is a problem of that look, with the reason."""

    def slow(_query: str, _at: float) -> Any:
        time.sleep(1.0)
        return vector(1)

    fake.answer = slow
    with pytest.raises(Problem, match="cannot be asked: timed out"):
        Prometheus(config(fake, timeout_s=0.1)).number("up", 1.0)


def test_the_token_comes_from_the_environment(fake: FakePrometheus, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent, it is in no configuration; one that is missing is said by name."""
    monkeypatch.setenv("PROM_TOKEN", " secret\n")
    asked = Prometheus(config(fake, bearer_token_env="PROM_TOKEN"))
    asked.number("up", 1.0)
    assert fake.headers[-1]["authorization"] == "Bearer secret"
    monkeypatch.delenv("PROM_TOKEN")
    with pytest.raises(Problem, match="PROM_TOKEN is not set"):
        asked.number("up", 1.0)


def test_placeholders_are_known_by_name() -> None:
    """A misspelt one is an error with the right ones in it, not a label value that matches nothing."""
    fields = {"route": "r", "arm": "canary", "upstream": "u"}
    assert fill('x{a="{{arm}}"} + y{b="{{ upstream }}",c="{{route}}"}', fields) == (
        'x{a="canary"} + y{b="u",c="r"}'
    )
    with pytest.raises(ConfigError, match=r"no placeholder \{\{model\}\}; there are \{\{route\}\}"):
        fill('x{a="{{model}}"}', fields)


def test_a_rollout_does_not_start_on_queries_without_data(fake: FakePrometheus) -> None:
    """A misnamed metric would make it wait for its deadline; NaN is only a route without traffic yet."""
    metrics = spec().metrics
    check_queries(metrics, config(fake), SPLIT, 1000.0)
    assert [q for q, _ in fake.asked] == [
        'sum(all{arm="stable",route="support"})', 'sum(bad{arm="stable",up="teacher"})',
    ]  # fmt: skip
    fake.answer = lambda query, _at: vector() if "bad" in query else vector(1)
    with pytest.raises(ConfigError, match=r"metric bounced, query\.bad: .*named right.* or vector\(0\)"):
        check_queries(metrics, config(fake), SPLIT, 1000.0)
    fake.answer = lambda _query, _at: (400, {"status": "error", "errorType": "bad_data", "error": "parse"})
    with pytest.raises(ConfigError, match=r"query\.total: .*bad_data: parse"):
        check_queries(metrics, config(fake), SPLIT, 1000.0)
    fake.answer = lambda _query, _at: vector("NaN")
    check_queries(metrics, config(fake), SPLIT, 1000.0)
    with pytest.raises(ConfigError, match=r"metric bounced: give 'prometheus: \{url: …\}'"):
        check_queries(metrics, None, SPLIT, 1000.0)


def test_nothing_is_asked_without_a_canary_or_queries(fake: FakePrometheus) -> None:
    """No question, no cursor."""
    reader = QueryReader(config(fake))
    status = RolloutStatus(id="r")
    alone = SPLIT.model_copy(update={"canary": None, "weight": 0.0, "rollout_id": None})
    assert reader.read(spec(), status, alone, 1000.0) == ({}, {})
    errors = spec().model_copy(update={"metrics": (MetricSpec(kind=MetricKind.ERRORS, margin=0.1),)})
    assert reader.read(errors, status, SPLIT, 1000.0) == ({}, {})
    assert fake.asked == []
    reader.close()
