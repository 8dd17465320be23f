"""An external Prometheus, asked for single numbers. What is not one finite number is a Problem in a sentence.

HTTP API v1, POST /api/v1/query at a given instant. One that is down is left alone for a while, so that a tick
never waits for it twice. Knows nothing about rollouts.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from contracts.errors import StillhouseError
from contracts.grading import PrometheusConfig

_MAX_REPLY = 2**20
_LEFT_ALONE_S = 10.0
_WORDS = 300


class Problem(StillhouseError):
    """There is no number; the message says why and what to look at."""


class Refused(Problem):
    """Prometheus cannot evaluate the query: it is the query that is wrong."""


class Empty(Problem):
    """The query is right and nothing matches it."""


class NotFinite(Problem):
    """The query is right and its value is NaN or infinite, as a share of nothing is."""


class Prometheus:
    """One server. Safe to be used from several threads."""

    def __init__(self, config: PrometheusConfig, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._down_until = float("-inf")
        self._down_why = ""

    def number(self, query: str, at: float) -> float:
        """The query's value at an instant (Unix seconds). Raises: Problem."""
        data = self._ask(query, at)
        kind, result = data.get("resultType"), data.get("result")
        if kind == "scalar" and isinstance(result, list) and len(result) == 2:
            return _finite(result[1], query)
        if kind != "vector" or not isinstance(result, list):
            raise Refused(f"{_quoted(query)} gives a {kind}, not one number; ask for an instant value.")
        if not result:
            raise Empty(f"{_quoted(query)} returned nothing: is every metric and label in it named right?")
        if len(result) > 1:
            raise Problem(f"{_quoted(query)} returned {len(result)} series; make it one, e.g. with sum(…).")
        try:
            return _finite(result[0]["value"][1], query)
        except (TypeError, KeyError, IndexError) as err:
            raise Problem(f"{_quoted(query)}: the answer has no value (a native histogram?).") from err

    def _ask(self, query: str, at: float) -> dict[str, Any]:
        with self._lock:
            if self._monotonic() < self._down_until:
                raise Problem(self._down_why)
        try:
            status, body = self._post({"query": query, "time": f"{at:.3f}"})
        except (OSError, HTTPException) as err:
            reason = getattr(err, "reason", err)
            with self._lock:
                self._down_until = self._monotonic() + _LEFT_ALONE_S
                self._down_why = f"Prometheus at {self._config.url} cannot be asked: {reason}."
                raise Problem(self._down_why) from err
        try:
            reply = json.loads(body)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise Problem(f"{self._config.url} answered {status}, and not as Prometheus does; check the URL.")
        if reply.get("status") != "success" or not isinstance(reply.get("data"), dict):
            why = f"{reply.get('errorType', status)}: {reply.get('error', 'no reason given')}"[:_WORDS]
            kind = Refused if reply.get("errorType") == "bad_data" else Problem
            raise kind(f"{_quoted(query)} was refused: {why}.")
        return dict(reply["data"])

    def _post(self, form: dict[str, str]) -> tuple[int, bytes]:
        headers = {"accept": "application/json"}
        name = self._config.bearer_token_env
        if name is not None:
            token = os.environ.get(name, "").strip()
            if not token:
                raise Problem(f"prometheus.bearer_token_env: {name} is not set in the environment.")
            headers["authorization"] = f"Bearer {token}"
        url = f"{self._config.url.rstrip('/')}/api/v1/query"
        request = urllib.request.Request(url, urllib.parse.urlencode(form).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self._config.timeout_s) as reply:
                return reply.status, reply.read(_MAX_REPLY)
        except urllib.error.HTTPError as err:
            with err:
                return err.code, err.read(_MAX_REPLY)


def _finite(text: object, query: str) -> float:
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise NotFinite(f"{_quoted(query)} is {text}: there is no data to compute it from.")
    return value


def _quoted(query: str) -> str:
    short = " ".join(query.split())
    return f"`{short if len(short) <= _WORDS else short[:_WORDS] + '…'}`"
