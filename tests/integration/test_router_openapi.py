"""The router's OpenAPI document against the router: what it promises is what comes, whatever is sent."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.router.app import _LOCAL
from serve.router.openapi import FEEDBACK, ROUTED, document
from tests.integration.router_rig import World

pytestmark = pytest.mark.integration
DOCUMENT: dict[str, Any] = json.loads(document())
OPERATIONS = [(path, method) for path, how in DOCUMENT["paths"].items() for method in how]
BOUNDED = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["messages", "prompt", "input", "stream", "stream_options", "n", "tools", "user", "metadata", "logprobs",
     "response_format", "max_tokens", "echo"]
)  # fmt: skip
VALID = st.dictionaries(FIELDS, JSON, max_size=5).map(lambda more: {**more, "model": "support"})
INVALID = st.dictionaries(st.text(), JSON, max_size=3).map(
    lambda d: {k: v for k, v in d.items() if k != "model"}
)
BODIES = VALID.map(json.dumps) | INVALID.map(json.dumps) | JSON.map(json.dumps) | st.text()
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "x-stillhouse-arm": st.sampled_from(["stable", "canary", "shadow", ""]),
        "x-request-id": st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=200),
        "traceparent": st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=80),
    },
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("openapi"))
    made.stable.control(tokens=2)
    made.split(1)
    made.router(log=None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def connection(world: World) -> Iterator[http.client.HTTPConnection]:
    """One connection for everything: an answer left over by one request would be seen by the next."""
    parts = urlsplit(world.routers[0].url)
    made = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    yield made
    made.close()


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
) -> tuple[int, dict[str, str], bytes]:
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, {n.lower(): v for n, v in reply.getheaders()}, reply.read()


def conforms(operation: dict[str, Any], status: int, headers: dict[str, str], body: bytes) -> None:
    """The answer is one that the document describes."""
    described = operation["responses"].get(str(status)) or operation["responses"].get("default")
    assert described is not None, f"{status} is not described"
    kind = headers["content-type"].partition(";")[0]
    assert kind in described["content"], f"{status}: {kind} is not described"
    if kind == "application/json":
        schema = {**described["content"][kind]["schema"], "components": DOCUMENT["components"]}
        jsonschema.validate(json.loads(body), schema, jsonschema.Draft202012Validator)
    for name in described.get("headers", {}):
        assert name in headers, f"{status}: {name} is missing"


def test_the_document_describes_what_is_served(connection: http.client.HTTPConnection) -> None:
    """The router serves the document; its paths are all paths there are, its schemas are schemas."""
    status, headers, body = ask(connection, "GET", "/openapi.json", None, {})
    assert (status, headers["content-type"]) == (200, "application/json")
    served = json.loads(body)
    assert served["openapi"] == "3.1.0"
    paths = set(served["paths"])
    assert {p for p, how in served["paths"].items() if "post" in how} == {*ROUTED, FEEDBACK}
    assert paths - ROUTED == {*_LOCAL, FEEDBACK, "/v1/models/{model}"}
    names = [how["operationId"] for methods in served["paths"].values() for how in methods.values()]
    assert len(set(names)) == len(names)
    for schema in served["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@given(body=BODIES, headers=HEADERS, name=st.text(min_size=1, max_size=20))
@BOUNDED
def test_every_answer_is_as_described(
    connection: http.client.HTTPConnection,
    path: str,
    method: str,
    body: str,
    headers: dict[str, str],
    name: str,
) -> None:
    """Whatever JSON or text is sent: no 5xx, and status, type, headers and body are documented ones."""
    operation = DOCUMENT["paths"][path][method]
    url = path.replace("{model}", quote(name, safe=""))
    sent = body.encode("utf-8", "surrogatepass") if method == "post" else None
    status, got, answer = ask(connection, method.upper(), url, sent, headers)
    assert status < 500
    conforms(operation, status, got, answer)
    if method == "post":
        parsed = _object(body)
        if parsed is None or not isinstance(parsed.get("model"), str) or not parsed["model"]:
            assert 400 <= status < 500, "a body that the document forbids was accepted"


@pytest.mark.parametrize("path", sorted(DOCUMENT["paths"]))
def test_other_methods_are_refused_and_the_right_one_named(
    connection: http.client.HTTPConnection, path: str
) -> None:
    """405 comes with Allow, as HTTP demands."""
    right = "POST" if path in {*ROUTED, FEEDBACK} else "GET"
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - {right}:
        status, headers, body = ask(connection, method, path.replace("{model}", "support"), b"{}", {})
        assert (status, right in headers["allow"]) == (405, True), method
        assert json.loads(body)["error"]["message"]


def _object(body: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(body)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
