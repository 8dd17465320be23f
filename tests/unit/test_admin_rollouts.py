"""Rollouts through the admin API: what is shown, page by page, and what may be asked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert
from starlette.testclient import TestClient

from contracts.commands import VERBS, allowed, check_verb
from contracts.errors import ConfigError, ConflictError
from contracts.metrics import bucket_quantile
from contracts.rollout import Phase, RolloutStatus
from contracts.traffic import Split
from serve.admin.app import create_app
from serve.admin.rollouts import LOOKS, MAX_REASON, RECENT
from serve.rollout.decide import initial
from serve.rollout.start import ask
from serve.state.keys import KeyState, new_key
from serve.state.rollouts import Tick
from serve.state.tables import audit
from tests.unit.rollout_world import TEACHER, World
from tests.unit.test_admin_api import error


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A route with a rollout that has not been looked at yet."""
    return World(tmp_path)


@pytest.fixture
def admin(world: World) -> Iterator[TestClient]:
    """A client with the admin key `key-boss`."""
    key, secret = new_key("boss", admin=True)
    KeyState(world.engine).create_key(key.model_copy(update={"id": "key-boss"}))
    with TestClient(
        create_app(world.engine), headers={"authorization": f"Bearer {secret}"}, raise_server_exceptions=False
    ) as client:
        yield client


def more(world: World, count: int, route: str = "support") -> list[str]:
    """Ended rollouts, all of the same moment as their neighbour in pairs; ids in order of creation."""
    ids = []
    for i in range(count):
        spec = world.spec.model_copy(
            update={
                "id": f"{route}-{i:03}",
                "route": route,
                "created_at": world.spec.created_at - 100 + i // 2,
            }
        )
        status = initial(spec)
        stored_id = spec.id
        world.rollouts.create(spec.model_copy(update={"route": f"{route}-{i}"}), status)
        stored = world.rollouts.get(stored_id)
        world.rollouts.save_tick(Tick(stored, status.model_copy(update={"phase": Phase.ABORTED})))
        ids.append(stored_id)
    return ids


# what may be asked ------------------------------------------------------------------------------


def status(phase: Phase, paused: bool = False) -> RolloutStatus:
    return RolloutStatus(id="x", phase=phase, paused=paused)


@pytest.mark.parametrize(
    ("phase", "paused", "verbs"),
    [
        (Phase.PENDING, False, ["pause", "abort"]),
        (Phase.PENDING, True, ["resume", "abort"]),
        (Phase.WARMING, False, ["pause", "abort"]),
        (Phase.RAMPING, False, ["pause", "approve", "promote", "abort"]),
        (Phase.HELD, False, ["pause", "approve", "promote", "abort"]),
        (Phase.PAUSED, True, ["resume", "approve", "promote", "abort"]),
        (Phase.WATCHING, False, ["promote", "abort"]),
        (Phase.PROMOTING, False, []),
        (Phase.PROMOTED, False, []),
        (Phase.ROLLING_BACK, False, []),
        (Phase.ROLLED_BACK, False, []),
        (Phase.ABORTED, False, []),
    ],
)
def test_each_phase_has_its_verbs(phase: Phase, paused: bool, verbs: list[str]) -> None:
    """What is offered is exactly what is accepted, for everybody who asks."""
    now = status(phase, paused)
    assert allowed(now) == verbs
    for verb in VERBS:
        if verb in allowed(now):
            check_verb(verb, now)
        else:
            with pytest.raises(ConflictError, match=f"{verb} is not possible: the rollout is"):
                check_verb(verb, now)
    with pytest.raises(ConfigError, match="verb: there is no such command; there are pause, "):
        check_verb("explode", now)


def test_every_verb_says_what_it_does_and_overruling_ones_are_marked() -> None:
    """A person reads one sentence or two before saying yes."""
    assert {v for v, about in VERBS.items() if about.danger} >= {"promote", "abort"}
    assert all(about.effect.endswith(".") and len(about.effect) < 200 for about in VERBS.values())


def test_the_cli_and_the_api_obey_the_same_table(world: World, admin: TestClient) -> None:
    """Both refuse with the same words."""
    with pytest.raises(ConflictError) as cli:
        ask(world.rollouts, "support", "promote")
    reply = admin.post(f"/v1/rollouts/{world.spec.id}/commands", json={"verb": "promote"})
    assert error(reply, 409)["message"] == str(cli.value)


def test_a_command_is_stored_with_the_key_that_asked_and_ends_in_the_audit(
    world: World, admin: TestClient
) -> None:
    """Who and why are in the trail; the rollout is paused at the next tick, and says so."""
    world.until(Phase.RAMPING)
    path = f"/v1/rollouts/{world.spec.id}"
    asked = admin.post(f"{path}/commands", json={"verb": "pause", "reason": "  lunch,\n really "})
    assert asked.status_code == 202
    assert asked.json() == {
        "rollout_id": world.spec.id, "verb": "pause", "by": "key-boss", "reason": "lunch, really"
    }  # fmt: skip
    (pending,) = admin.get(path).json()["pending"]
    assert (pending["verb"], pending["by"]) == ("pause", "key-boss")
    world.step()
    shown = admin.get(path).json()
    assert (shown["phase"], shown["reason"]) == ("paused", "paused by key-boss: lunch, really")
    assert shown["pending"] == []
    assert [v["verb"] for v in shown["verbs"] if v["verb"] in ("pause", "resume")] == ["resume"]
    assert shown["audit"][0]["body"]["reason"] == "paused by key-boss: lunch, really"
    assert error(admin.post(f"{path}/commands", json={"verb": "pause"}), 409)["code"] == "conflict"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "verb"),
        ({"verb": "explode"}, "verb: there is no such command"),
        ({"verb": ["abort"]}, "verb"),
        ({"verb": "abort", "reason": "x" * (MAX_REASON + 1)}, "reason"),
        ({"verb": "abort", "reason": "a\x00b"}, "reason: Value error, must be printable text"),
        ({"verb": "abort", "by": "somebody else"}, "by"),
        ([], "the body"),
    ],
)
def test_bad_commands_name_the_field_and_ask_nothing(
    world: World, admin: TestClient, body: Any, says: str
) -> None:
    """Nobody asks in another's name, and nothing half-understood reaches the controller."""
    refused = error(admin.post(f"/v1/rollouts/{world.spec.id}/commands", json=body), 400)
    assert says in refused["message"]
    assert "explode" not in refused["message"]
    assert world.rollouts.pending_commands(world.spec.id) == []


def test_commands_need_json_so_that_no_other_page_can_send_them(world: World) -> None:
    """Without keys, what a browser sends across sites unasked (a form, plain text) is refused."""
    with TestClient(create_app(world.engine, insecure=True), base_url="http://127.0.0.1:9") as client:
        path = f"/v1/rollouts/{world.spec.id}/commands"
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            assert error(client.post(path, content=b'{"verb": "abort"}', headers={"content-type": kind}), 400)
        assert world.rollouts.pending_commands(world.spec.id) == []
        assert client.post(path, json={"verb": "abort"}).json()["by"] == "nobody"


# what is shown ----------------------------------------------------------------------------------


def test_a_rollout_is_shown_before_and_after_its_first_look(world: World, admin: TestClient) -> None:
    """Thresholds and evidence are the controller's own, as it stored them at its last look."""
    path = f"/v1/rollouts/{world.spec.id}"
    before = admin.get(path).json()
    assert (before["phase"], before["thresholds"], before["arms"], before["looks"]) == (
        "pending",
        None,
        {},
        [],
    )
    assert before["sentence"].startswith("accepted; ")
    assert [(m["name"], m["verdict"]) for m in before["metrics"]] == [
        ("errors", "NO_DATA"), ("quality", "NO_DATA"), ("ttft", "NO_DATA"), ("e2e", "NO_DATA")
    ]  # fmt: skip
    world.until(Phase.RAMPING)
    for _ in range(5):
        world.step()
    shown, stored = admin.get(path).json(), world.status
    assert shown["thresholds"]["log_harm_each"] == pytest.approx(math.log(4 / 0.05))
    assert shown["thresholds"]["log_promote"] == pytest.approx(math.log(20))
    assert [m["log_harm"] for m in shown["metrics"]] == [m.log_harm for m in stored.metrics]
    assert shown["looks"][-1]["metrics"]["errors"] == [
        stored.metrics[0].log_harm, stored.metrics[0].log_noninferior
    ]  # fmt: skip
    total = stored.total_counts["stable"]
    arm = shown["arms"]["stable"]
    assert (arm["n"], arm["errors"], arm["graded"]) == (
        total.n, total.errors, {"grade": [total.graded(), total.failed()]}
    )  # fmt: skip
    assert arm["e2e_p50_s"] == bucket_quantile(total.e2e, 0.5)
    assert shown["steps"] == [0.01, 0.05, 0.1, 0.25, 0.5]
    assert (shown["status_version"], shown["spec"]["model_ref"]) == (stored.ticks + 1, "student:1")


def test_only_the_last_looks_come_along(world: World, admin: TestClient) -> None:
    """A rollout of weeks is not sent whole: a curve of the last looks, the last lines of the trail."""
    world.until(Phase.RAMPING)
    with world.engine.begin() as db:
        for i in range(LOOKS + 30):
            body = json.dumps(
                {"metrics": [{"metric": "errors", "log_harm": i, "log_noninferior": float("inf")}]}
            )
            row = {
                "rollout_id": world.spec.id,
                "tick": 10_000 + i,
                "at": 1.0 + i,
                "kind": "look",
                "body": body,
            }
            db.execute(insert(audit).values(**row))
    shown = admin.get(f"/v1/rollouts/{world.spec.id}").json()
    assert len(shown["looks"]) == LOOKS
    assert shown["looks"][-1]["metrics"]["errors"] == [LOOKS + 29, None]
    assert len(shown["audit"]) == RECENT
    assert shown["audit"][0]["tick"] == 10_000 + LOOKS + 29


def test_the_trail_is_paged_to_its_first_entry(world: World, admin: TestClient) -> None:
    """Every entry once, newest first; what was observed only when it is asked for."""
    world.until(Phase.PROMOTED)
    path = f"/v1/rollouts/{world.spec.id}/audit"
    whole = world.rollouts.audit(world.spec.id)
    found: list[dict[str, Any]] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        before = {"before": found[-1]["id"]} if found else {}
        page = admin.get(path, params={"limit": 7, **before}).json()
        assert len(page["data"]) == 7 or not page["has_more"]
        found += page["data"]
    assert [(e["tick"], e["kind"]) for e in reversed(found)] == [(e.tick, e.kind) for e in whole]
    assert not any("observation" in e["body"] for e in found)
    moves = admin.get(path, params={"kind": "transition", "limit": 200}).json()["data"]
    assert [e["tick"] for e in reversed(moves)] == [e.tick for e in whole if e.kind == "transition"]
    full = admin.get(path, params={"observed": "true", "limit": 200}).json()["data"]
    assert full[0]["body"] == whole[-1].body


def test_rollouts_are_paged_newest_first_and_filtered(world: World, admin: TestClient) -> None:
    """Also those that began in the same moment: each is on one page, and none is lost."""
    ids = more(world, 9)
    found: list[str] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        after = {"after": found[-1]} if found else {}
        page = admin.get("/v1/rollouts", params={"limit": 2, **after}).json()
        found += [r["id"] for r in page["data"]]
    assert found == [world.spec.id, *reversed(ids)]
    running = admin.get("/v1/rollouts", params={"active": "true"}).json()["data"]
    assert [r["id"] for r in running] == [world.spec.id]
    ended = admin.get("/v1/rollouts", params={"active": "false"}).json()
    assert (len(ended["data"]), ended["has_more"]) == (9, False)
    assert admin.get("/v1/rollouts", params={"route": "nowhere"}).json()["data"] == []
    mine = admin.get("/v1/rollouts", params={"route": "support"}).json()["data"]
    assert [r["id"] for r in mine] == [world.spec.id]


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/v1/rollouts/none", 404, "no rollout 'none'"),
        ("/v1/rollouts/none/audit", 404, "no rollout 'none'"),
        ("/v1/rollouts/..%2f..%2fetc", 404, "nothing at this path"),
        ("/v1/rollouts/%00", 400, "rollout_id"),
        ("/v1/rollouts?limit=0", 400, "limit"),
        ("/v1/rollouts?limit=201", 400, "limit"),
        ("/v1/rollouts?limit=many", 400, "limit"),
        ("/v1/rollouts?active=maybe", 400, "active"),
        ("/v1/rollouts?after=none", 404, "after: there is no rollout of this id"),
        ("/v1/rollouts?after=%27%20OR%201=1", 400, "after"),
        ("/v1/rollouts?route=a%20b", 400, "route"),
    ],
)
def test_malformed_questions_are_the_askers_error(
    admin: TestClient, path: str, status: int, says: str
) -> None:
    """Every bad parameter is named."""
    assert says in error(admin.get(path), status)["message"]


@pytest.mark.parametrize(
    "query", ["kind=all", "before=0", "before=99999999999999999999", "limit=0", "observed=x"]
)
def test_malformed_trail_pages_are_the_askers_error(world: World, admin: TestClient, query: str) -> None:
    """Also numbers that no database takes."""
    found = error(admin.get(f"/v1/rollouts/{world.spec.id}/audit?{query}"), 400)
    assert query.split("=")[0] in found["message"]


# what is going on -------------------------------------------------------------------------------


def test_events_answer_304_until_something_changed(world: World, admin: TestClient) -> None:
    """A console that asks every second costs nothing while nothing happens, and misses nothing."""
    world.until(Phase.RAMPING)
    first = admin.get("/v1/events")
    tag = first.headers["etag"]
    again = admin.get("/v1/events", headers={"if-none-match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    world.controller.tick()  # renews the lease; nothing to decide
    assert admin.get("/v1/events", headers={"if-none-match": f'"other", {tag}'}).status_code == 304
    world.step()
    world.step()
    moved = admin.get("/v1/events", headers={"if-none-match": tag})
    assert (moved.status_code, moved.headers["etag"] == tag) == (200, False)
    body = moved.json()
    (running,) = body["rollouts"]
    assert running["status_version"] == world.rollouts.get(world.spec.id).status_version
    assert (body["controller"]["holder"], body["controller"]["alive"]) == ("one", True)


def test_events_say_which_routers_have_taken_a_split_over(world: World, admin: TestClient) -> None:
    """Agreement is by route and version, load by upstream; one that does not know a route counts as 0."""
    world.traffic.put_split(Split(route="other", version=1, salt="x", stable=TEACHER))
    world.routers.busy = {"teacher": 2}
    world.until(Phase.RAMPING)
    world.routers.serve(world.now, 1.0)
    routes = {r["route"]: r for r in admin.get("/v1/events").json()["routes"]}
    version = str(world.split.version)
    assert (routes["support"]["routers"], routes["support"]["agreed"]) == ({version: 2}, True)
    assert routes["support"]["in_flight"] == {"teacher": 4, "student-v1": 0}
    assert (routes["support"]["rollout_id"], routes["support"]["weight"]) == (world.spec.id, 0.01)
    assert (routes["other"]["routers"], routes["other"]["agreed"]) == ({"0": 2}, False)
    world.routers.follow = False
    world.routers.serve(world.now, 1.0)
    late = {r["route"]: r for r in admin.get("/v1/events").json()["routes"]}["support"]
    assert (late["routers"], late["agreed"], late["split_version"]) == ({"1": 2}, False, int(version))


def test_nobody_acting_is_said(world: World, admin: TestClient) -> None:
    """A store that no controller ever worked on has no lease; one that was left has none any more."""
    assert admin.get("/v1/events").json()["controller"] is None
    assert world.rollouts.acquire_lease("rollout-controller", "gone", -1.0)
    assert admin.get("/v1/events").json()["controller"]["alive"] is False


@pytest.mark.parametrize("table", ["splits", "rollouts", "leases", "commands", "audit"])
def test_a_store_that_fails_is_503_everywhere(world: World, admin: TestClient, table: str) -> None:
    """The console shows stale data and says so; no reply names a table."""
    with world.engine.begin() as db:
        db.exec_driver_sql(f"ALTER TABLE {table} RENAME TO elsewhere")
    path = f"/v1/rollouts/{world.spec.id}" if table in ("commands", "audit") else "/v1/events"
    assert table not in error(admin.get(path), 503)["message"]


def test_the_openapi_document_has_the_verbs(admin: TestClient) -> None:
    """Tools read which commands there are and that a 304 can come."""
    document = admin.get("/openapi.json").json()
    assert document["components"]["schemas"]["CommandBody"]["properties"]["verb"]["enum"] == list(VERBS)
    assert "304" in document["paths"]["/v1/events"]["get"]["responses"]
    assert "202" in document["paths"]["/v1/rollouts/{rollout_id}/commands"]["post"]["responses"]
    assert not [p for p in document["paths"] if p.startswith("/console")]


def test_quantiles_are_upper_edges_of_their_buckets() -> None:
    """Half of three requests is reached in the second one's bucket; nothing and the overflow have no edge."""
    counts = (1, 1, 0, 1, *(0,) * 27)
    assert bucket_quantile(counts, 0.5) == 0.004
    assert bucket_quantile(counts, 0.95) == 0.008
    assert bucket_quantile((), 0.5) is None
    assert bucket_quantile((*(0,) * 30, 2), 0.5) is None
