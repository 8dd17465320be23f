"""The admin API as one application: keys, routes, rollouts, the stack behind an admin key, and the console.

Talks to the state store only; routers learn of every change through their polls. Knows nothing about how it
is hosted.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from sqlalchemy import Engine

from serve.admin.auth import HEALTH, AdminOnly
from serve.admin.errors import DOCUMENTED, install
from serve.admin.events import events_router
from serve.admin.keys import key_router
from serve.admin.pages import console_router, open_paths
from serve.admin.rollouts import rollout_router
from serve.admin.routes import route_router
from serve.state.keys import KeyState

_ABOUT = "Keys, routes and rollouts of one Stillhouse. Every request needs an admin key as a bearer token."


class AdminApp(FastAPI):
    """FastAPI, with a document that says what is true: the key, and no reply that is never sent."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        document = super().openapi()
        if "security" not in document:
            document["security"] = [{"adminKey": []}]
            schemes = document["components"].setdefault("securitySchemes", {})
            schemes["adminKey"] = {"type": "http", "scheme": "bearer"}
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        return document


def create_app(engine: Engine, insecure: bool = False) -> FastAPI:
    """The application over one state store. `insecure`: without keys; the caller checks the address."""
    app = AdminApp(
        title="Stillhouse admin API",
        description=_ABOUT,
        version=_version(),
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses=DOCUMENTED,
    )
    keys = KeyState(engine)
    install(app)
    app.include_router(key_router(keys))
    app.include_router(route_router(engine))
    app.include_router(rollout_router(engine))
    app.include_router(events_router(engine))
    app.include_router(console_router(insecure))
    find = None if insecure else keys.find
    app.add_middleware(AdminOnly, find=find, open_paths=open_paths() | {HEALTH})

    @app.get(HEALTH, include_in_schema=False)
    def health() -> dict[str, str]:
        """Open to everybody; says nothing but that this process answers."""
        return {"status": "ok"}

    return app


def _version() -> str:
    try:
        return version("stillhouse")
    except PackageNotFoundError:  # a checkout that was not installed
        return "0"
