"""From a client's bytes to a decided request: read the body, parse it once, find the route, assign the arm.

Refuses what no upstream should see. Knows nothing about upstreams' answers.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Any

import orjson

from contracts.keys import ApiKey
from contracts.routes import Affinity
from contracts.traffic import Arm
from serve.request_log.policy import effective
from serve.router.assign import assign, unit_of
from serve.router.bodies import parse
from serve.router.config import RouterConfig
from serve.router.errors import RequestRefused
from serve.router.exchange import Exchange
from serve.router.guard import Receive, Source
from serve.router.keys import KeyTable
from serve.router.shape import affinity_key, completion_cap
from serve.router.table import Route, RouteTable
from serve.router.tracing import Tracer

Headers = dict[bytes, bytes]

_REQUEST_ID = re.compile(rb"^[A-Za-z0-9._:-]{1,128}$")
_PASSED_ON = (b"traceparent", b"tracestate", b"openai-beta", b"anthropic-version", b"anthropic-beta")
_PASSED_ON_SET = frozenset(_PASSED_ON)
_ARMS = {b"stable": Arm.STABLE, b"canary": Arm.CANARY}


class Intake:
    """Makes exchanges of requests, under one configuration."""

    def __init__(
        self, config: RouterConfig, table: RouteTable, keys: KeyTable, tracer: Tracer | None = None
    ) -> None:
        self._config = config
        self._table = table
        self._keys = keys
        self._tracer = tracer
        # With traces of our own the upstream's parent is our span, not the client's.
        self._passed_on = _PASSED_ON if tracer is None else _PASSED_ON[1:]
        self._conversation = config.conversation_header.encode()
        self._wanted = frozenset(
            (b"x-request-id", b"x-stillhouse-arm", b"content-length", self._conversation, *_PASSED_ON)
        )

    def headers(self, scope: dict[str, Any]) -> Headers:
        """The few request headers that matter here. What is too much is refused by `check_head`."""
        wanted = self._wanted
        return {name: value for name, value in scope["headers"] if name in wanted}

    def check_head(self, scope: dict[str, Any]) -> None:
        """Raise RequestRefused when the request's head is too large."""
        limit = self._config.max_header_bytes
        size = len(scope.get("query_string", b""))
        for name, value in scope["headers"]:
            size += len(name) + len(value)
        if size > limit:
            raise RequestRefused(f"The request's head is larger than {limit} bytes.", 431)

    def admit(self, scope: dict[str, Any]) -> ApiKey | None:
        """Look at the head before anything is read: its size, and whose request it is."""
        self.check_head(scope)
        return self._keys.admit(scope["headers"])

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
        deadline = asyncio.get_running_loop().time() + self._config.timeouts.body_s
        message = await self._receive(receive, deadline)
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            parts, size = [body], len(body)
            while message.get("more_body"):
                message = await self._receive(receive, deadline)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise _too_large(limit)
            body = b"".join(parts)
        if len(body) > limit:
            raise _too_large(limit)
        return body

    def exchange(
        self, request_id: str, endpoint: str, headers: Headers, body: bytes, key: ApiKey | None
    ) -> Exchange:
        """Parse, find the route and decide the arm. Raises RequestRefused. Never waits."""
        started = time.perf_counter()
        parsed = _parse(body, self._config.max_json_depth)
        route = self._route(parsed.get("model"), key)
        override = self._override(headers, route)
        conversation = headers.get(self._conversation, b"").decode("utf-8", "replace")
        kind, unit = unit_of(conversation, parsed, request_id)
        trace = b""
        if not _PASSED_ON_SET.isdisjoint(headers):
            trace = b"".join(n + b": " + headers[n] + b"\r\n" for n in self._passed_on if n in headers)
        assignment = assign(route.split, kind, unit, override)
        ex = Exchange(request_id, endpoint, route, assignment, parsed, started, trace)
        ex.body_bytes = len(body)
        settings = route.settings
        if settings.limits.max_tokens is not None:
            ex.cap = completion_cap(endpoint, {**settings.parameters, **parsed}, settings.limits.max_tokens)
        if settings.affinity is not Affinity.NONE:
            ex.affinity = affinity_key(settings.affinity, unit, parsed)
        ex.log_policy = settings.log
        if key is not None:
            ex.key_id, ex.priority = key.id, key.priority
            ex.limits = self._keys.limit_lines(key)
            if key.log is not None:
                ex.log_policy = effective(settings.log, key.log)
        if self._tracer is not None:
            ex.span = self._tracer.begin(headers.get(b"traceparent"))
            ex.trace += ex.span.header()
        return ex

    def _route(self, model: object, key: ApiKey | None) -> Route:
        if not isinstance(model, str) or not model:
            raise RequestRefused("'model' is required and must be the name of a route.", param="model")
        route = self._table.resolve(model)
        if route is None:
            names = ", ".join(self._table.public_names(key)) or "none yet"
            raise RequestRefused(
                f"The model {model[:128]!r} does not exist. Routes: {names}.", 404, "model_not_found", "model"
            )
        self._keys.check_route(key, route.split.route)
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

    async def _receive(self, receive: Receive, deadline: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout_at(deadline):
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
    return f"req-{secrets.token_hex(16)}"


def _parse(body: bytes, max_depth: int) -> dict[str, Any]:
    if not body:
        raise RequestRefused("The request body is empty; it must be a JSON object.")
    try:
        parsed = parse(body)
    except orjson.JSONDecodeError as err:
        raise RequestRefused(f"The request body is not valid JSON: {err}.") from err
    if not isinstance(parsed, dict):
        raise RequestRefused("The request body must be a JSON object.")
    # Only a body with that many brackets can be that deep; counting them costs next to nothing.
    if body.count(b"[") + body.count(b"{") > max_depth and _deeper(parsed, max_depth):
        raise RequestRefused(f"The request body is nested too deeply: more than {max_depth} levels.")
    return parsed


def _deeper(value: dict[str, Any], levels: int) -> bool:
    """True when lists and objects are nested deeper than this. Level by level: no recursion to exhaust."""
    level: list[Any] = [value]
    for _ in range(levels):
        inside = [v for c in level for v in (c.values() if type(c) is dict else c)]
        level = [v for v in inside if type(v) is dict or type(v) is list]
        if not level:
            return False
    return True


def _too_large(limit: int) -> RequestRefused:
    return RequestRefused(f"The request body is larger than {limit} bytes.", 413)
