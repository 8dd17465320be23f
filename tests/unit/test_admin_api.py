"""The admin API over an empty state store: who gets in, what the endpoints promise, what errors say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from contracts.errors import ConfigError
from contracts.traffic import Split, Upstream
from serve.admin.app import create_app
from serve.admin.auth import MAX_BODY_BYTES, check_insecure
from serve.rollout.decide import initial
from serve.rollout.policy import RolloutPolicy, make_spec
from serve.state.keys import KeyState, MinuteUsage, new_key
from serve.state.rollouts import RolloutState
from serve.state.tables import open_state
from serve.state.traffic import RouterReport, TrafficState
from tests.unit.rollout_world import T0, record

BIG = Upstream(name="big", model="big", url="http://127.0.0.1:1", api_key_env="BIG_KEY")
SMALL = Upstream(name="small", model="small", app="app-small")


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """A store with the routes r and s."""
    made = open_state(f"sqlite:///{tmp_path}/state.db")
    traffic = TrafficState(made)
    traffic.put_split(Split(route="r", version=1, salt="x", stable=BIG))
    traffic.put_split(Split(route="s", version=1, salt="x", stable=BIG, canary=SMALL, weight=0.5))
    return made


@pytest.fixture
def admin(engine: Engine) -> Iterator[TestClient]:
    """A client with an admin key."""
    key, secret = new_key("boss", admin=True)
    KeyState(engine).create_key(key)
    with TestClient(
        create_app(engine), headers={"authorization": f"Bearer {secret}"}, raise_server_exceptions=False
    ) as client:
        yield client


def error(reply: Any, status: int) -> dict[str, Any]:
    """The error of a reply, which must have OpenAI's shape."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


PATHS = [
    ("GET", "/v1/keys"), ("POST", "/v1/keys"), ("GET", "/v1/usage"), ("GET", "/v1/routes"),
    ("PUT", "/v1/routes/r/settings"), ("PATCH", "/v1/routes/r/split"), ("GET", "/v1/upstreams"),
    ("GET", "/v1/routers"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("DELETE", "/v1/keys/k"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_nothing_is_behind_the_door_without_an_admin_key(engine: Engine, method: str, path: str) -> None:
    """Every path, existing or not, wants a living key with the admin scope, before it reads the body."""
    keys = KeyState(engine)
    plain, off, old = (
        new_key("plain"),
        new_key("off", admin=True, disabled=True),
        new_key("old", admin=True, expires_at=time.time() - 1),
    )
    for key, _ in (plain, off, old):
        keys.create_key(key)
    with TestClient(create_app(engine)) as client:
        for secret in (None, "", "sk-sh-wrong", off[1], old[1], "schlüssel"):
            value = b"" if secret is None else f"Bearer {secret}".encode()
            reply = client.request(method, path, headers={b"authorization": value}, content=b"{torn")
            assert error(reply, 401)["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        reply = client.request(method, path, headers={"authorization": f"Bearer {plain[1]}"})
        assert error(reply, 403)["code"] == "not_admin"
        assert client.get("/health").json() == {"status": "ok"}


def test_a_key_is_made_shown_changed_and_deleted(admin: TestClient, engine: Engine) -> None:
    """The secret is in one reply only; it is the one that the store knows the digest of."""
    made = admin.post("/v1/keys", json={"name": "ci", "routes": ["r"], "requests_per_minute": 9})
    assert made.status_code == 201
    body = made.json()
    secret = body.pop("secret")
    assert len(secret) == 49
    assert admin.get(f"/v1/keys/{body['id']}").json() == body
    assert "digest" not in body
    listed = admin.get("/v1/keys")
    assert [k["name"] for k in listed.json()["data"]] == ["boss", "ci"]
    assert secret not in listed.text
    changed = admin.patch(f"/v1/keys/{body['id']}", json={"disabled": True, "requests_per_minute": None})
    assert changed.json() == {**body, "disabled": True, "requests_per_minute": None}
    stored = KeyState(engine).get_key(body["id"])
    assert (stored.disabled, stored.routes, stored.requests_per_minute) == (True, ("r",), None)
    assert admin.delete(f"/v1/keys/{body['id']}").json() == {"id": body["id"], "deleted": True}
    assert error(admin.get(f"/v1/keys/{body['id']}"), 404)["code"] == "not_found"
    assert error(admin.delete(f"/v1/keys/{body['id']}"), 404)["code"] == "not_found"


def test_every_bad_field_is_named_and_no_value_repeated(admin: TestClient) -> None:
    """One reply says all that is wrong, without echoing what was sent."""
    bad = {
        "name": "",
        "requests_per_minute": 0,
        "routes": ["../x"],
        "secret": "hunter2",
        "log": {"mode": "x"},
    }
    found = error(admin.post("/v1/keys", json=bad), 400)
    for field in ("name", "requests_per_minute", "routes.0", "secret", "log.mode"):
        assert f"{field}: " in found["message"]
    assert "hunter2" not in found["message"]
    past = error(admin.post("/v1/keys", json={"name": "a", "expires_at": 1.0}), 400)
    assert past["message"].startswith("expires_at: ")
    key_id = admin.get("/v1/keys").json()["data"][0]["id"]
    for change in ({"name": None}, {"disabled": None}, {"digest": "0" * 64}, {"id": "other"}):
        assert next(iter(change)) in error(admin.patch(f"/v1/keys/{key_id}", json=change), 400)["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"name": "\\ud800"}', b'"x"']
)
def test_bodies_that_are_no_object_are_400(admin: TestClient, content: bytes) -> None:
    """A malformed body is the client's error, never ours."""
    reply = admin.post("/v1/keys", content=content, headers={"content-type": "application/json"})
    assert error(reply, 400)["type"] == "invalid_request_error"


def test_large_bodies_are_refused_declared_or_not(admin: TestClient) -> None:
    """Nobody fills the memory of the admin process."""
    large = b"x" * (MAX_BODY_BYTES + 1)
    assert error(admin.post("/v1/keys", content=large), 413)["code"] == "too_large"
    pieces = (large[i : i + 100_000] for i in range(0, len(large), 100_000))
    reply = admin.post("/v1/keys", content=pieces, headers={"content-type": "application/json"})
    assert error(reply, 413)["code"] == "too_large"


def test_usage_is_by_hour_and_survives_its_key(admin: TestClient, engine: Engine) -> None:
    """The bill of a key can be read after the key is gone; older hours are left out when not asked for."""
    minute = int(time.time() // 60)
    state = KeyState(engine)
    state.put_usage("r1", [MinuteUsage("gone", minute, 2, 3, 4), MinuteUsage("gone", minute - 6000, 1, 1, 1)])
    state.put_usage("r2", [MinuteUsage("gone", minute, 1, 1, 1), MinuteUsage("other", minute, 1, 0, 0)])
    (now,) = admin.get("/v1/keys/gone/usage").json()["data"]
    assert now == {
        "key_id": "gone", "hour": minute // 60, "requests": 3, "prompt_tokens": 4, "completion_tokens": 5
    }  # fmt: skip
    assert len(admin.get("/v1/keys/gone/usage", params={"hours": 200}).json()["data"]) == 2
    assert {u["key_id"] for u in admin.get("/v1/usage").json()["data"]} == {"gone", "other"}
    assert "hours" in error(admin.get("/v1/usage", params={"hours": 0}), 400)["message"]


def test_settings_are_sent_back_with_the_version_that_was_read(admin: TestClient) -> None:
    """What was read is changed and sent back; the second of two writers is told."""
    read = admin.get("/v1/routes/r/settings").json()
    assert (read["version"], read["aliases"]) == (0, [])
    read["aliases"] = ["gpt-4o"]
    written = admin.put("/v1/routes/r/settings", json=read)
    assert written.json() == {**read, "version": 1} == admin.get("/v1/routes/r/settings").json()
    assert error(admin.put("/v1/routes/r/settings", json=read), 409)["code"] == "conflict"
    assert admin.put("/v1/routes/r/settings", json=written.json()).json()["version"] == 2
    routes = {r["route"]: r for r in admin.get("/v1/routes").json()["data"]}
    assert routes["r"]["settings"]["version"] == 2
    assert (routes["s"]["settings"]["version"], routes["s"]["split"]["weight"]) == (0, 0.5)


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"route": "s"}, 400, "route: the body says 's'"),
        ({"aliases": ["s"]}, 400, "is itself a route"),
        ({"aliases": ["taken"]}, 400, "alias of route 's'"),
        ({"default": True}, 400, "default: route 's'"),
        ({"parameters": {"model": "x"}}, 400, "parameters"),
        ({"limits": {"max_in_flight": 0, "queue_s": -1}}, 400, "limits.queue_s"),
        ({"unknown": 1}, 400, "unknown"),
    ],
)
def test_settings_that_contradict_something_are_refused(
    admin: TestClient, changes: dict[str, Any], status: int, says: str
) -> None:
    """A name means one route, one route is the default, and every bad field is named."""
    theirs = {"route": "s", "aliases": ["taken"], "default": True}
    assert admin.put("/v1/routes/s/settings", json=theirs).status_code == 200
    refused = error(admin.put("/v1/routes/r/settings", json={"route": "r", **changes}), status)
    assert says in refused["message"]
    assert admin.get("/v1/routes/r/settings").json()["version"] == 0


def test_no_environment_variable_is_sent_where_it_does_not_go_yet(admin: TestClient) -> None:
    """An admin key is no way to read the secrets of the routers' machine."""
    thief = {"name": "t", "model": "m", "url": "http://thief", "api_key_env": "BIG_KEY"}
    other = {"name": "t", "model": "m", "url": BIG.url, "api_key_env": "AWS_SECRET_ACCESS_KEY"}
    for upstream in (thief, other):
        settings = {"route": "r", "fallbacks": [upstream]}
        refused = error(admin.put("/v1/routes/r/settings", json=settings), 400)
        assert refused["message"].startswith("api_key_env: ")
        shadow = {"route": "r", "shadow": {"upstream": upstream, "share": 0.1}}
        assert error(admin.put("/v1/routes/r/settings", json=shadow), 400)
        split = {"version": 1, "stable": upstream}
        assert error(admin.patch("/v1/routes/r/split", json=split), 400)
    same = {"route": "r", "fallbacks": [{**BIG.model_dump(), "name": "second", "model": "m2"}]}
    assert admin.put("/v1/routes/r/settings", json=same).status_code == 200


def test_a_split_is_changed_by_hand_but_not_under_a_rollout(admin: TestClient, engine: Engine) -> None:
    """Compare-and-set on the version; a rollout that runs owns its route."""
    half = admin.patch("/v1/routes/s/split", json={"version": 1, "weight": 0.25}).json()
    assert (half["version"], half["weight"], half["salt"]) == (2, 0.25, "x")
    assert error(admin.patch("/v1/routes/s/split", json={"version": 1, "weight": 1}), 409)
    gone = admin.patch("/v1/routes/s/split", json={"version": 2, "canary": None}).json()
    assert (gone["canary"], gone["weight"]) == (None, 0.0)
    assert (
        "canary" in error(admin.patch("/v1/routes/s/split", json={"version": 3, "weight": 1}), 400)["message"]
    )
    assert (
        "stable"
        in error(admin.patch("/v1/routes/s/split", json={"version": 3, "stable": None}), 400)["message"]
    )
    spec = make_spec(RolloutPolicy(), "s", record(), now=T0)
    RolloutState(engine).create(spec, initial(spec))
    assert (
        spec.id
        in error(admin.patch("/v1/routes/s/split", json={"version": 3, "canary": None}), 409)["message"]
    )
    assert TrafficState(engine).splits()["s"].version == 3
    listed = {r["route"]: r["rollout_id"] for r in admin.get("/v1/routes").json()["data"]}
    assert listed == {"r": None, "s": spec.id}
    assert error(admin.get("/v1/routes/none/split"), 404)["message"].endswith("routes: r, s.")


def test_upstreams_and_routers_are_listed(admin: TestClient, engine: Engine) -> None:
    """Which upstreams routes refer to, who answers for them, and which routers report."""
    traffic = TrafficState(engine)
    traffic.put_endpoint("app-small", "one", "http://127.0.0.1:5", 7)
    traffic.report_router(RouterReport(replica="router-1", versions={"r": 1}))
    found = {u["upstream"]["name"]: u for u in admin.get("/v1/upstreams").json()["data"]}
    assert (found["big"]["routes"], found["big"]["replicas"]) == (["r", "s"], [])
    assert [e["url"] for e in found["small"]["replicas"]] == ["http://127.0.0.1:5"]
    (router,) = admin.get("/v1/routers").json()["data"]
    assert (router["replica"], router["versions"]) == ("router-1", {"r": 1})


def test_the_openapi_document_says_what_is_true(admin: TestClient) -> None:
    """Tools read which key is needed and which replies can come."""
    document = admin.get("/openapi.json").json()
    assert document["security"] == [{"adminKey": []}]
    assert document["components"]["securitySchemes"]["adminKey"]["scheme"] == "bearer"
    assert set(document["paths"]) >= {"/v1/keys", "/v1/routes/{route}/settings", "/v1/upstreams"}
    for path in document["paths"].values():
        for operation in path.values():
            assert {"400", "401", "403"} <= set(operation["responses"])
            assert "422" not in operation["responses"]


def test_unknown_paths_and_methods_have_openais_shape(admin: TestClient) -> None:
    """Nothing answers in a framework's own words."""
    assert error(admin.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error(admin.delete("/v1/keys"), 405)["code"] == "not_allowed"


def test_a_store_that_is_gone_is_503_without_its_address(admin: TestClient, engine: Engine) -> None:
    """A failing store is not the client's fault, and its URL, which may hold a password, is not told."""
    with engine.begin() as db:
        db.exec_driver_sql("ALTER TABLE splits RENAME TO elsewhere")
    assert "splits" not in error(admin.get("/v1/routes"), 503)["message"]
    with engine.begin() as db:
        db.exec_driver_sql("ALTER TABLE api_keys RENAME TO nowhere")
    assert error(admin.get("/v1/routes"), 503)["code"] == "state_unavailable"


def test_insecure_is_for_this_machine_only(engine: Engine) -> None:
    """Without keys no other machine gets in, and no page in a browser that borrows this machine's address."""
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_insecure(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", ""):
        with pytest.raises(ConfigError, match="--insecure"):
            check_insecure(host)
    with TestClient(create_app(engine, insecure=True), base_url="http://127.0.0.1:9") as client:
        assert client.get("/v1/keys").json()["data"] == []
        assert error(client.get("/v1/keys", headers={"host": "evil.example:9"}), 403)["code"] == "not_local"
        for host in ("localhost:9", "[::1]:9"):
            assert client.get("/v1/keys", headers={"host": host}).status_code == 200
        # What a browser sends across sites without asking first: a form, or text.
        sent = client.post("/v1/keys", content=b'{"name": "x"}', headers={"content-type": "text/plain"})
        assert error(sent, 400)
        assert client.get("/v1/keys").json()["data"] == []
