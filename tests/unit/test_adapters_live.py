"""Adapters on running engines: an HTTP server that keeps vLLM's rules for them stands for the engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import DataError, EngineError
from contracts.traffic import Upstream
from registry.adapter import WEIGHTS_FILE
from registry.digest import digest_folder
from serve.engine import adapter_app, deployer
from serve.engine.adapters import Guest, load, served, unload
from serve.engine.config import EngineOptions, engine_command, engine_environment
from serve.engine.deployer import ServeDeployer
from serve.engine.lora import LoraOptions
from serve.router.app import ROUTED
from serve.state.tables import open_state
from serve.state.traffic import TrafficState
from tests.integration.router_rig import wait_until
from tests.unit.test_adapter_record import adapter_folder


class Engine(ThreadingHTTPServer):
    """vLLM's /v1/models, /v1/load_lora_adapter and /v1/unload_lora_adapter; it scores prompts, badly."""

    def __init__(self, base: Path, lora: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.base, self.lora, self.adapters, self.posts = base, lora, dict[str, str](), list[str]()
        self.applies = True
        """False: takes adapters and answers as the base."""
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request of vLLM's API for adapters."""

    server: Engine

    def do_GET(self) -> None:
        models: list[dict[str, Any]] = [{"id": "base", "root": str(self.server.base), "parent": None}]
        found = self.server.adapters.items()
        models += [{"id": name, "root": path, "parent": "base"} for name, path in found]
        self._say(200, {"data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            moved = 0.5 if self.server.applies and body["model"] in self.server.adapters else 0.0
            self._say(200, {"choices": [{"logprobs": {"token_logprobs": [None, -1 - moved, -2, -3]}}]})
            return
        name, adapters = body["lora_name"], self.server.adapters
        self.server.posts.append(f"{self.path} {name}")
        if not self.server.lora:
            self._say(404, {"detail": "Not Found"})
        elif self.path == "/v1/load_lora_adapter":
            adapters[name] = body["lora_path"]
            self._say(200, {})
        elif name in adapters:
            del adapters[name]
            self._say(200, {})
        else:
            self._say(404, {"error": {"message": f"The lora adapter '{name}' cannot be found."}})

    def _say(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Replica(adapter_app.AdapterReplica):
    """Ray Serve awaits the real `__del__`; Python would call it and not."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


class World:
    """A base, a store, engines."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        self.base.mkdir()
        (self.base / "config.json").write_text("{}")
        self.state_url = f"sqlite:///{folder}/state.db"
        self.traffic = TrafficState(open_state(self.state_url))
        self.engines: list[Engine] = []

    def engine(self, replica: str, base: Path | None = None, lora: bool = True) -> Engine:
        self.engines.append(Engine(base or self.base, lora))
        self.traffic.put_endpoint("base", replica, self.engines[-1].url, 7)
        return self.engines[-1]

    def guest(self, name: str) -> Guest:
        folder = self.folder / name
        if not folder.exists():
            adapter_folder(folder, digest_folder(self.base))
        return Guest(self.traffic, name, name, folder)

    def urls(self, app: str) -> list[str]:
        return [e.url for e in self.traffic.endpoints().get(app, [])]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A base model's folder and an empty store; its engines end with the test."""
    made = World(tmp_path)
    yield made
    for engine in made.engines:
        engine.shutdown()
        engine.server_close()


def test_an_adapter_is_loaded_once_and_registered_on_its_bases_engine(world: World) -> None:
    """Two adapters share one engine, each under its own application; a second visit loads nothing."""
    engine = world.engine("r1")
    guests = [world.guest("a"), world.guest("b")]
    assert [g.visit() for g in guests + guests] == [1, 1, 1, 1]
    assert engine.posts == ["/v1/load_lora_adapter a", "/v1/load_lora_adapter b"]
    assert world.urls("a") == world.urls("b") == [engine.url]
    assert all(e.guest for e in world.traffic.endpoints()["a"])


def test_a_new_replica_gets_the_adapter_before_it_is_chosen(world: World) -> None:
    """After a replica's death its adapters come back with it, and the dead one's registration goes. Other
    adapters' registrations do not keep a dead engine alive."""
    world.engine("r1")
    a, b = world.guest("a"), world.guest("b")
    assert (a.visit(), b.visit()) == (1, 1)
    world.traffic.drop_endpoint("base", "r1")
    second = world.engine("r2")
    assert (a.visit(), b.visit()) == (1, 1)
    assert set(second.adapters) == {"a", "b"}
    assert world.urls("a") == world.urls("b") == [second.url]
    world.traffic.drop_endpoint("base")
    assert (a.visit(), b.visit(), world.urls("a")) == (0, 0, [])


def test_a_retired_adapter_is_unloaded_and_the_others_stay(world: World) -> None:
    """First no router can choose it, then the engine forgets it; twice is once."""
    engine = world.engine("r1")
    a, b = world.guest("a"), world.guest("b")
    a.visit(), b.visit()
    a.leave()
    assert (world.urls("a"), set(engine.adapters)) == ([], {"a", "b"})
    a.unload(), a.unload()
    assert set(engine.adapters) == {"b"}
    assert engine.posts.count("/v1/unload_lora_adapter a") == 1


def test_other_bases_and_engines_without_lora_are_named(world: World) -> None:
    """Neither gets the adapter; the error says what runs and what is needed."""
    other = world.folder / "other"
    other.mkdir()
    (other / "config.json").write_text('{"x": 1}')
    stranger, plain = world.engine("r1", other), world.engine("r2", lora=False)
    guest = world.guest("a")
    assert "no engine is registered" in guest.why()
    assert (guest.visit(), world.urls("a"), stranger.posts) == (0, [], [])
    assert f"{other} has digest {digest_folder(other)[:12]}" in guest.why()
    assert f"engine {plain.url} takes no adapters; set 'lora'" in guest.why()


def test_damaged_files_are_refused_before_an_engine_is_asked(world: World) -> None:
    """A truncated adapter never reaches vLLM."""
    engine = world.engine("r1")
    world.guest("a")
    weights = world.folder / "a" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DataError, match=WEIGHTS_FILE):
        world.guest("a")
    assert engine.posts == []


def test_a_name_belongs_to_one_folder(world: World) -> None:
    """An engine never answers one student's requests with another's weights."""
    engine = world.engine("r1")
    load(engine.url, "a", world.folder / "x")
    load(engine.url, "a", world.folder / "x")
    with pytest.raises(EngineError, match="unload it before"):
        load(engine.url, "a", world.folder / "y")
    unload(engine.url, "a")
    unload(engine.url, "a")
    assert served(engine.url).adapters == {}
    assert len(engine.posts) == 2


def test_an_adapter_without_effect_is_refused_and_gone(world: World) -> None:
    """vLLM may take an adapter and never apply it: the deployment fails at once, and no name is left."""
    engine = world.engine("r1")
    engine.applies = False
    with pytest.raises(DataError, match="changes nothing on engine"):
        world.guest("a").visit()
    assert (engine.adapters, world.urls("a")) == ({}, [])


def test_the_deployer_gives_an_adapter_a_place_and_no_engine(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merged student gets an engine still; an adapter does not count its engine's other requests."""
    built: list[str] = []
    monkeypatch.setattr(deployer, "application_status", lambda app: None)
    monkeypatch.setattr(deployer, "deploy_application", lambda app, target: None)
    monkeypatch.setattr(deployer, "build_adapter_app", lambda *args: built.append(f"adapter {args[1]}"))
    monkeypatch.setattr(deployer, "build_engine_app", lambda *args: built.append(f"engine {args[1]}"))
    monkeypatch.setattr(deployer, "requests_in_engine", lambda url: 5)
    made = ServeDeployer(world.traffic, EngineOptions(), world.state_url, str(world.folder))
    world.engine("r1")
    world.guest("a").visit()
    a, base = (Upstream(name=n, model=n, app=n) for n in ("a", "base"))
    made.deploy(a, f"file://{world.folder / 'a'}")
    made.deploy(base, str(world.base))
    assert built == [f"adapter {world.folder / 'a'}", f"engine {world.base}"]
    assert (made.in_flight(a), made.in_flight(base)) == (0, 5)


def test_an_engine_gets_lora_only_when_it_is_asked_for() -> None:
    """Room is reserved at start; the path that loads is opened for these engines alone."""
    options = EngineOptions(lora=LoraOptions(max_loras=4, max_lora_rank=8))
    command = engine_command("m", "m", options, "127.0.0.1", 1)
    start = command.index("--enable-lora")
    assert command[start + 1 :] == [
        "--max-loras", "4", "--max-lora-rank", "8", "--max-cpu-loras", "4", "--lora-target-modules",
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert engine_environment("m", options, {})["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "--enable-lora" not in engine_command("m", "m", EngineOptions(), "127.0.0.1", 1)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in engine_environment("m", EngineOptions(), {})
    with pytest.raises(ValueError, match="max_cpu_loras must be at least max_loras"):
        LoraOptions(max_loras=4, max_cpu_loras=2)
    with pytest.raises(ValueError, match="lm_head would let one request end the engine"):
        LoraOptions(target_modules=("q_proj", "lm_head"))


def test_clients_cannot_load_adapters_through_the_router() -> None:
    """What is routed is a list, and neither path is on it; everything else is a 404 of the router's own."""
    assert not [path for path in ROUTED if "lora" in path or "adapter" in path]


async def test_the_application_keeps_its_adapter_and_takes_it_along(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ready means registered; a replica of the base that came back is noticed by the application itself; a
    deleted application leaves neither registration nor adapter."""
    monkeypatch.setattr(adapter_app, "SETTLE_S", 0.0)
    monkeypatch.setattr(adapter_app, "VISIT_S", 0.01)
    engine = world.engine("r1")
    world.guest("a")
    replica = object.__new__(Replica)
    await replica.__init__("a", str(world.folder / "a"), "a", world.state_url, 0.0, {})  # type: ignore[misc]
    assert (world.urls("a"), set(engine.adapters)) == ([engine.url], {"a"})
    engine.adapters.clear()
    wait_until("the adapter is back", lambda: "a" in engine.adapters)
    replica.check_health()
    await adapter_app.AdapterReplica.__del__(replica)
    assert (world.urls("a"), engine.adapters) == ([], {})


async def test_an_application_without_a_base_fails_with_the_reason(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for ever, and says what it looked for; damaged files fail at once."""
    monkeypatch.setattr(adapter_app, "SETTLE_S", 0.0)
    world.guest("a")
    arguments = ("a", str(world.folder / "a"), "a", world.state_url, 0.0, {})
    replica = object.__new__(Replica)
    with pytest.raises(EngineError, match=r"needs a running engine of its base base .*no engine"):
        await replica.__init__(*arguments)  # type: ignore[misc]
    (world.folder / "a" / WEIGHTS_FILE).unlink()
    with pytest.raises(DataError, match="is missing"):
        await replica.__init__(*arguments)  # type: ignore[misc]
