"""From a client's bytes to a decided request: read the body, parse it once, find the route, assign the arm.

Refuses what no upstream should see. Knows nothing about upstreams' answers.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from typing import Any

import orjson

from contracts.traffic import Arm
from serve.router.assign import assign, unit_of
from serve.router.config import RouterConfig
from serve.router.errors import RequestRefused
from serve.router.exchange import Exchange
from serve.router.guard import Receive, Source
from serve.router.table import Route, RouteTable

Headers = dict[bytes, bytes]

_REQUEST_ID = re.compile(rb"^[A-Za-z0-9._:-]{1,128}$")
_PASSED_ON = (b"traceparent", b"tracestate", b"openai-beta", b"anthropic-version", b"anthropic-beta")
_PASSED_ON_SET = frozenset(_PASSED_ON)
_ARMS = {b"stable": Arm.STABLE, b"canary": Arm.CANARY}


class Intake:
    """Makes exchanges of requests, under one configuration."""

    def __init__(self, config: RouterConfig, table: RouteTable) -> None:
        self._config = config
        self._table = table
        self._conversation = config.conversation_header.encode()
        self._wanted = frozenset(
            (b"x-request-id", b"x-stillhouse-arm", b"content-length", self._conversation, *_PASSED_ON)
        )

    def headers(self, scope: dict[str, Any]) -> Headers:
        """The few request headers that matter here."""
        wanted = self._wanted
        return {name: value for name, value in scope["headers"] if name in wanted}

    async def read_body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole request body. Raises RequestRefused when it is too large or does not come."""
        limit = self._config.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        whole = receive.whole_body() if isinstance(receive, Source) else None
        if whole is not None:  # nearly always: it came with the head
            if len(whole) > limit:
                raise _too_large(limit)
            return whole
        message = await self._receive(receive)
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            parts, size = [body], len(body)
            while message.get("more_body"):
                message = await self._receive(receive)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise _too_large(limit)
            body = b"".join(parts)
        if len(body) > limit:
            raise _too_large(limit)
        return body

    def exchange(self, request_id: str, endpoint: str, headers: Headers, body: bytes) -> Exchange:
        """Parse, find the route and decide the arm. Raises RequestRefused. Never waits."""
        started = time.perf_counter()
        parsed = _parse(body)
        route = self._route(parsed.get("model"))
        override = self._override(headers, route)
        try:
            conversation = headers.get(self._conversation, b"").decode("utf-8", "replace")
            kind, unit = unit_of(conversation, parsed, request_id)
        except orjson.JSONEncodeError as err:
            raise RequestRefused(f"The request body is nested too deeply: {err}.") from err
        trace = b""
        if not _PASSED_ON_SET.isdisjoint(headers):
            trace = b"".join(n + b": " + headers[n] + b"\r\n" for n in _PASSED_ON if n in headers)
        assignment = assign(route.split, kind, unit, override)
        return Exchange(request_id, endpoint, route, assignment, parsed, started, trace)

    def _route(self, model: object) -> Route:
        if not isinstance(model, str) or not model:
            raise RequestRefused("'model' is required and must be the name of a route.", param="model")
        route = self._table.get(model)
        if route is None:
            names = ", ".join(self._table.names()) or "none yet"
            raise RequestRefused(
                f"The model {model[:128]!r} does not exist. Routes: {names}.", 404, "model_not_found", "model"
            )
        return route

    def _override(self, headers: Headers, route: Route) -> Arm | None:
        wish = headers.get(b"x-stillhouse-arm")
        if wish is None or not self._config.allow_override:
            return None
        arm = _ARMS.get(wish.strip().lower())
        if arm is None:
            raise RequestRefused("x-stillhouse-arm must be 'stable' or 'canary'.", param="x-stillhouse-arm")
        if route.upstream(arm) is None:
            raise RequestRefused(
                f"Route {route.split.route!r} has no {arm.value} at the moment.", param="x-stillhouse-arm"
            )
        return arm

    async def _receive(self, receive: Receive) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._config.timeouts.body_s):
                message = await receive()
        except TimeoutError as err:
            raise RequestRefused("The request body did not arrive in time.", 408) from err
        if message["type"] == "http.disconnect":
            raise RequestRefused("The client closed the connection.", 499)
        return message


def request_id_of(headers: Headers) -> str:
    """The client's own request id when it is a sane one, otherwise a new one."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.match(given):
        return given.decode("ascii")
    return f"req-{uuid.uuid4().hex}"


def _parse(body: bytes) -> dict[str, Any]:
    if not body:
        raise RequestRefused("The request body is empty; it must be a JSON object.")
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as err:
        raise RequestRefused(f"The request body is not valid JSON: {err}.") from err
    if not isinstance(parsed, dict):
        raise RequestRefused("The request body must be a JSON object.")
    return parsed


def _too_large(limit: int) -> RequestRefused:
    return RequestRefused(f"The request body is larger than {limit} bytes.", 413)
