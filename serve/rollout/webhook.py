"""One signed POST to a webhook. No retry, no redirect, never a word of secrets in what it says of a failure.

Headers: X-Stillhouse-Event, -Event-Id (the same at every try: receivers drop what they know),
-Timestamp (Unix seconds) and, with a secret, -Signature: sha256=HMAC-SHA256(secret, "timestamp.body") in hex.
Knows nothing about rollouts.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPMessage
from typing import IO, NamedTuple

from contracts.hooks import HookSpec, check_url

_WORDS = 200
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


class Reply(NamedTuple):
    """What came back: an HTTP status, or None and what went wrong."""

    status: int | None
    words: str

    @property
    def accepted(self) -> bool:
        """It was taken, or confirmed."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def refused(self) -> bool:
        """A no that asking again at once will not change. 408 and 429 ask for patience instead."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in (408, 429)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send a signed message to an address that the operator did not write down."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def post(hook: HookSpec, body: str, event: str, event_id: str, now: float) -> Reply:
    """Send one message; every failure is a Reply."""
    try:
        request = _request(hook, body.encode(), event, event_id, now)
    except ValueError as err:
        return Reply(None, str(err))
    try:
        with _OPENER.open(request, timeout=hook.timeout_s) as answer:
            return Reply(answer.status, _words(answer))
    except urllib.error.HTTPError as err:
        with err:
            return Reply(err.code, f"HTTP {err.code} {_words(err)}".rstrip())
    except urllib.error.URLError as err:
        return Reply(None, f"cannot be reached ({err.reason})")
    except (OSError, HTTPException, ValueError) as err:
        return Reply(None, f"did not answer properly ({type(err).__name__})")


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """What the signature header says; receivers compute the same over the raw body."""
    mac = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return f"sha256={mac.hexdigest()}"


def _request(hook: HookSpec, body: bytes, event: str, event_id: str, now: float) -> urllib.request.Request:
    timestamp = str(int(now))
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "stillhouse",
        "X-Stillhouse-Event": event,
        "X-Stillhouse-Event-Id": event_id,
        "X-Stillhouse-Timestamp": timestamp,
    }
    if hook.secret_env is not None:
        headers["X-Stillhouse-Signature"] = signature(_env(hook.secret_env), timestamp, body)
    url = hook.url
    if url is None:
        assert hook.url_env is not None
        url = _env(hook.url_env)
        check_url(url)
    return urllib.request.Request(url, data=body, headers=headers, method="POST")


def _env(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(f"{name} is not set in the controller's environment")
    return value


def _words(answer: object) -> str:
    try:
        found: bytes = answer.read1(4 * _WORDS)  # type: ignore[attr-defined]
    except (OSError, HTTPException, AttributeError):
        return ""
    return _CONTROL.sub(" ", found.decode("utf-8", "replace")).strip()[:_WORDS]
