"""`stillhouse keys` and `stillhouse routes`: what an operator types, without any server."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import Engine
from typer.testing import CliRunner

from cli import keys as keys_cli
from cli import routes as routes_cli
from contracts.errors import ConfigError, NotFoundError, StillhouseError
from contracts.routes import LogMode, RouteSettings
from contracts.traffic import Split, Upstream
from serve.config import load_serve_config
from serve.stack.admin import stack_key
from serve.state.keys import KeyState, MinuteUsage, digest_of
from serve.state.settings import SettingsState
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

SECRET = re.compile(r"^sk-sh-[A-Za-z0-9_-]{43}$", re.MULTILINE)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stack's configuration file, named by the environment as for every command."""
    file = tmp_path / "stack.yaml"
    stack = {
        "run_dir": str(tmp_path / "run"),
        "upstreams": {"teacher": {"url": "http://127.0.0.1:9", "model": "m"}},
        "routes": {"support": "teacher"},
        "router": {"keys": True},
        "admin": {"port": 9001},
    }
    file.write_text(yaml.safe_dump(stack))
    monkeypatch.setenv("STILLHOUSE_CONFIG", str(file))
    monkeypatch.setenv("COLUMNS", "160")
    return file


@pytest.fixture
def engine(config: Path) -> Engine:
    """The stack's state store, with the routes support and other."""
    made = open_state(load_serve_config(config).state_url)
    for route in ("support", "other"):
        stable = Upstream(name="teacher", model="m", url="http://127.0.0.1:9")
        TrafficState(made).put_split(Split(route=route, version=1, salt="x", stable=stable))
    return made


def run(app: Any, *arguments: str, fails: type[StillhouseError] | None = None) -> str:
    """What a command prints, or the message of the error it fails with."""
    done = CliRunner().invoke(app, list(arguments))
    if fails is not None:
        assert isinstance(done.exception, fails), done.output
        return str(done.exception)
    assert done.exit_code == 0, done.exception
    return done.output


def test_the_first_admin_key_needs_only_the_state_store(engine: Engine) -> None:
    """The secret is on a line of its own, once, with a sentence that says so."""
    said = run(keys_cli.app, "create", "boss", "--admin", "--no-routes")
    assert "shown this once and stored nowhere" in said
    (secret,) = SECRET.findall(said)
    key = KeyState(engine).find(digest_of(secret.encode()))
    assert key is not None
    assert (key.name, key.admin, key.routes) == ("boss", True, ())
    for command in (["list"], ["show", "boss"], ["list", "--json"], ["show", key.id, "--json"]):
        shown = run(keys_cli.app, *command)
        assert key.id in shown
        assert secret not in shown
        assert key.digest not in shown


def test_scope_limits_and_expiry_are_taken_from_the_options(engine: Engine) -> None:
    """What is typed is what is stored; a route that does not exist yet is pointed out."""
    said = run(
        keys_cli.app, "create", "ci", "--route", "support", "--route", "later", "--requests-per-minute", "5",
        "--tokens-per-minute", "900", "--priority", "low", "--expires", "30d",
    )  # fmt: skip
    (key,) = KeyState(engine).keys().values()
    assert key.routes == ("support", "later")
    assert (key.requests_per_minute, key.tokens_per_minute, key.priority) == (5, 900, 2)
    assert key.expires_at is not None
    assert key.expires_at - time.time() == pytest.approx(30 * 86400, abs=60)
    assert "no route 'later'" in said
    assert "no route 'support'" not in said
    made = json.loads(run(keys_cli.app, "create", "x", "--json"))
    assert SECRET.match(made["secret"])


@pytest.mark.parametrize(
    ("option", "value"), [("--expires", "3y"), ("--expires", "0d"), ("--priority", "top")]
)
def test_bad_options_are_named(engine: Engine, option: str, value: str) -> None:
    """A mistake makes no key."""
    assert run(keys_cli.app, "create", "a", option, value, fails=ConfigError).startswith(option)
    assert KeyState(engine).keys() == {}


def test_keys_are_named_by_id_or_by_an_unambiguous_name(engine: Engine) -> None:
    """Nobody disables the wrong one of two keys with the same name."""
    for name in ("ci", "twice", "twice"):
        run(keys_cli.app, "create", name)
    state = KeyState(engine)
    by_name = {k.name: k.id for k in state.keys().values()}
    run(keys_cli.app, "disable", "ci")
    assert state.get_key(by_name["ci"]).disabled
    assert "disabled" in run(keys_cli.app, "list")
    run(keys_cli.app, "enable", by_name["ci"])
    assert not state.get_key(by_name["ci"]).disabled
    assert by_name["twice"] in run(keys_cli.app, "disable", "twice", fails=ConfigError)
    run(keys_cli.app, "disable", "nobody", fails=NotFoundError)
    run(keys_cli.app, "delete", by_name["twice"], "--yes")
    run(keys_cli.app, "show", by_name["twice"], fails=NotFoundError)


def test_usage_of_a_deleted_key_is_still_shown(engine: Engine) -> None:
    """What was used is used."""
    run(keys_cli.app, "create", "ci")
    state = KeyState(engine)
    (key,) = state.keys().values()
    assert "Nothing was used" in run(keys_cli.app, "usage", "ci")
    state.put_usage("r1", [MinuteUsage(key.id, int(time.time() // 60), 12345, 5, 6)])
    run(keys_cli.app, "delete", "ci", "--yes")
    assert "12345" in run(keys_cli.app, "usage", key.id)
    (used,) = json.loads(run(keys_cli.app, "usage", "--json"))
    assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (12345, 5, 6)


def test_single_settings_are_changed_without_a_version(engine: Engine) -> None:
    """The version is the command's business; other fields stay as they are."""
    said = run(
        routes_cli.app, "set", "support", "--set", "limits.max_in_flight=64", "--set", "aliases=[gpt-4o]"
    )
    assert "settings 1" in said
    run(routes_cli.app, "set", "support", "--set", "log.mode=metadata", "--set", "limits.max_queued=0")
    stored = SettingsState(engine).get_settings("support")
    assert stored is not None
    assert (stored.version, stored.aliases, stored.log.mode) == (2, ("gpt-4o",), LogMode.METADATA)
    assert (stored.limits.max_in_flight, stored.limits.max_queued) == (64, 0)
    assert "v2: aliases, limits, log" in run(routes_cli.app, "list")
    facts = json.loads(run(routes_cli.app, "list", "--json"))
    assert (facts["support"]["settings"]["version"], facts["other"]["settings"]) == (2, None)


def test_what_show_prints_can_be_set_again(engine: Engine, tmp_path: Path) -> None:
    """The settings as a file: print, edit, set; what the file leaves out is the default again."""
    run(routes_cli.app, "set", "support", "--set", "limits.max_in_flight=64")
    file = tmp_path / "settings.yaml"
    file.write_text(run(routes_cli.app, "show", "support").replace("64", "65"))
    run(routes_cli.app, "set", "support", str(file))
    stored = SettingsState(engine).get_settings("support")
    assert stored is not None
    assert (stored.version, stored.limits.max_in_flight) == (2, 65)
    file.write_text('{"parameters": {"temperature": 0}}')
    run(routes_cli.app, "set", "support", str(file), "--set", "default=true")
    assert SettingsState(engine).get_settings("support") == RouteSettings(
        route="support", version=3, parameters={"temperature": 0}, default=True
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["support"], "nothing to set"),
        (["support", "--set", "limits"], "FIELD=VALUE"),
        (["support", "--set", "version=9"], "not yours"),
        (["support", "--set", "limits.max_in_flight=0"], "limits.max_in_flight"),
        (["support", "--set", "limits.nothing=1"], "limits.nothing"),
        (["support", "--set", "aliases=[other]"], "is itself a route"),
        (["support", "--set", "default.x=1"], "not a section"),
        (["support", "--set", "aliases=[:"], "not valid YAML"),
    ],
)
def test_bad_settings_are_named_and_not_written(engine: Engine, arguments: list[str], says: str) -> None:
    """A mistake changes nothing."""
    assert says in run(routes_cli.app, "set", *arguments, fails=ConfigError)
    assert SettingsState(engine).settings() == {}


def test_unknown_routes_are_answered_with_those_there_are(engine: Engine) -> None:
    """A typo is easily seen."""
    for command in (["show", "x"], ["set", "x", "--set", "default=true"]):
        assert "routes: other, support" in run(routes_cli.app, *command, fails=NotFoundError)


def test_a_state_store_can_be_named_without_a_stack(tmp_path: Path) -> None:
    """Routers that run on their own have no configuration of a stack."""
    url = f"sqlite:///{tmp_path}/other.db"
    run(keys_cli.app, "create", "a", "--state-url", url)
    assert [k.name for k in KeyState(open_state(url)).keys().values()] == ["a"]


def test_the_stacks_own_question_has_a_key_that_does_not_stay(engine: Engine, config: Path) -> None:
    """`up` asks its first question with a key that is deleted right after."""
    stack = load_serve_config(config)
    assert stack.router_config().keys
    with stack_key(stack) as headers:
        (key,) = KeyState(engine).keys().values()
        assert key.digest == digest_of(headers["Authorization"].removeprefix("Bearer ").encode())
    assert KeyState(engine).keys() == {}
    off = stack.model_copy(update={"router": stack.router.model_copy(update={"keys": False})})
    with stack_key(off) as headers:
        assert headers == {}
