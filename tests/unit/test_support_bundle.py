"""A support bundle has what helps and none of what is secret, wherever it was planted."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cli.bundle import safe_line, write
from cli.main import app
from contracts.errors import ConflictError
from contracts.routes import RouteSettings
from serve.state.keys import KeyState, new_key
from serve.state.settings import SettingsState
from tests.unit.rollout_world import World

API_KEY = "sk-proj-Zq81kLmNoPqRsTuVwXyZ"
URL_PASSWORD = "pw-in-a-url-91"
ENV_VALUE = "value of no known form 77"
TOKEN = "bearer.token.of-somebody"
PROMPT = "my knee hurts since Tuesday"
PERSON = "Ann Example"
SECRETS = (API_KEY, URL_PASSWORD, ENV_VALUE, TOKEN, PROMPT, PERSON)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration, a store, an environment and logs with secrets and texts in every place for one."""
    monkeypatch.setenv("TEACHER_KEY", ENV_VALUE)
    monkeypatch.setenv("OTHER_SECRET", ENV_VALUE)
    monkeypatch.setenv("WHERE", f"http://u:{URL_PASSWORD}@127.0.0.1:9/v1")
    run_dir = tmp_path / "run"
    file = tmp_path / "stack.yaml"
    fields = {
        "run_dir": str(run_dir),
        "http": {"port": 9},
        "registry_uri": f"http://mlflow:{URL_PASSWORD}@127.0.0.1:9",
        "upstreams": {
            "teacher": {"url": "${WHERE}", "model": "m", "api_key_env": "TEACHER_KEY"},
            "other": {"url": f"http://127.0.0.1:9/v1?api_key={API_KEY}", "model": f"m {ENV_VALUE}"},
        },
        "routes": {"support": {"upstream": "teacher", "parameters": {"user": PROMPT}}},
    }
    file.write_text(yaml.safe_dump(fields))
    run_dir.mkdir()
    world = World(tmp_path, state_url=f"sqlite:///{run_dir}/state.db")
    for _ in range(6):
        world.step()
    world.ask("pause", reason=PROMPT)
    world.step()
    SettingsState(world.engine).put_settings(
        RouteSettings(route="support", version=1, parameters={"user": PROMPT})
    )
    KeyState(world.engine).create_key(new_key(PERSON)[0])
    logs = run_dir / "logs"
    logs.mkdir()
    ours = {"ts": "t", "level": "warning", "process": "router", "logger": "x", "request_id": "req-7"}
    lines = [
        json.dumps({**ours, "message": f"cannot ask http://u:{URL_PASSWORD}@h", "token": TOKEN}),
        json.dumps({**ours, "message": f"{ENV_VALUE} and Authorization: Bearer {TOKEN}"}),
        f"ERROR 11-26 22:00:01 [serving.py:42] ValueError: {PROMPT} {API_KEY}",
        f'{{"messages": [{{"content": "{PROMPT}"}}]}}',
        f"{PERSON} said: {PROMPT}",
        f"export KEY={API_KEY}; psql postgresql://a:{URL_PASSWORD}@db/x",
    ]
    (logs / "engine-a.log").write_text("\n".join(lines))
    return file


def test_nothing_secret_is_in_it_and_what_helps_is(planted: Path, tmp_path: Path) -> None:
    """Keys, passwords in URLs, values of the environment, tokens, texts and names: planted everywhere."""
    bundle = tmp_path / "bundle.zip"
    names = write(str(planted), bundle, 5.0)
    with zipfile.ZipFile(bundle) as archive:
        found = {name: archive.read(name).decode() for name in archive.namelist()}
    assert sorted(found) == names
    for name, content in found.items():
        for secret in SECRETS:
            assert secret not in content, (secret, name)
            assert json.dumps(secret)[1:-1] not in content, (secret, name)
    state = json.loads(found["state.json"])
    assert state["rollouts"][0]["phase"] == "paused"
    assert state["splits"][0]["route"] == "support"
    assert state["settings"][0]["parameters"] == ["user"]
    assert state["rows"]["audit"] > 0
    config = json.loads(found["config.json"])
    assert config["upstreams"]["teacher"]["api_key_env"] == "TEACHER_KEY"
    assert config["upstreams"]["teacher"]["url"] == "http://***@127.0.0.1:9/v1"
    assert "req-7" in found["logs/engine-a.log"]
    assert "[serving.py:42] ValueError" in found["logs/engine-a.log"]
    assert {"ray", "pydantic"} <= set(json.loads(found["about.json"])["packages"])
    assert any(one["check"] == "state store" for one in json.loads(found["doctor.json"]))
    assert bundle.stat().st_mode & 0o077 == 0


def test_it_is_made_when_the_configuration_is_wrong(tmp_path: Path) -> None:
    """The moment in which it is needed most; the file of that name is not replaced."""
    file, bundle = tmp_path / "stack.yaml", tmp_path / "b.zip"
    file.write_text(f"upstreams: {{}}\nhtpp: 'http://u:{URL_PASSWORD}@h'\n")
    done = CliRunner().invoke(app, ["support-bundle", str(bundle), "--config", str(file), "--timeout", "60"])
    assert done.exit_code == 0, done.output
    with zipfile.ZipFile(bundle) as archive:
        assert json.loads(archive.read("doctor.json"))[0]["level"] == "fail"
        assert all(URL_PASSWORD not in archive.read(name).decode() for name in archive.namelist())
    with pytest.raises(ConflictError, match="is there already"):
        write(str(file), bundle, 60.0)


def test_of_foreign_lines_only_time_level_place_and_kind_are_kept() -> None:
    """Nobody can say which of another program's words are a user's."""
    kept = safe_line(f'  File "/x/vllm/engine.py", line 12, in step  # {PROMPT}')
    assert kept.startswith('/x/vllm/engine.py", line 12')
    assert PROMPT not in kept
    assert safe_line(PROMPT) == f"[{len(PROMPT)} characters left out]"
