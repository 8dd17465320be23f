"""Every failure of the admin API as one body in OpenAI's shape; what a client sent is never repeated.

Knows nothing about what the endpoints do.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from contracts.errors import ConfigError, ConflictError, NotFoundError, StateError, StillhouseError
from contracts.logs import about
from serve.router.errors import error_body

_log = logging.getLogger("stillhouse.admin")
_STATUS: dict[type[Exception], tuple[int, str]] = {
    ConfigError: (400, "invalid_value"),
    NotFoundError: (404, "not_found"),
    ConflictError: (409, "conflict"),
    StateError: (503, "state_unavailable"),
}


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every reply that is not a success."""

    error: ErrorDetail


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": why}
    for status, why in (
        (400, "Bad fields, all of them named."),
        (401, "No admin key."),
        (403, "A key without the admin scope."),
        (404, "No such thing."),
        (409, "Somebody else was faster, or a rollout runs."),
        (413, "The body is too large."),
        (503, "The state store cannot be reached."),
    )
}


def reply(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    """An error reply."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"www-authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(error_body(message, kind, code, param), status, headers)


def install(app: FastAPI) -> None:
    """Make the application answer all of its errors this way."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(StillhouseError, _ours)
    app.add_exception_handler(SQLAlchemyError, _store)
    app.add_exception_handler(Exception, _bug)


def _invalid(_: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, RequestValidationError)
    found = [(".".join(str(p) for p in e["loc"][1:]) or "the body", e["msg"]) for e in err.errors()]
    return reply(400, "; ".join(f"{f}: {m}" for f, m in found), "invalid_value", found[0][0])


def _about(request: Request) -> dict[str, Any]:
    return about(request.headers.get("x-request-id"))


def _http(_: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, HTTPException)
    what = {404: "There is nothing at this path.", 405: "This method is not allowed here."}
    code = {404: "not_found", 405: "not_allowed", 413: "too_large"}.get(err.status_code, "invalid_value")
    return reply(err.status_code, what.get(err.status_code, str(err.detail)), code)


def _ours(_: Request, err: Exception) -> JSONResponse:
    status, code = next((s for kind, s in _STATUS.items() if isinstance(err, kind)), (500, "failed"))
    return reply(status, str(err), code)


def _store(request: Request, err: Exception) -> JSONResponse:
    _log.error("the state store failed: %s", type(err).__name__, extra=_about(request))
    return reply(503, "The state store cannot be reached at the moment.", "state_unavailable")


def _bug(request: Request, err: Exception) -> JSONResponse:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=err, extra=_about(request))
    return reply(500, "The admin API failed; its log says why.", "failed")
