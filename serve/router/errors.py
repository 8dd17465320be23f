"""Errors as OpenAI's and Anthropic's clients expect them, and the two exceptions of the data plane.

Knows nothing about upstreams or sockets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from contracts.errors import EngineError, StillhouseError
from contracts.traffic import Outcome


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_ANTHROPIC = "/v1/messages"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_for(endpoint: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """An error in the shape of the endpoint's API: Anthropic's for Messages, OpenAI's for all others."""
    if not endpoint.startswith(_ANTHROPIC) or body.get("type") == "error":
        return body
    error = body["error"]
    message = error.get("message") if isinstance(error, dict) else error
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(message)}}


class RequestRefused(StillhouseError):
    """The router itself will not pass this request on; carries the reply."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        *,
        kind: str = "invalid_request_error",
        headers: Iterable[tuple[bytes, bytes]] = (),
        route: str | None = None,
    ) -> None:
        """`headers`: of the reply. `route`: whose request it was, once that is known."""
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.route = route
        self.body = error_body(message, kind, code, param)


class AttemptFailed(EngineError):
    """One try at one replica failed before its first byte reached the client, so another may follow."""

    def __init__(
        self,
        message: str,
        outcome: Outcome = Outcome.UPSTREAM_ERROR,
        status: int = 502,
        connect: bool = False,
        reply: tuple[bytes, bytes] | None = None,
    ) -> None:
        """`connect`: nothing was sent, so the same replica may be asked again. `reply`: (content type, body)
        of an upstream that did answer, passed on when nobody does better."""
        super().__init__(message)
        self.outcome = outcome
        self.status = status
        self.connect = connect
        self.reply = reply
