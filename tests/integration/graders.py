"""Graders that router processes of the tests import by name."""

from __future__ import annotations

from typing import Any


def says_tick(request: dict[str, Any], text: str) -> bool:
    """Passes answers of the stable fake engine."""
    return text.startswith("tick")


def longer_wins(request: dict[str, Any], canary: str, reference: str) -> float | None:
    """Compares a pair; abstains where the client asks for it, fails where it asks for that."""
    if "abstain" in str(request):
        return None
    if "crash" in str(request):
        raise RuntimeError("asked for")
    return 0.5 if len(canary) == len(reference) else float(len(canary) > len(reference))


def share_of_tocks(request: dict[str, Any], text: str) -> float:
    """A score between: which share of the words is `tock`."""
    words = text.split()
    return words.count("tock") / len(words)


def fails(request: dict[str, Any], text: str) -> float:
    """A grader that is broken."""
    raise RuntimeError("asked for")


def abstains(request: dict[str, Any], text: str) -> bool | None:
    """A grader that has no opinion."""
    return None
