"""`stillhouse up` with real Ray and vLLM: what a user's first minute looks like."""

from __future__ import annotations

import json

import pytest

from tests.integration.stack_rig import LiveStack, request_rows, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.whole, pytest.mark.timeout(600)]


def test_ready_means_the_first_request_is_answered(stack: LiveStack) -> None:
    """Readiness is a promise: a request sent as `up` returns is answered, whole and streamed alike."""
    whole = stack.ask("what can you do", temperature=0)
    streamed = stack.ask("what can you do", stream=True, temperature=0)
    assert whole
    assert streamed == whole


def test_models_lists_the_routes(stack: LiveStack) -> None:
    """Clients see routes, never upstreams."""
    assert [m.id for m in stack.client().models.list()] == ["adapted", "support"]


def test_every_request_is_logged_once(stack: LiveStack) -> None:
    """The request log is what students are made of: each answered request is one row with its answer."""
    texts = {stack.ask(f"please log number {i}", stream=bool(i % 2), temperature=0) for i in range(6)}

    def logged() -> list[dict[str, object]]:
        rows = request_rows(stack.config)
        found = [r for r in rows if "please log number" in r["request"]["messages"][0]["content"]]
        return found if len(found) >= 6 else []

    rows = wait_until("six rows in the request log", logged)
    assert len(rows) == 6
    assert {r["response_text"] for r in rows} == texts
    assert {(r["upstream"], r["outcome"], r["arm"]) for r in rows} == {("teacher", "ok", "stable")}
    assert all(r["completion_tokens"] and r["e2e_s"] > 0 for r in rows)


def test_status_names_routes_upstreams_and_replicas(stack: LiveStack) -> None:
    """`status` answers where traffic goes and what serves it, for people and for machines."""
    facts = json.loads(stack.cli("status", "--json").stdout)
    assert facts["stack"]["phase"] == "ready"
    assert facts["routes"]["support"]["stable"] == "teacher"
    assert len(facts["upstreams"]["teacher"]["replicas"]) == 2
    assert len(facts["routers"]) == 2
    assert "support" in stack.cli("status").stdout


def test_a_second_up_is_refused(stack: LiveStack) -> None:
    """Two stacks in one run folder would write into each other's state; the message says what to do."""
    done = stack.cli("up", check=False)
    assert done.returncode == 1
    assert "stillhouse down" in done.stderr
    assert "Traceback" not in done.stderr
    assert stack.ask()


def test_replicas_listen_on_loopback_only(stack: LiveStack) -> None:
    """Engines and the public address of a one-machine stack are nobody else's to reach."""
    import psutil

    engines = [e for replicas in stack.traffic.endpoints(15).values() for e in replicas]
    ports = {int(e.url.rpartition(":")[2]) for e in engines} | {stack.config.http.port}
    bound = {
        c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port in ports
    }
    assert bound == {"127.0.0.1"}
