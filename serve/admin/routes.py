"""Endpoints of routes: settings by compare-and-set, splits, and a look at upstreams and routers.

Knows nothing about who may call this (auth.py), and leaves a route alone while a rollout moves it.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import Field
from sqlalchemy import Engine

from contracts.config import Record, parse_config
from contracts.errors import ConfigError, ConflictError, NotFoundError
from contracts.routes import RouteSettings
from contracts.traffic import NAME, Split, Upstream
from serve.admin.checks import check_secrets, check_settings, known_upstreams
from serve.state.rollouts import RolloutState
from serve.state.settings import SettingsState
from serve.state.traffic import Endpoint, RouterReport, TrafficState

_log = logging.getLogger("stillhouse.admin")
FRESH_S = 15.0
"""Routers and replicas that were silent for longer are not listed."""

RouteName = Annotated[str, Path(pattern=NAME, description="Name of the route.")]


class SettingsBody(RouteSettings):
    """Settings of a route. `version` is the one that was read (0: none yet); the written one is above it."""

    version: int = Field(default=0, ge=0)


class SplitPatch(Record):
    """Changes of a split; what is left out stays as it is."""

    version: int = Field(ge=1, description="The version that was read.")
    weight: float | None = Field(default=None, ge=0.0, le=1.0)
    stable: Upstream | None = None
    canary: Upstream | None = Field(default=None, description="null takes it away; then the weight is 0.")


class RouteView(Record):
    """One route: its split, its settings and the rollout that moves it."""

    route: str
    split: Split
    settings: SettingsBody
    rollout_id: str | None


class RouteList(Record):
    """All routes."""

    object: str = "list"
    data: list[RouteView]


class UpstreamView(Record):
    """An upstream and the replicas that registered for it."""

    upstream: Upstream
    routes: list[str]
    replicas: list[Endpoint]


class UpstreamList(Record):
    """All upstreams that routes refer to."""

    object: str = "list"
    data: list[UpstreamView]


class RouterList(Record):
    """Router processes that reported lately."""

    object: str = "list"
    data: list[RouterReport]


class Routes:
    """What the endpoints do, over one state store."""

    def __init__(self, engine: Engine) -> None:
        self._traffic = TrafficState(engine)
        self._settings = SettingsState(engine)
        self._rollouts = RolloutState(engine)

    def all(self) -> list[RouteView]:
        """Every route by name."""
        splits, settings = self._traffic.splits(), self._settings.settings()
        active = {r.spec.route: r.spec.id for r in self._rollouts.active()}
        return [
            RouteView(route=route, split=split, settings=_view(route, settings), rollout_id=active.get(route))
            for route, split in sorted(splits.items())
        ]

    def settings(self, route: str) -> SettingsBody:
        """The settings of a route, or the defaults at version 0."""
        self.split(route)
        return _view(route, self._settings.settings())

    def put_settings(self, route: str, body: SettingsBody) -> SettingsBody:
        """Replace the settings of a route. Raises: ConflictError, ConfigError, NotFoundError."""
        if body.route != route:
            raise ConfigError(f"route: the body says {body.route!r}, the path {route!r}.")
        new = RouteSettings(**{**body.model_dump(), "version": body.version + 1})
        settings, splits = self._settings.settings(), self._traffic.splits()
        check_settings(new, settings, splits)
        check_secrets(known_upstreams([new], []), known_upstreams(settings.values(), splits.values()))
        self._settings.put_settings(new)
        return SettingsBody(**new.model_dump())

    def split(self, route: str) -> Split:
        """The split of a route. Raises: NotFoundError."""
        found = self._traffic.get_split(route)
        if found is None:
            known = ", ".join(sorted(self._traffic.splits())) or "none"
            raise NotFoundError(f"there is no route {route!r}; routes: {known}.")
        return found

    def patch_split(self, route: str, body: SplitPatch) -> Split:
        """Change a split by hand. Raises: ConflictError while a rollout runs, or on a lost race."""
        before = self.split(route)
        if active := self._rollouts.active(route):
            raise ConflictError(
                f"rollout {active[0].spec.id} moves route {route!r}; steer that with 'stillhouse rollout'."
            )
        if before.version != body.version:
            raise ConflictError(f"the split of route {route!r} is at version {before.version} by now.")
        if "stable" in body.model_fields_set and body.stable is None:
            raise ConfigError("stable: a route cannot be without it.")
        changes: dict[str, Any] = {f: getattr(body, f) for f in body.model_fields_set - {"version"}}
        if changes.get("weight", 0.0) is None:
            raise ConfigError("weight: must be a number from 0 to 1.")
        if "canary" in changes and changes["canary"] is None:
            changes.setdefault("weight", 0.0)
        fields = {**before.model_dump(), "rollout_id": None, "window": None, "others": (), **changes}
        after = parse_config({**fields, "version": before.version + 1}, Split, "the split")
        stored = known_upstreams(self._settings.settings().values(), self._traffic.splits().values())
        check_secrets(known_upstreams([], [after]), stored)
        self._traffic.put_split(after)
        return after

    def upstreams(self) -> list[UpstreamView]:
        """Every upstream that a route refers to."""
        endpoints = self._traffic.endpoints(FRESH_S)
        settings = self._settings.settings()
        views: dict[str, UpstreamView] = {}
        for route, split in sorted(self._traffic.splits().items()):
            mine = [settings[route]] if route in settings else []
            for upstream in known_upstreams(mine, [split]):
                key = upstream.model_dump_json()
                routes = views[key].routes if key in views else []
                views[key] = UpstreamView(
                    upstream=upstream,
                    routes=[*routes, *([] if route in routes else [route])],
                    replicas=[e for part in upstream.parts for e in endpoints.get(part.app or "", [])],
                )
        return list(views.values())

    def routers(self) -> list[RouterReport]:
        """Router processes that reported lately."""
        return self._traffic.routers(FRESH_S)


def route_router(engine: Engine) -> APIRouter:
    """The endpoints over one state store."""
    routes = Routes(engine)
    api = APIRouter(prefix="/v1")

    @api.get("/routes", tags=["routes"])
    def list_routes() -> RouteList:
        """All routes with their splits and settings."""
        return RouteList(data=routes.all())

    @api.get("/routes/{route}/settings", tags=["routes"])
    def show_settings(route: RouteName) -> SettingsBody:
        """The settings of a route."""
        return routes.settings(route)

    @api.put("/routes/{route}/settings", tags=["routes"])
    def put_settings(route: RouteName, body: SettingsBody, request: Request) -> SettingsBody:
        """Replace the settings: read them, change them, send them back with the version that was read."""
        written = routes.put_settings(route, body)
        _say(request, f"wrote settings {written.version} of", route)
        return written

    @api.get("/routes/{route}/split", tags=["routes"])
    def show_split(route: RouteName) -> Split:
        """The split of a route."""
        return routes.split(route)

    @api.patch("/routes/{route}/split", tags=["routes"])
    def patch_split(route: RouteName, body: SplitPatch, request: Request) -> Split:
        """Change a split by hand; refused while a rollout moves the route."""
        written = routes.patch_split(route, body)
        _say(request, f"wrote split {written.version} of", route)
        return written

    @api.get("/upstreams", tags=["stack"])
    def list_upstreams() -> UpstreamList:
        """Upstreams with their replicas."""
        return UpstreamList(data=routes.upstreams())

    @api.get("/routers", tags=["stack"])
    def list_routers() -> RouterList:
        """Router processes, the versions they assign with and what they have in flight."""
        return RouterList(data=routes.routers())

    return api


def _view(route: str, settings: dict[str, RouteSettings]) -> SettingsBody:
    stored = settings.get(route)
    return SettingsBody(**stored.model_dump()) if stored else SettingsBody(route=route)


def _say(request: Request, what: str, route: str) -> None:
    _log.info("%s %s route %s", getattr(request.state, "admin", "somebody"), what, route)
