"""The admin API as a process of its own, the routers that follow it, and the stack that keeps it running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.config import ServeConfig
from serve.stack.admin import AdminProcess
from serve.stack.processes import check_port_free
from serve.state.keys import KeyState, new_key
from serve.state.settings import SettingsState
from serve.state.tables import open_state
from tests.integration.held_port import held_port
from tests.integration.router_rig import ROOT, Server, World, get, openai_client, post, wait_until

pytestmark = pytest.mark.integration
CHAT: dict[str, Any] = {"model": "support", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.split(1)
    yield made
    made.close()


def ask(router: Server, secret: str) -> int:
    return post(f"{router.url}/v1/chat/completions", CHAT, Authorization=f"Bearer {secret}")[0]


def test_a_key_made_here_works_at_the_routers_and_its_use_comes_back(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """An operator makes a key, hands it out, reads its usage; the admin process's log says who did what."""
    boss, boss_secret = new_key("boss", admin=True, routes=())
    KeyState(open_state(world.state_url)).create_key(boss)
    router = world.router(keys=True, flush_s=0.1)
    config = str(world.folder / "router-0.json")
    admin = Server("-m", "serve.admin", "--config", config, "--port", "0")
    world.others.append(admin)
    made = post(f"{admin.url}/v1/keys", {"name": "ci"}, Authorization=f"Bearer {boss_secret}")
    key_id, secret = made[1]["id"], made[1]["secret"]
    wait_until("the router knows the key", lambda: ask(router, secret) == 200)
    client = openai_client(router).with_options(api_key=secret)
    assert client.chat.completions.create(**CHAT).usage is not None
    assert ask(router, boss_secret) == 403

    def used() -> list[dict[str, Any]]:
        return list(_get(admin, f"/v1/keys/{key_id}/usage", boss_secret)["data"])

    wait_until("the usage is there", lambda: sum(u["completion_tokens"] for u in used()) == 16)
    assert sum(u["requests"] for u in used()) == 2
    assert post(f"{admin.url}/v1/keys", {"name": "x"}, Authorization=f"Bearer {secret}")[0] == 403
    assert get(f"{admin.url}/v1/keys")[0] == 401
    settings = {**_get(admin, "/v1/routes/support/settings", boss_secret), "aliases": ["gpt-4o"]}
    assert _send(admin, "PUT", "/v1/routes/support/settings", boss_secret, settings)["version"] == 1
    stored = SettingsState(open_state(world.state_url)).get_settings("support")
    assert stored is not None
    assert stored.aliases == ("gpt-4o",)
    assert _get(admin, "/v1/routers", boss_secret)["data"][0]["versions"] == {"support": 1}
    _send(admin, "PATCH", f"/v1/keys/{key_id}", boss_secret, {"disabled": True})
    wait_until("the router refuses it", lambda: ask(router, secret) == 401)
    admin.stop()
    said = "".join(capfd.readouterr())
    assert f"{boss.id} made key {key_id}" in said
    assert f"{boss.id} changed disabled of key {key_id}" in said
    assert secret not in said
    assert boss_secret not in said


def _get(admin: Server, path: str, secret: str) -> dict[str, Any]:
    return _send(admin, "GET", path, secret)


def _send(admin: Server, method: str, path: str, secret: str, body: Any = None) -> dict[str, Any]:
    reply = httpx.request(
        method,
        f"{admin.url}{path}",
        json=body,
        headers={"Authorization": f"Bearer {secret}"},
        trust_env=False,
    )
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_insecure_starts_on_loopback_only(tmp_path: Path) -> None:
    """A door without a lock is never opened to other machines."""
    config = tmp_path / "router.json"
    config.write_text(json.dumps({"state_url": f"sqlite:///{tmp_path}/state.db"}))
    command = [sys.executable, "-m", "serve.admin", "--config", str(config), "--port", "0", "--insecure"]
    done = subprocess.run(
        [*command, "--host", "0.0.0.0"], capture_output=True, text=True, cwd=ROOT, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigError: --insecure lets everybody in who reaches '0.0.0.0'")
    admin = Server(*command[1:])
    try:
        assert post(f"{admin.url}/v1/keys", {"name": "x"})[0] == 201
    finally:
        admin.stop()


def test_the_stack_keeps_the_admin_api_running(tmp_path: Path) -> None:
    """The admin process is started again when it dies, and ended with the stack; its file is private."""
    port = held_port()
    config = ServeConfig.model_validate(
        {
            "run_dir": str(tmp_path),
            "admin": {"port": port},
            "upstreams": {"teacher": {"url": "http://127.0.0.1:9", "model": "m"}},
            "routes": {"support": "teacher"},
        }
    )
    config.log_dir.mkdir()
    process = AdminProcess(config)

    def answers() -> bool:
        try:
            return get(f"http://127.0.0.1:{port}/health")[0] == 200
        except OSError:
            return False

    def again() -> bool:
        process.keep()
        return process.pid != first

    first = None
    try:
        process.keep()
        wait_until("it answers", answers)
        assert (tmp_path / "admin.json").stat().st_mode & 0o077 == 0
        first = process.pid
        process.keep()
        assert process.pid == first
        assert first is not None
        os.kill(first, 9)
        wait_until("it is started again", again)
        wait_until("it answers again", answers)
    finally:
        process.stop()
    check_port_free("127.0.0.1", port)
