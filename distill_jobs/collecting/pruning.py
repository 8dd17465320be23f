"""Constant prompt text of a route: found on a sample of its requests, taken out of the students' messages.

What nearly all requests of a route begin with teaches a student nothing and costs prefill at every request
(the idea is OpenPipe's). The teacher still sees it. Knows nothing about how serving takes it out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from contracts.config import write_atomic

_SAMPLE = 4096
"""Requests looked at; a share of 98 % is then known to ± 0.5 %."""
_HEAD_CHARS = 8000
_SYSTEM = ("system", "developer")


def write_heads(folder: Path, partition: int, table: pa.Table, partitions: int) -> None:
    """How the partition's first requests by digest, a fair draw, begin: [route, system text, user text]."""
    some = table.slice(0, max(1, -(-_SAMPLE // partitions)))
    heads = [
        [route, *_heads(orjson.loads(messages))]
        for route, messages in zip(some["route"].to_pylist(), some["messages"].to_pylist(), strict=True)
    ]
    write_atomic(folder / f"{partition:04d}.heads.json", json.dumps(heads))


def _heads(messages: list[dict[str, Any]]) -> tuple[str, str]:
    system = messages[0]["content"] if messages[0]["role"] in _SYSTEM else ""
    user = next((m["content"] for m in messages if m["role"] == "user"), "")
    return system[:_HEAD_CHARS], user[:_HEAD_CHARS]


def constant_texts(heads: Iterable[Sequence[str]], config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Route → {"system": text, "user": text}: what its messages begin with in at least `share` of the heads;
    only texts worth taking out are named.
    """
    by_route: dict[str, list[Sequence[str]]] = {}
    for head in heads:
        by_route.setdefault(head[0], []).append(head)
    found: dict[str, dict[str, str]] = {}
    for route, rows in sorted(by_route.items()):
        for name, at in (("system", 1), ("user", 2)):
            text = shared_prefix([row[at] for row in rows], config["share"])
            if len(text) >= config["min_chars"]:
                found.setdefault(route, {})[name] = text
    return found


def shared_prefix(texts: Sequence[str], share: float) -> str:
    """The longest text that at least `share` of the texts begin with, cut back to a whole word unless it is
    one of them.
    """
    ordered = sorted(texts)
    wanted = max(1, math.ceil(share * len(ordered)))
    best = ""
    for first, last in zip(ordered, ordered[wanted - 1 :], strict=False):
        length = _common(first, last)
        if length > len(best):
            best = first[:length]
    if best in texts:
        return best
    cut = max(best.rfind(space) for space in " \n\t") + 1
    return best[:cut]


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def prune(messages: str, texts: dict[str, str]) -> str | None:
    """The messages without the constant texts, as JSON; None when nothing was taken out. A system message
    that nothing is left of goes; a user's stays.
    """
    spoken = orjson.loads(messages)
    left = [dict(m) for m in spoken]
    system = texts.get("system")
    if system is not None and left[0]["role"] in _SYSTEM and left[0]["content"].startswith(system):
        left[0]["content"] = left[0]["content"][len(system) :].lstrip()
        if not left[0]["content"] and len(left) > 1:
            del left[0]
    user, at = texts.get("user"), next((i for i, m in enumerate(left) if m["role"] == "user"), None)
    if user is not None and at is not None and left[at]["content"].startswith(user):
        left[at]["content"] = left[at]["content"][len(user) :] or left[at]["content"]
    return None if left == spoken else orjson.dumps(left).decode()
