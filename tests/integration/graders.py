"""Graders that router processes of the tests import by name."""

from __future__ import annotations

from typing import Any


def says_tick(request: dict[str, Any], text: str) -> bool:
    """Passes answers of the stable fake engine."""
    return text.startswith("tick")
