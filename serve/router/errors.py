"""Errors as OpenAI's clients expect them, and the two exceptions of the data plane.

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
