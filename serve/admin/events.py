"""What is going on, in one reply: every route's live split, its routers and its rollout, with an ETag.

A console asks for it about once a second; as long as nothing changed the answer is 304 without a body.
Knows nothing about how it is shown.
"""

from __future__ import annotations

import time
from collections import Counter
from hashlib import sha256
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy import Engine

from contracts.config import Record
from serve.admin.rollouts import RolloutLine, line
from serve.admin.routes import FRESH_S
from serve.state.look import ControllerLease, RolloutPages
from serve.state.rollouts import RolloutState
from serve.state.settings import SettingsState
from serve.state.traffic import RouterReport, TrafficState


class RouteLine(Record):
    """A route as its routers serve it now."""

    route: str
    aliases: tuple[str, ...]
    split_version: int
    stable: str
    canary: str | None
    weight: float
    shadow: str | None
    routers: dict[int, int]
    """Split version → router processes that assign with it; 0: those that do not know the route yet."""
    agreed: bool
    """Every router assigns with the stored version."""
    in_flight: dict[str, int]
    """Upstream of this route → requests in flight there, over all routers."""
    rollout_id: str | None


class RouterLine(Record):
    """A router process that reported lately."""

    replica: str
    in_flight: int


class Overview(Record):
    """What is going on."""

    at: float
    """The server's clock, Unix seconds."""
    controller: ControllerLease | None
    """Who acts on rollouts; null: nobody."""
    routes: list[RouteLine]
    rollouts: list[RolloutLine]
    """Those that run, the oldest first."""
    routers: list[RouterLine]


class Overviews:
    """Reads the state store, once per request."""

    def __init__(self, engine: Engine) -> None:
        self._traffic, self._settings = TrafficState(engine), SettingsState(engine)
        self._rollouts, self._pages = RolloutState(engine), RolloutPages(engine)

    def now(self) -> Overview:
        """The whole of it."""
        routers, settings = self._traffic.routers(FRESH_S), self._settings.settings()
        running = self._rollouts.active()
        by_route = {r.spec.route: r.spec.id for r in running}
        routes = []
        for route, split in sorted(self._traffic.splits().items()):
            mine = settings.get(route)
            names = [u.name for u in split.upstreams]
            versions = Counter(r.versions.get(route, 0) for r in routers)
            routes.append(
                RouteLine(
                    route=route,
                    aliases=mine.aliases if mine else (),
                    split_version=split.version,
                    stable=split.stable.name,
                    canary=split.canary.name if split.canary else None,
                    weight=split.weight,
                    shadow=mine.shadow.upstream.name if mine and mine.shadow else None,
                    routers=dict(sorted(versions.items())),
                    agreed=set(versions) <= {split.version},
                    in_flight={name: sum(r.in_flight.get(name, 0) for r in routers) for name in names},
                    rollout_id=by_route.get(route),
                )
            )
        return Overview(
            at=time.time(),
            controller=self._pages.controller(),
            routes=routes,
            rollouts=[line(r) for r in running],
            routers=[_router(r) for r in routers],
        )


def events_router(engine: Engine) -> APIRouter:
    """The endpoint over one state store."""
    overviews = Overviews(engine)
    api = APIRouter(prefix="/v1", tags=["stack"])

    @api.get("/events", response_model=Overview, responses={304: {"description": "Nothing changed."}})
    def show_events(request: Request, response: Response) -> Any:
        """What is going on. Send the last reply's ETag as If-None-Match: 304 while nothing changed."""
        overview = overviews.now()
        tag = _tag(overview)
        if tag in [t.strip() for t in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers={"etag": tag})
        response.headers["etag"] = tag
        return overview

    return api


def _router(report: RouterReport) -> RouterLine:
    return RouterLine(replica=report.replica, in_flight=sum(report.in_flight.values()))


def _tag(overview: Overview) -> str:
    """Identity of all that is shown: clocks that only tick are not part of it."""
    lease = overview.controller and overview.controller.model_copy(update={"expires_at": 0.0})
    still = overview.model_copy(update={"at": 0.0, "controller": lease})
    return f'W/"{sha256(still.model_dump_json().encode()).hexdigest()[:32]}"'
