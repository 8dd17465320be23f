"""Endpoints of API keys: make, list, change, delete, and what they used.

A secret is in one reply, the one that made it. Knows nothing about who may call this (auth.py).
"""

from __future__ import annotations

import logging
import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field

from contracts.config import Record
from contracts.errors import ConfigError
from contracts.keys import ApiKey, KeyUsage
from contracts.routes import LogPolicy, Priority
from contracts.traffic import NAME
from serve.state.keys import KeyState, new_key

_log = logging.getLogger("stillhouse.admin")

KeyId = Annotated[str, Path(pattern=NAME, description="Id of the key, as listed.")]
Name = Annotated[str, Field(min_length=1, max_length=128, description="Whose it is, for people.")]
RouteNames = Annotated[
    tuple[Annotated[str, Field(pattern=NAME)], ...] | None,
    Field(description="Routes it may ask for; null: all of them; empty: none."),
]
PerMinute = Annotated[int, Field(ge=1)]
Expires = Annotated[float | None, Field(gt=0, description="Unix seconds; null: never.")]
Hours = Annotated[int, Query(ge=1, le=24 * 400, description="How many hours back, this one included.")]


def _absent(schema: dict[str, Any]) -> None:
    """What is left out of a PATCH stays as it is: it has no default to document."""
    schema.pop("default", None)


class KeyBody(Record):
    """What a new key is to be."""

    name: Name
    admin: bool = False
    routes: RouteNames = None
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    priority: Priority = Priority.NORMAL
    log: LogPolicy | None = None
    expires_at: Expires = None


class KeyPatch(Record):
    """Changes of a key; what is left out stays as it is."""

    name: Name = Field(default="-", json_schema_extra=_absent)
    admin: bool = Field(default=False, json_schema_extra=_absent)
    routes: RouteNames = Field(default=None, json_schema_extra=_absent)
    requests_per_minute: PerMinute | None = Field(default=None, json_schema_extra=_absent)
    tokens_per_minute: PerMinute | None = Field(default=None, json_schema_extra=_absent)
    priority: Priority = Field(default=Priority.NORMAL, json_schema_extra=_absent)
    log: LogPolicy | None = Field(default=None, json_schema_extra=_absent)
    expires_at: Expires = Field(default=None, json_schema_extra=_absent)
    disabled: bool = Field(default=False, json_schema_extra=_absent)


class KeyView(KeyBody):
    """A key as it is shown: everything but its digest."""

    id: str
    created_at: float
    disabled: bool


class NewKey(KeyView):
    """A key right after it was made."""

    secret: str
    """Shown this once; it is stored nowhere."""


class KeyList(Record):
    """All keys."""

    object: str = "list"
    data: list[KeyView]


class UsageList(Record):
    """Use by key and hour, the oldest first."""

    object: str = "list"
    data: list[KeyUsage]


class Deleted(Record):
    """A key that is gone."""

    id: str
    deleted: bool = True


def key_router(keys: KeyState) -> APIRouter:
    """The endpoints over one state store."""
    api = APIRouter(prefix="/v1", tags=["keys"])

    @api.post("/keys", status_code=201)
    def create_key(body: KeyBody, request: Request) -> NewKey:
        """Make a key. Its secret is in this reply and nowhere else."""
        if body.expires_at is not None and body.expires_at <= time.time():
            raise ConfigError("expires_at: is in the past; give Unix seconds of a moment to come.")
        key, secret = new_key(**body.model_dump())
        keys.create_key(key)
        _say(request, "made", key.id)
        return NewKey(secret=secret, **_fields(key))

    @api.get("/keys")
    def list_keys() -> KeyList:
        """All keys, the oldest first."""
        return KeyList(data=[KeyView(**_fields(key)) for key in keys.keys().values()])

    @api.get("/keys/{key_id}")
    def show_key(key_id: KeyId) -> KeyView:
        """One key."""
        return KeyView(**_fields(keys.get_key(key_id)))

    @api.patch("/keys/{key_id}")
    def change_key(key_id: KeyId, body: KeyPatch, request: Request) -> KeyView:
        """Change fields of a key, also `disabled`. Routers know within a second."""
        changed = keys.change_key(key_id, **body.model_dump(exclude_unset=True))
        _say(request, f"changed {', '.join(sorted(body.model_fields_set))} of", key_id)
        return KeyView(**_fields(changed))

    @api.delete("/keys/{key_id}")
    def delete_key(key_id: KeyId, request: Request) -> Deleted:
        """Delete a key; its usage stays. Disabling it can be undone, this cannot."""
        keys.delete_key(key_id)
        _say(request, "deleted", key_id)
        return Deleted(id=key_id)

    @api.get("/keys/{key_id}/usage")
    def key_usage(key_id: KeyId, hours: Hours = 24) -> UsageList:
        """Requests and tokens of one key by hour; also of a deleted one."""
        return UsageList(data=keys.usage(key_id, _since(hours)))

    @api.get("/usage")
    def all_usage(hours: Hours = 24) -> UsageList:
        """Requests and tokens of every key by hour."""
        return UsageList(data=keys.usage(None, _since(hours)))

    return api


def _since(hours: int) -> int:
    return int(time.time() // 3600) - hours + 1


def _fields(key: ApiKey) -> dict[str, Any]:
    return key.model_dump(exclude={"digest"})


def _say(request: Request, what: str, key_id: str) -> None:
    _log.info("%s %s key %s", getattr(request.state, "admin", "somebody"), what, key_id)
