"""schemathesis over the OpenAPI documents of the router and the admin API, against real processes.

Data that the documents allow and data that they forbid; every answer must be one that they describe, and no
5xx. The seed is fixed: a failure is the same for everybody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from contracts.routes import RouteSettings
from serve.admin.app import create_app
from serve.router.openapi import document
from serve.state.keys import KeyState, new_key
from serve.state.settings import SettingsState
from serve.state.tables import open_state
from tests.integration.router_rig import Server, World, get, post, wait_until

pytestmark = pytest.mark.integration
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
EXAMPLES = 12
SEED = 20261126


def operations(of: dict[str, Any]) -> list[tuple[str, str]]:
    """(method, path) of everything a document describes."""
    return [(method.upper(), path) for path, how in of["paths"].items() for method in how]


ROUTER_OPERATIONS = operations(json.loads(document()))
ADMIN_OPERATIONS = operations(create_app(open_state("sqlite://")).openapi())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A route that answers to any name, two fake engines, a router and the admin API."""
    made = World(tmp_path_factory.mktemp("schemathesis"))
    made.stable.control(tokens=2)
    made.split(1)
    SettingsState(open_state(made.state_url)).put_settings(
        RouteSettings(route="support", version=1, default=True)
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def router(world: World) -> Server:
    """A router that passes every well-formed request on."""
    made = world.router()
    wait_until("any name answers", lambda: post(f"{made.url}/v1/embeddings", {"model": "x"})[0] == 200)
    return made


@pytest.fixture(scope="module")
def admin(world: World, router: Server) -> tuple[Server, dict[str, str]]:
    """The admin API, and the headers that open it."""
    boss, secret = new_key("boss", admin=True, routes=())
    KeyState(open_state(world.state_url)).create_key(boss)
    made = Server("-m", "serve.admin", "--config", str(world.folder / "router-0.json"), "--port", "0")
    world.others.append(made)
    return made, {"Authorization": f"Bearer {secret}"}


def fuzz(schema: Any, method: str, path: str, mode: GenerationMode, headers: dict[str, str]) -> list[int]:
    """Send what schemathesis makes of an operation and check each answer.

    Returns the statuses; in negative mode those of requests whose body is a forbidden one.
    """
    operation = schema[path][method]
    statuses: list[int] = []

    @seed(SEED)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call(headers=headers, timeout=20)
        if mode is GenerationMode.POSITIVE or _body_mode(case) is mode:
            statuses.append(response.status_code)
        case.validate_response(response, checks=CHECKS, headers=headers)

    run()
    return statuses


def _body_mode(case: Any) -> GenerationMode | None:
    return {where.value: made.mode for where, made in case.meta.components.items()}.get("body")


@pytest.mark.parametrize(("method", "path"), ROUTER_OPERATIONS)
def test_the_router_does_what_its_document_says(router: Server, method: str, path: str) -> None:
    """Allowed requests are answered as described; a forbidden body is never taken for a request."""
    schema = schemathesis.openapi.from_url(f"{router.url}/openapi.json")
    allowed = fuzz(schema, method, path, GenerationMode.POSITIVE, {})
    assert allowed
    if method == "POST":
        forbidden = fuzz(schema, method, path, GenerationMode.NEGATIVE, {})
        assert forbidden
        assert all(400 <= status < 500 for status in forbidden), forbidden
    if path in ("/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        assert 200 in allowed
    assert get(f"{router.url}/ready")[0] == 200


@pytest.mark.parametrize(("method", "path"), ADMIN_OPERATIONS)
def test_the_admin_api_does_what_its_document_says(
    admin: tuple[Server, dict[str, str]], method: str, path: str
) -> None:
    """With the key of an admin: described answers only, and no forbidden body taken; without: always 401."""
    server, headers = admin
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    allowed = fuzz(schema, method, path, GenerationMode.POSITIVE, headers)
    assert 401 not in allowed
    if "{" not in path:
        assert min(allowed) in (200, 201)
    if method in ("POST", "PUT", "PATCH"):
        forbidden = fuzz(schema, method, path, GenerationMode.NEGATIVE, headers)
        assert forbidden
        assert all(400 <= status < 500 for status in forbidden), forbidden
    if path.startswith("/v1/"):
        assert set(fuzz(schema, method, path, GenerationMode.POSITIVE, {})) == {401}
