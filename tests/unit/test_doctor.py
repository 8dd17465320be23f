"""The doctor: what is wrong is found and comes with what to do; nothing that hangs makes it hang."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import text
from typer.testing import CliRunner

from cli.doctor import host, network, state
from cli.doctor.command import findings
from cli.doctor.finding import Finding, Level, Patient, examine, ok
from cli.main import app
from registry.digest import bytes_of, digest_folder
from registry.fake import FakeRegistry
from serve.config import load_serve_config
from serve.state.keys import KeyState, new_key
from serve.state.tables import open_state
from serve.state.traffic import RouterReport, TrafficState
from tests.unit.old_state import load_old
from tests.unit.rollout_world import World


def patient(folder: Path, **changes: Any) -> Patient:
    """A configuration in a folder of the test's own; nothing runs on it."""
    file = folder / "stack.yaml"
    fields = {
        "run_dir": str(folder / "run"),
        "upstreams": {"teacher": {"url": "http://127.0.0.1:9", "model": "m"}},
        "routes": {"support": "teacher"},
    }
    file.write_text(yaml.safe_dump({**fields, **changes}))
    return Patient(load_serve_config(file), None)


def levels(found: Any) -> list[tuple[str, str]]:
    """(level, what) of findings."""
    return [(str(one.level), one.what) for one in found]


def bad(found: Any) -> list[Finding]:
    """Warnings and failures; each must say what to do."""
    wrong = [one for one in found if one.level in (Level.WARN, Level.FAIL)]
    assert all(one.fix for one in wrong)
    return wrong


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, int]]]:
    """An OpenAI-compatible server: its URL, and the status it answers by path."""
    answers: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", answers
    listening.shutdown()
    listening.server_close()


def test_a_check_that_hangs_or_breaks_is_a_finding() -> None:
    """The others are told as they are, in their order; nothing waits for the one that hangs."""
    forever = threading.Event()

    def hangs(_: Any) -> Iterator[Finding]:
        forever.wait()
        yield ok("hangs", "never")

    def breaks(_: Any) -> Iterator[Finding]:
        yield ok("breaks", "so far")
        raise KeyError("postgresql://me:hunter2@host/x")

    checks = (("hangs", hangs), ("fine", lambda _: [ok("fine", "yes")]), ("breaks", breaks))
    found = examine(None, checks, 5.0)
    assert [(f.check, f.level) for f in found] == [("hangs", "fail"), ("fine", "ok"), ("breaks", "fail")]
    assert "no answer within 5 s" in found[0].what
    assert "KeyError" in found[2].what
    assert "hunter2" not in found[2].what
    forever.set()


def test_a_wrong_configuration_is_the_first_finding(tmp_path: Path) -> None:
    """It names the field; the machine is looked at all the same; the exit status is 1."""
    file = tmp_path / "stack.yaml"
    file.write_text(
        "routes: {support: teacher}\nupstreams: {teacher: {url: 'http://x', model: m}}\nhtpp: {}\n"
    )
    run = CliRunner().invoke(app, ["doctor", "--config", str(file), "--json", "--timeout", "60"])
    found = json.loads(run.output)
    assert run.exit_code == 1
    assert (found[0]["check"], found[0]["level"]) == ("config", "fail")
    assert "htpp" in found[0]["what"]
    assert {"python", "packages", "cpu"} <= {one["check"] for one in found}


def test_a_fresh_configuration_has_nothing_wrong_with_it(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first start: no store, no registry, no log yet, and that is fine. Nothing is created."""
    url, answers = server
    answers["/v1/models"] = 200
    monkeypatch.setattr(network, "_ASK_S", 60.0)
    fresh = patient(tmp_path, upstreams={"teacher": {"url": url, "model": "m"}}, http={"port": 1024})
    found = {f.check: f for f in findings(str(tmp_path / "stack.yaml"), 120.0)}
    for check in ("config", "run_dir", "secrets", "state store", "upstreams", "registry", "request log"):
        assert found[check].level is Level.OK, found[check]
    assert not fresh.config.run_dir.exists()


def test_versions_are_held_against_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version, and one that is missing; `v1.0` and `1.0+cpu` are no other versions."""
    lock = tmp_path / "main.txt"
    monkeypatch.setattr(host, "LOCK", lock)
    versions = {"a": "1.0", "b": "v2.0.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(host, "version", lambda name: versions[name])
    lock.write_text("a==1.0\n    # via x\nb==2.0.0\ntorch==2.13.0 ; python_version > '3'\n")
    assert levels(host.packages(None)) == [("ok", "all 3 as locked")]
    lock.write_text("a==1.1\nb==2.0.0\n")
    assert levels(host.packages(None)) == [("fail", "a 1.0 (lock: 1.1)")]


def test_a_taken_port_and_a_missing_secret_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which port and which variable; never a value."""
    monkeypatch.delenv("EXAMPLE_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sick = patient(
            tmp_path,
            http={"port": port},
            upstreams={"teacher": {"url": "http://x", "model": "m", "api_key_env": "EXAMPLE_KEY"}},
        )
        (finding,) = bad(host.ports(sick))
    assert f"http.port: 127.0.0.1:{port} is taken" in finding.what
    (finding,) = bad(host.secrets(sick))
    assert finding.what == "EXAMPLE_KEY is not set (upstreams.teacher.api_key_env)"
    monkeypatch.setenv("EXAMPLE_KEY", "hunter2")
    assert levels(host.secrets(sick)) == [("ok", "EXAMPLE_KEY set")]


def test_an_older_and_a_newer_store(tmp_path: Path) -> None:
    """The older one says how to upgrade, and is not; the newer one is a failure; so is no database."""
    sick = patient(tmp_path)
    load_old(sick.config.state_url, 2)
    (finding,) = bad(state.store(sick))
    assert (finding.level, "has schema 2, this release 3" in finding.what) == (Level.WARN, True)
    assert levels(state.routers(sick)) == [("skip", "no state store")]
    with open_state(sick.config.state_url).begin() as db:
        db.execute(text("UPDATE schema_version SET version = 99"))
    (finding,) = examine(sick, [("state store", state.store)], 60.0)
    assert (finding.level, "written by a newer release" in finding.what) == (Level.FAIL, True)
    away = patient(tmp_path, state_url="postgresql+psycopg://me:hunter2@127.0.0.1:9/x")
    (finding,) = examine(away, [("state store", state.store)], 60.0)
    assert (finding.level, "hunter2" in finding.what) == (Level.FAIL, False)


def test_routers_that_assign_by_an_old_split_are_found(tmp_path: Path, state_url: str) -> None:
    """A router that reports but does not follow; one in the future is a clock that is wrong."""
    world = World(tmp_path, state_url=state_url)
    for _ in range(4):
        world.step()
    sick, traffic = patient(tmp_path, state_url=state_url), TrafficState(world.engine)
    with world.engine.begin() as db:
        db.execute(text("DELETE FROM routers"))
    traffic.report_router(RouterReport(replica="router-x", versions={"support": 1}))
    with world.engine.begin() as db:
        db.execute(text(f"UPDATE routers SET seen_at = {time.time() + 600}"))
    (finding,) = bad(state.routers(sick))
    assert f"router-x assigns support by v1, not v{world.split.version}" in finding.what
    (finding,) = bad(state.clock(sick))
    assert "router-x is" in finding.what
    traffic.report_router(RouterReport(replica="router-x", versions={"support": world.split.version}))
    assert bad(state.clock(sick)) == []


def test_a_rollout_that_nobody_decides_is_a_failure(tmp_path: Path) -> None:
    """An active rollout without a living lease waits for ever."""
    world = World(tmp_path)
    world.step()
    sick = patient(tmp_path, state_url=world.state_url)
    with world.engine.begin() as db:
        db.execute(text(f"UPDATE leases SET expires_at = {time.time() + 600}"))
    assert bad(state.controller(sick)) == []
    with world.engine.begin() as db:
        db.execute(text("UPDATE leases SET expires_at = 0"))
    (finding,) = bad(state.controller(sick))
    assert "no controller holds the lease, and 1 rollouts wait" in finding.what


def test_keys_that_end_soon_are_not_limited_or_are_missing(tmp_path: Path) -> None:
    """Only where routers ask for keys; admin keys need no limit."""
    sick = patient(tmp_path, router={"keys": True})
    keys = KeyState(open_state(sick.config.state_url))
    (finding,) = bad(state.keys(sick))
    assert (finding.level, finding.what) == (Level.FAIL, "routers ask for a key, and there is none")
    soon, _ = new_key("soon", expires_at=time.time() + 2.5 * 86_400, requests_per_minute=1)
    free, _ = new_key("free")
    for key in (soon, free, new_key("boss", admin=True)[0], new_key("old", expires_at=1.0)[0]):
        keys.create_key(key)
    words = [f.what for f in bad(state.keys(sick))]
    assert words == [f"key {soon.id} ends in 2.5 days", f"1 keys without limits: {free.id}"]
    assert levels(state.keys(sick))[-1] == ("ok", "3 usable, 1 ended")
    open_door = patient(tmp_path, http={"host": "0.0.0.0"})
    assert [f.what for f in bad(state.keys(open_door))] == ["everybody who reaches the router may ask"]


def test_engines_and_upstreams_are_asked(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that is registered and sick, an upstream that refuses our key, one that is away."""
    url, answers = server
    monkeypatch.setattr(network, "_ASK_S", 60.0)
    monkeypatch.setattr(network, "FRESH_S", 3600.0)
    sick = patient(
        tmp_path,
        upstreams={
            "teacher": {"url": url, "model": "m", "api_key_env": "KEY"},
            "away": {"url": "http://127.0.0.1:9", "model": "m"},
        },
    )
    TrafficState(open_state(sick.config.state_url)).put_endpoint("student-v1", "r1", url, 1)
    answers |= {"/health": 500, "/v1/models": 401}
    (finding,) = bad(network.engines(sick))
    assert f"student-v1 at {url}: 500" in finding.what
    away, refused = bad(network.upstreams(sick))
    assert (": 401" in refused.what, refused.fix) == (True, "check the key in KEY.")
    assert away.what.startswith("away at 127.0.0.1:9:")
    answers |= {"/health": 200, "/v1/models": 200}
    assert bad(network.engines(sick)) == []
    assert [f.what.split()[0] for f in bad(network.upstreams(sick))] == ["away"]


def test_aliases_lead_to_artifacts_that_are_there_and_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that changed, and one that is gone."""
    from tests.unit.rollout_world import record

    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w" * 100)
    made = record()
    artifact = made.artifact.model_copy(
        update={"uri": str(folder), "digest": digest_folder(folder), "bytes": bytes_of(folder)}
    )
    fake = FakeRegistry()
    published = fake.publish(made.model_copy(update={"artifact": artifact, "version": None}), folder)
    fake.set_alias(published.name, "champion", published.version, "ann", "first")
    monkeypatch.setattr(network, "open_registry", lambda uri: fake)
    healthy = patient(tmp_path, registry_uri="postgresql://mlflow")
    where = Path(fake.get("student@champion").artifact.uri)
    assert bad(network.registry(healthy)) == []
    (where / "weights").write_bytes(b"x" * 100)
    (finding,) = bad(network.registry(healthy))
    assert "has changed" in finding.what
    for file in where.iterdir():
        file.unlink()
    where.rmdir()
    (finding,) = bad(network.registry(healthy))
    assert "no folder" in finding.what


def test_segments_that_wait_for_the_bucket_are_found(tmp_path: Path) -> None:
    """Closed an hour ago and not uploaded; a fresh one is not late."""
    log, bucket = tmp_path / "log", tmp_path / "bucket"
    log.mkdir()
    sick = patient(tmp_path, router={"log": {"dir": str(log), "upload": f"file://{bucket}"}})
    assert bad(network.request_log(sick)) == []
    (log / "requests-20260101T000000.000000Z-a-00000001.jsonl").write_text("{}\n")
    names = [f.name for f in log.iterdir() if network.is_final(f.name)]
    assert names, "the name of a segment has changed: change this test's"
    (finding,) = bad(network.request_log(sick))
    assert finding.what.startswith("1 segments wait for file://")


def test_help_teaches_what_is_looked_at() -> None:
    """Somebody who has never used it learns what it checks and what the exit status means."""
    shown = CliRunner().invoke(app, ["doctor", "--help"]).output
    shown = " ".join(shown.split())
    for word in ("exit status 1", "schema", "secrets", "--json", "--timeout"):
        assert word in shown
