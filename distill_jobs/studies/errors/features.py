"""What can be said of a request and its answer without asking a model: the predicates slices are made of.

Each attribute gives a request one value (or, for words, several). Knows nothing about who answered right.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

Predicates = dict[tuple[str, str], np.ndarray]
"""(attribute, value) → [requests] bool."""

_LETTERS = re.compile(r"[^\W\d_]+", re.UNICODE)
_IDEOGRAPHS = re.compile(r"[㐀-䶿一-鿿豈-﫿]+")
_SECOND_SCRIPT = 0.25
_SCRIPTS = ("LATIN", "CJK", "CYRILLIC", "ARABIC", "HANGUL", "HIRAGANA", "KATAKANA", "DEVANAGARI", "GREEK",
            "HEBREW", "THAI")  # fmt: skip
_MAX_WORDS = 100
"""The words looked at: the most common ones that are not in every request. Pairs grow with its square."""
_LENGTH_EDGES = (0, 50, 100, 200, 400, 800, 1600, 3200, 6400)
_MAX_TAG_VALUES = 50
"""A metadata key with more values than this names requests, not kinds of them."""


def predicates(
    requests: Sequence[dict[str, Any]],
    references: Sequence[str | None],
    classes: Sequence[str | None],
    least: int,
    vocabulary: frozenset[str] | None = None,
) -> Predicates:
    """Every attribute's values that hold for at least `least` requests.

    Args:
        classes: of the reference answers; None is no class.
        vocabulary: words to look for; None takes the most common ones of the requests themselves.
    """
    texts = [last_user_text(r) for r in requests]
    columns: dict[str, list[list[str]]] = {
        "class": [[] if c is None else [c] for c in classes],
        "request length": [[length_bin(len(t))] for t in texts],
        "answer length": [[] if r is None else [length_bin(len(r))] for r in references],
        "script": [[script_of(t)] for t in texts],
        "turns": [["one" if _turns(r) <= 1 else "several"] for r in requests],
        "tools": [["with" if r.get("tools") else "without"] for r in requests],
        "word": _known_words(texts, vocabulary),
    }
    columns |= _tags(requests)
    found: Predicates = {}
    for attribute, rows in columns.items():
        counts = Counter(value for row in rows for value in row)
        for value, count in sorted(counts.items()):
            if count >= least:
                found[attribute, value] = np.array([value in row for row in rows])
    return found


def last_user_text(request: dict[str, Any]) -> str:
    """The text of the last user message; of a message in parts, its text parts."""
    for message in reversed(request.get("messages") or []):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, list):
                return " ".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
            return content if isinstance(content, str) else ""
    return ""


def script_of(text: str) -> str:
    """The script most words are in, `mixed` when a quarter is in another, `none` without letters. A word is a
    run of letters of one script, or one ideograph.
    """
    counts = Counter(script for run in _LETTERS.findall(text) for script in _scripts(run))
    if not counts:
        return "none"
    (first, _), *others = counts.most_common(2)
    if others and others[0][1] >= _SECOND_SCRIPT * counts.total():
        return "mixed"
    return first


def length_bin(characters: int) -> str:
    """A range of lengths in characters, by doubling."""
    upper = next((edge for edge in _LENGTH_EDGES[1:] if characters < edge), None)
    if upper is None:
        return f"{_LENGTH_EDGES[-1]}+"
    return f"{_LENGTH_EDGES[_LENGTH_EDGES.index(upper) - 1]}-{upper - 1}"


def _script(character: str) -> str:
    name = unicodedata.name(character, "")
    return next((s.lower() for s in _SCRIPTS if name.startswith(s)), "other")


def _scripts(run: str) -> list[str]:
    found: list[str] = []
    for script in map(_script, run):
        if script == "cjk" or not found or found[-1] != script:
            found.append(script)
    return found


def _turns(request: dict[str, Any]) -> int:
    messages = request.get("messages") or []
    return sum(isinstance(m, dict) and m.get("role") == "user" for m in messages)


def _known_words(texts: Sequence[str], vocabulary: frozenset[str] | None) -> list[list[str]]:
    rows = [_words(text) for text in texts]
    if vocabulary is None:
        counts = Counter(word for row in rows for word in row)
        common = [(word, n) for word, n in sorted(counts.items()) if n < len(texts)]
        vocabulary = frozenset(word for word, _ in sorted(common, key=lambda c: -c[1])[:_MAX_WORDS])
    return [sorted(row & vocabulary) for row in rows]


def _words(text: str) -> set[str]:
    """Words of three letters or more; of ideographs, which have no spaces, every two neighbours."""
    found = set()
    for run in _LETTERS.findall(unicodedata.normalize("NFKC", text).lower()):
        for signs in _IDEOGRAPHS.findall(run):
            found |= {signs[i : i + 2] for i in range(len(signs) - 1)}
        found |= {word for word in _IDEOGRAPHS.split(run) if len(word) >= 3}
    return found


def _tags(requests: Sequence[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Metadata that sorts requests into a few kinds: a route, a tool, a customer's plan."""
    found: dict[str, list[list[str]]] = {}
    metadata = [r["metadata"] if isinstance(r.get("metadata"), dict) else {} for r in requests]
    for key in sorted({k for m in metadata for k in m}):
        rows = [[_plain(m[key])] if key in m else [] for m in metadata]
        if len({v for row in rows for v in row}) <= _MAX_TAG_VALUES:
            found[f"metadata.{key}"] = rows
    return found


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
