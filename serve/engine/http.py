"""Plain HTTP questions to an engine: is it healthy, does it answer, how many requests does it have.

Blocking and small on purpose: control code asks a few times a second at most. Knows nothing about Ray.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request

from contracts.errors import EngineError

# Loopback and cluster addresses must never go through a proxy that the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Long on purpose: vLLM's first request on an AMX machine must not be a tiny one (see launch.allow_amx).
_QUESTION = "Hello! This is the first question after your start. Please answer with a few words, as you like."
_LOAD = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.eE+]+)", re.MULTILINE)


def healthy(url: str, timeout_s: float = 2.0) -> bool:
    """True when GET /health answers 200."""
    try:
        with _OPENER.open(f"{url}/health", timeout=timeout_s) as reply:
            return bool(reply.status == 200)
    except OSError:  # refused, reset, timed out or an HTTP error: all mean not healthy
        return False


def requests_in_engine(url: str, timeout_s: float = 2.0) -> int:
    """Requests running and waiting inside the engine, from its /metrics. Raises: EngineError."""
    try:
        with _OPENER.open(f"{url}/metrics", timeout=timeout_s) as reply:
            text = reply.read().decode()
    except OSError as err:
        raise EngineError(f"engine {url} did not answer /metrics: {err}.") from err
    return int(sum(float(value) for value in _LOAD.findall(text)))


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """True when an HTTP server answers there, with whatever status below 500: hosted APIs have no /health."""
    try:
        with _OPENER.open(f"{url}/health", timeout=timeout_s):
            return True
    except urllib.error.HTTPError as err:
        return bool(err.code < 500)
    except OSError:  # refused, unreachable or too slow
        return False


def ask_chat(
    url: str,
    model: str,
    max_tokens: int = 4,
    timeout_s: float = 120.0,
    headers: dict[str, str] | None = None,
    api_key_env: str | None = None,
) -> str:
    """One small real chat completion; returns its text. Raises: EngineError when it is not answered."""
    key = os.environ.get(api_key_env, "") if api_key_env else ""
    keyed = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": _QUESTION}]}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **keyed, **(headers or {})},
    )
    try:
        with _OPENER.open(request, timeout=timeout_s) as reply:
            answer = json.loads(reply.read())
        return str(answer["choices"][0]["message"]["content"] or "")
    except urllib.error.HTTPError as err:
        raise EngineError(f"{url} answered a chat request with {err.code}: {err.read()[:300]!r}.") from err
    except (OSError, ValueError, LookupError, TypeError) as err:
        raise EngineError(f"{url} did not answer a chat request for model {model!r}: {err!r}.") from err
