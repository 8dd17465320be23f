"""Engines under test: several side by side, each a process of its own, all ended whatever happens.

Knows nothing about what is measured on them.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contracts.errors import EngineError
from serve.engine.config import EngineOptions
from serve.engine.process import VllmProcess

MODEL = "tuned"
"""The name every engine under test serves."""
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_COUNTERS = re.compile(
    r"^vllm:spec_decode_num_(drafts|draft_tokens|accepted_tokens)_total(?:\{[^}]*\})? ([0-9.eE+]+)",
    re.MULTILINE,
)


@contextmanager
def running(model: str, options: EngineOptions, log: Path) -> Iterator[str]:
    """The URL of an engine that answers; it is ended with the block. Raises: EngineError."""
    engine = VllmProcess(model, MODEL, options, "127.0.0.1", log)
    engine.start()
    try:
        engine.wait_ready()
        yield engine.url
    finally:
        engine.stop()


def drafted(url: str, timeout_s: float = 10.0) -> dict[str, float]:
    """vLLM's own counters so far: drafts, draft_tokens, accepted_tokens; empty where nothing drafts."""
    try:
        with _OPENER.open(f"{url}/metrics", timeout=timeout_s) as reply:
            text = reply.read().decode()
    except OSError as err:
        raise EngineError(f"engine {url} did not answer /metrics: {err}.") from err
    found: dict[str, float] = {}
    for name, value in _COUNTERS.findall(text):
        found[name] = found.get(name, 0.0) + float(value)
    return found
