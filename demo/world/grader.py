"""The grader that the router plugs in by name (`demo.world.grader:grade`): is this answer right?

It reads the case id that the client put in `metadata.case` and writes the case again; it keeps no state and
knows nothing of arms, models or logs.
"""

from __future__ import annotations

from typing import Any

from demo.world.cases import Case, find
from demo.world.tools import exact_match, schema_ok


def _last_user_text(request: dict[str, Any]) -> str | None:
    for message in reversed(request.get("messages") or []):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            return content if isinstance(content, str) else None
    return None


def _case_of(request: dict[str, Any]) -> Case | None:
    metadata = request.get("metadata")
    case_id = metadata.get("case") if isinstance(metadata, dict) else None
    return find(case_id) if isinstance(case_id, str) else None


def grade(request: dict[str, Any], response_text: str) -> bool | None:
    """True for the right calls in a valid schema, False for anything else, None when the request is not
    ours."""
    case = _case_of(request)
    if case is None or _last_user_text(request) != case.text:
        return None
    return schema_ok(response_text) and exact_match(response_text, case.answer)
