"""`stillhouse routes …`: list routes, and read and change their settings.

Versions are handled here: settings are read, changed and written as one step, which is done again when
somebody else wrote in between. Knows nothing about what a setting does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine

from cli.options import Config
from cli.store import State, open_store
from contracts.config import load_config, parse_config
from contracts.errors import ConfigError, ConflictError, NotFoundError
from contracts.routes import RouteSettings
from serve.admin.checks import check_settings
from serve.state.settings import SettingsState
from serve.state.traffic import TrafficState

app = typer.Typer(no_args_is_help=True, help="Routes: their splits, names, defaults and limits.")
console = Console(highlight=False)

Route = Annotated[str, typer.Argument(help="The route: the public model name that clients ask for.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
_TRIES = 20


class _AnyFields(BaseModel):
    """Any mapping; its fields are checked once the overrides are in."""

    model_config = ConfigDict(extra="allow")


@app.command("list")
def list_routes(json_out: Json = False, config: Config = None, state_url: State = None) -> None:
    """All routes with their splits and the settings that are not the default."""
    engine = open_store(config, state_url)
    splits, settings = TrafficState(engine).splits(), SettingsState(engine).settings()
    if json_out:
        facts = {
            route: {
                "split": split.model_dump(mode="json"),
                "settings": _plain(settings[route]) if route in settings else None,
            }
            for route, split in sorted(splits.items())
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    if not splits:
        console.print("No routes yet; 'stillhouse up' makes those of the configuration.")
        return
    table = Table("route", "split", "stable", "canary", "weight", "settings")
    for route, split in sorted(splits.items()):
        stored = settings.get(route)
        changed = "-" if stored is None else f"v{stored.version}: {', '.join(_changed(stored)) or 'defaults'}"
        students = [(split.canary, split.weight)] if split.canary else []
        students += [(slot.upstream, slot.weight) for slot in split.others]
        canary = ", ".join(upstream.name for upstream, _ in students) or "-"
        weight = ", ".join(f"{100 * share:g} %" for _, share in students)
        table.add_row(route, f"v{split.version}", split.stable.name, canary, weight, changed)
    console.print(table)


@app.command()
def show(route: Route, json_out: Json = False, config: Config = None, state_url: State = None) -> None:
    """The settings of a route, as YAML that 'routes set' takes back."""
    engine = open_store(config, state_url)
    _must_exist(engine, route)
    facts = _plain(SettingsState(engine).get_settings(route) or RouteSettings(route=route))
    if json_out:
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), nl=False)


@app.command("set")
def set_settings(
    route: Route,
    file: Annotated[
        Path | None, typer.Argument(help="YAML or JSON file that replaces all settings of the route.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one field: --set limits.max_in_flight=64. Repeat it."),
    ] = None,
    config: Config = None,
    state_url: State = None,
) -> None:
    """Replace the settings of ROUTE by FILE, or change single fields; routers follow within a second."""
    if file is None and not overrides:
        raise ConfigError("nothing to set: give a file, or fields with --set limits.max_in_flight=64.")
    changes = dict(_override(text) for text in overrides or ())
    engine = open_store(config, state_url)
    _must_exist(engine, route)
    written = _write(engine, route, file, changes)
    console.print(f"Route {route}: settings {written.version}. {_sentence(written)}", markup=False)


def _write(engine: Engine, route: str, file: Path | None, changes: dict[str, Any]) -> RouteSettings:
    state, traffic = SettingsState(engine), TrafficState(engine)
    for _ in range(_TRIES):
        before = state.get_settings(route)
        base = _read_file(file) if file is not None else _plain(before or RouteSettings(route=route))
        if base.setdefault("route", route) != route:
            raise ConfigError(f"{file}: route: is {base['route']!r}, but {route!r} was named.")
        base["version"] = 1 if before is None else before.version + 1
        for dotted, value in changes.items():
            _put(base, dotted, value)
        new = parse_config(base, RouteSettings, "the settings")
        check_settings(new, state.settings(), traffic.splits())
        try:
            state.put_settings(new)
        except ConflictError:  # somebody else wrote since we read: read again
            continue
        return new
    raise ConflictError(f"the settings of route {route!r} change all the time; try again.")


def _read_file(file: Path) -> dict[str, Any]:
    """A file as RouteSettings would have it; `version` in it is nobody's business. Raises: ConfigError."""
    found = load_config(file, _AnyFields).model_dump()
    found.pop("version", None)
    return found


def _override(text: str) -> tuple[str, Any]:
    """'limits.max_in_flight=64' → ('limits.max_in_flight', 64); values are YAML."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip():
        raise ConfigError(f"--set {text!r}: write FIELD=VALUE, e.g. limits.max_in_flight=64.")
    if dotted.split(".")[0] in ("version", "route"):
        raise ConfigError(f"--set {text!r}: {dotted} is not yours to set.")
    try:
        return dotted.strip(), yaml.safe_load(value)
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {text!r}: the value is not valid YAML: {err}") from err


def _put(base: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    at = base
    for part in parents:
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, dict):
            raise ConfigError(f"--set {dotted}: {part!r} is not a section.")
    at[leaf] = value


def _must_exist(engine: Engine, route: str) -> None:
    splits = TrafficState(engine).splits()
    if route not in splits:
        known = ", ".join(sorted(splits)) or "none yet; 'stillhouse up' makes those of the configuration"
        raise NotFoundError(f"there is no route {route!r}; routes: {known}.")


def _plain(settings: RouteSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def _changed(settings: RouteSettings) -> list[str]:
    default = RouteSettings(route=settings.route, version=settings.version)
    return [f for f in RouteSettings.model_fields if getattr(settings, f) != getattr(default, f)]


def _sentence(settings: RouteSettings) -> str:
    changed = _changed(settings)
    return f"Not the default: {', '.join(changed)}." if changed else "Everything is the default."
