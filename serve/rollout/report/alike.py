"""Texts beside each other: the words of a request, how alike two requests are, what differs in two answers.

Words are runs of letters and digits; where a script writes no spaces (Chinese, Japanese, Thai) every sign is
one. Pure. Knows nothing about arms or logs.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from serve.rollout.report.model import Piece

MOST_CHARS = 2000
"""Longer texts are cut: a page must stay readable, and a diff is quadratic."""
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|\s+|[^\w\s]")


def conversation(body: dict[str, Any]) -> str:
    """Everything a request body says to the model, as one text; empty when the log does not keep it."""
    return "\n".join(text for _, text in _said(body))


def prompt(body: dict[str, Any]) -> str | None:
    """What the user said last, or the prompt of a completion; None when the log does not keep it."""
    said = _said(body)
    users = [text for role, text in said if role == "user"]
    texts = users or [text for _, text in said]
    return texts[-1] if texts else None


def words(text: str) -> frozenset[str]:
    """The different words of a text, without case."""
    return frozenset(w.lower() for w in _WORD.findall(text[: 4 * MOST_CHARS]))


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared words of all words (Jaccard): 1 for equal sets, 0 when nothing is shared or known."""
    union = len(a | b)
    return len(a & b) / union if union else 0.0


def diff(stable: str, canary: str) -> tuple[Piece, ...]:
    """Word-level diff: stretches that are the same in both, and what stands where they differ."""
    old, new = _TOKEN.findall(cut(stable)), _TOKEN.findall(cut(canary))
    found = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return _joined([Piece(stable="".join(old[a:b]), canary="".join(new[c:d])) for _, a, b, c, d in found])


def _joined(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Changes with nothing but a space between them are one change: fewer, longer marks read better."""
    found: list[Piece] = []
    for index, piece in enumerate(pieces):
        changed = bool(found) and not found[-1].same
        bridge = piece.same and not piece.stable.strip() and index + 1 < len(pieces)
        if changed and (bridge or not piece.same):
            last = found.pop()
            piece = Piece(stable=last.stable + piece.stable, canary=last.canary + piece.canary)
        found.append(piece)
    return tuple(found)


def cut(text: str) -> str:
    """A text of bounded length that says so when it was longer."""
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]} … ({len(text) - MOST_CHARS:,} more)"


def _said(body: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of everything in a chat, completion or responses body, in order."""
    found: list[tuple[str, str]] = []
    for field in ("system", "instructions"):
        found += [("system", text) for text in _texts(body.get(field))]
    for field in ("messages", "input"):
        value = body.get(field)
        if isinstance(value, str):
            found.append(("user", value))
        for message in value if isinstance(value, list) else ():
            if isinstance(message, dict):
                role = str(message.get("role", "user"))
                found += [(role, text) for text in _texts(message.get("content"))]
    found += [("user", text) for text in _texts(body.get("prompt"))]
    return found


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content] if content else []
    if not isinstance(content, list):
        return []
    parts = [p.get("text") if isinstance(p, dict) else p for p in content]
    return [p for p in parts if isinstance(p, str) and p]
