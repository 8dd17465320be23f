"""`stillhouse keys …`: make, list, change and delete API keys, and read what they used.

Works on the state store itself, so the first admin key needs nobody's permission but access to the store.
Running routers learn of every change within a second. Knows nothing about how keys are checked.
"""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cli.options import Config
from cli.store import State, open_store
from contracts.errors import ConfigError, NotFoundError
from contracts.keys import ApiKey
from contracts.routes import Priority
from serve.state.keys import KeyState, new_key
from serve.state.traffic import TrafficState

app = typer.Typer(no_args_is_help=True, help="API keys: who may ask the routers, for what, and how much.")
console = Console(highlight=False)

Key = Annotated[str, typer.Argument(help="Id of the key, or its name when only one key has it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
_UNITS = {"m": 60, "h": 3600, "d": 86400}


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is, for people.")],
    admin: Annotated[bool, typer.Option("--admin", help="May use the admin API.")] = False,
    route: Annotated[
        list[str] | None, typer.Option(help="May ask for this route; repeat it. All routes when left out.")
    ] = None,
    no_routes: Annotated[bool, typer.Option("--no-routes", help="May ask for no route.")] = False,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    priority: Annotated[
        str, typer.Option(help="high, normal or low: who waits when a route is full.")
    ] = "normal",
    expires: Annotated[str | None, typer.Option(help="After this long: 90m, 12h, 30d.")] = None,
    json_out: Json = False,
    config: Config = None,
    state_url: State = None,
) -> None:
    """Make a key and print its secret: this once, it is stored nowhere."""
    engine = open_store(config, state_url)
    key, secret = new_key(
        name,
        admin=admin,
        routes=() if no_routes else tuple(route) if route else None,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        priority=_priority(priority),
        expires_at=None if expires is None else time.time() + _seconds(expires),
    )
    unknown = [r for r in key.routes or () if r not in TrafficState(engine).splits()]
    KeyState(engine).create_key(key)
    if json_out:
        typer.echo(json.dumps({**_public(key), "secret": secret}, indent=2))
        return
    console.print(
        f"Key [bold]{key.id}[/] for {escape(name)}. Its secret, shown this once and stored nowhere:"
    )
    typer.echo(secret)
    for missing in unknown:
        console.print(f"[yellow]There is no route {missing!r} yet.[/]")


@app.command("list")
def list_keys(json_out: Json = False, config: Config = None, state_url: State = None) -> None:
    """All keys, without their secrets."""
    keys = KeyState(open_store(config, state_url)).keys().values()
    if json_out:
        typer.echo(json.dumps([_public(k) for k in keys], indent=2))
        return
    if not keys:
        console.print("No keys yet; 'stillhouse keys create NAME' makes one.")
        return
    table = Table(Column("id", no_wrap=True), "name", "scope", "requests/min", "tokens/min", "state")
    for k in keys:
        per_minute = (str(limit or "-") for limit in (k.requests_per_minute, k.tokens_per_minute))
        table.add_row(k.id, escape(k.name), _scope(k), *per_minute, _state(k))
    console.print(table)


@app.command()
def show(key: Key, json_out: Json = False, config: Config = None, state_url: State = None) -> None:
    """One key, without its secret."""
    found = _find(KeyState(open_store(config, state_url)), key)
    if json_out:
        typer.echo(json.dumps(_public(found), indent=2))
        return
    table = Table(show_header=False, box=None)
    for field, value in _public(found).items():
        table.add_row(field, _when(value) if field.endswith("_at") and value else escape(str(value)))
    table.add_row("state", _state(found))
    console.print(table)


@app.command()
def disable(key: Key, config: Config = None, state_url: State = None) -> None:
    """Refuse a key from now on, in every running router within a second. 'enable' undoes it."""
    state = KeyState(open_store(config, state_url))
    found = state.change_key(_find(state, key).id, disabled=True)
    console.print(f"Key {found.id} of {found.name!r} is disabled.", markup=False)


@app.command()
def enable(key: Key, config: Config = None, state_url: State = None) -> None:
    """Let a disabled key in again."""
    state = KeyState(open_store(config, state_url))
    found = state.change_key(_find(state, key).id, disabled=False)
    console.print(f"Key {found.id} of {found.name!r} works again.", markup=False)


@app.command()
def delete(
    key: Key,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config: Config = None,
    state_url: State = None,
) -> None:
    """Delete a key for good; what it used stays on record."""
    state = KeyState(open_store(config, state_url))
    found = _find(state, key)
    if not yes:
        typer.confirm(f"Delete key {found.id} of {found.name!r} for good?", abort=True)
    state.delete_key(found.id)
    console.print(f"Key {found.id} of {found.name!r} is gone.", markup=False)


@app.command()
def usage(
    key: Annotated[str | None, typer.Argument(help="Only this key (id or name); all when left out.")] = None,
    hours: Annotated[int, typer.Option(min=1, help="How many hours back, this one included.")] = 24,
    json_out: Json = False,
    config: Config = None,
    state_url: State = None,
) -> None:
    """Requests and tokens by key and hour, summed over all routers."""
    state = KeyState(open_store(config, state_url))
    key_id = None if key is None else _id_of(state, key)
    found = state.usage(key_id, int(time.time() // 3600) - hours + 1)
    if json_out:
        typer.echo(json.dumps([u.model_dump() for u in found], indent=2))
        return
    if not found:
        console.print(f"Nothing was used in the last {hours} h.")
        return
    names = {k.id: k.name for k in state.keys().values()}
    table = Table(
        "hour (UTC)", Column("key", no_wrap=True), "name", "requests", "prompt tokens", "completion tokens"
    )
    for u in found:
        counts = (u.requests, u.prompt_tokens, u.completion_tokens)
        table.add_row(_when(u.hour * 3600), u.key_id, escape(names.get(u.key_id, "-")), *map(str, counts))
    console.print(table)


def _find(state: KeyState, wanted: str) -> ApiKey:
    """A key by id or by unique name. Raises: NotFoundError, ConfigError when a name means several."""
    keys = state.keys()
    if wanted in keys:
        return keys[wanted]
    named = [k for k in keys.values() if k.name == wanted]
    if len(named) > 1:
        raise ConfigError(f"{len(named)} keys are named {wanted!r}: {', '.join(k.id for k in named)}.")
    if not named:
        raise NotFoundError(f"there is no key {wanted!r}; 'stillhouse keys list' shows all.")
    return named[0]


def _id_of(state: KeyState, wanted: str) -> str:
    """An id as it is when it was used once: a deleted key still has its usage."""
    return wanted if state.usage(wanted) else _find(state, wanted).id


def _public(key: ApiKey) -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"digest"})


def _scope(key: ApiKey) -> str:
    routes = "all routes" if key.routes is None else ", ".join(key.routes) or "no route"
    return f"admin, {routes}" if key.admin else routes


def _state(key: ApiKey) -> str:
    if key.disabled:
        return "disabled"
    if key.expires_at is None:
        return "in force"
    return "expired" if key.expires_at <= time.time() else f"until {_when(key.expires_at)}"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _priority(name: str) -> Priority:
    try:
        return Priority[name.upper()]
    except KeyError:
        raise ConfigError(f"--priority: {name!r} is none of high, normal and low.") from None


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)([mhd])", text)
    if not match or not int(match[1]):
        raise ConfigError(f"--expires: {text!r} is no time; give minutes, hours or days: 90m, 12h, 30d.")
    return int(match[1]) * _UNITS[match[2]]
