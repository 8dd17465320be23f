"""The console's door: which files are open to everybody, under which policy, and that nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serve.admin.app import create_app
from serve.admin.pages import HEADERS, console_files
from tests.unit.rollout_world import World
from tests.unit.test_admin_api import error


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A route with a rollout."""
    return World(tmp_path)


def test_the_page_is_open_and_everything_it_shows_is_not(world: World) -> None:
    """No key for the files, exactly these; a key for the data and for every path that looks similar."""
    with TestClient(create_app(world.engine)) as client:
        for path, content in console_files().items():
            reply = client.get(path)
            assert (reply.status_code, reply.content) == (200, content)
            assert client.head(path).status_code == 200
        assert client.get("/", follow_redirects=False).headers["location"] == "console"
        assert str(client.get("/console/").url).endswith("/console")
        for path in ("/console/none.js", "/console/index.html", "/console/app.js/"):
            assert client.get(path).status_code in (401, 404), path
        for path in ("/v1/events", "/v1/rollouts", f"/v1/rollouts/{world.spec.id}"):
            assert error(client.get(path), 401)["code"] == "invalid_api_key"
        assert error(client.post(f"/v1/rollouts/{world.spec.id}/commands", json={"verb": "abort"}), 401)
        assert error(client.post("/console"), 405)["code"] == "not_allowed"


def test_the_page_may_talk_to_this_server_only(world: World) -> None:
    """A strict policy on every file: no inline script, no frame, no other origin; types are final."""
    with TestClient(create_app(world.engine)) as client:
        for path in console_files():
            headers = client.get(path).headers
            assert HEADERS.items() <= dict(headers).items()
        kinds = {p: client.get(p).headers["content-type"] for p in console_files()}
        assert kinds["/console"] == "text/html; charset=utf-8"
        assert kinds["/console/app.js"] == "text/javascript; charset=utf-8"
        tag = client.get("/console").headers["etag"]
        assert client.get("/console", headers={"if-none-match": tag}).status_code == 304
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_no_file_of_the_console_names_another_address_or_builds_html() -> None:
    """Works without internet; a name is never markup."""
    for path, content in console_files().items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in text.replace("// ", "").replace("//\n", "") or path.endswith(".css"), path
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "localStorage",
            "style=",
        ):
            assert word not in text, f"{path}: {word}"


def test_the_page_knows_whether_a_key_is_needed(world: World) -> None:
    """Started with --insecure it asks nobody for a key."""
    with TestClient(create_app(world.engine)) as client:
        assert 'data-keys="required"' in client.get("/console").text
    with TestClient(create_app(world.engine, insecure=True), base_url="http://127.0.0.1:9") as client:
        assert 'data-keys="off"' in client.get("/console").text
