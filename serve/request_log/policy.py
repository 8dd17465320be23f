"""How much of a request is logged: the effective policy, sampling by conversation, and rows without texts.

Pure. Knows nothing about queues, files or detectors.
"""

from __future__ import annotations

from typing import Any

from contracts.routes import LogPolicy
from contracts.traffic import LogMode, RequestRow

_STRICTNESS = {LogMode.OFF: 0, LogMode.METADATA: 1, LogMode.REDACTED: 2, LogMode.FULL: 3}
_TWO_64 = float(2**64)

_NAMED_PARAMETERS = frozenset(
    (
        "model", "reasoning_effort", "service_tier", "tool_choice", "truncation", "encoding_format",
        "verbosity", "priority",
    )
)  # fmt: skip
"""Fields whose strings are settings. A string in any other field may be somebody's text."""
_ANSWER_IDS = ("id", "object", "created", "model", "system_fingerprint", "service_tier", "usage")
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
_MAX_PARAMETER = 128


def effective(route: LogPolicy, key: LogPolicy | None) -> LogPolicy:
    """The stricter of a route's and a key's policy, mode and sample each for itself."""
    if key is None:
        return route
    return LogPolicy(
        mode=min(route.mode, key.mode, key=_STRICTNESS.__getitem__), sample=min(route.sample, key.sample)
    )


def mode_of(policy: LogPolicy, unit_hash: str) -> LogMode:
    """What happens to a request: the policy's mode, or OFF when its conversation is not in the sample.

    The sample is a function of the conversation alone, so a conversation is logged whole or not at all, on
    every router; and it has nothing to do with the arm, which hangs on the split's salt as well.
    """
    if policy.sample >= 1.0 or int(unit_hash, 16) / _TWO_64 < policy.sample:
        return policy.mode
    return LogMode.OFF


def metadata_only(row: RequestRow) -> RequestRow:
    """The row without any text: parameters, sizes, timings, usage and ids stay.

    An upstream's error message may quote the request, so it goes too; `status` and `outcome` stay.
    """
    return row.model_copy(
        update={
            "log_mode": LogMode.METADATA,
            "request": {key: _without_text(key, value) for key, value in row.request.items()},
            "response": _answer_ids(row.response),
            "response_text": None,
            "response_chars": None if row.response_text is None else len(row.response_text),
            "error": None,
        }
    )


def _without_text(key: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if key in _NAMED_PARAMETERS and isinstance(value, str) and len(value) <= _MAX_PARAMETER:
        return value
    if key == "stream_options" and isinstance(value, dict):
        return {k: v for k, v in value.items() if isinstance(v, bool)}
    if key == "messages" and isinstance(value, list):
        return [_message_size(message) for message in value]
    return {"chars": _chars(value)}


def _message_size(message: Any) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    return {"role": role if role in _ROLES else None, "chars": _chars(message) - _chars(role)}


def _chars(value: Any) -> int:
    """Characters of all strings in a value; without recursion, because a request may be nested deeply."""
    total, todo = 0, [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
    return total


def _answer_ids(response: dict[str, Any] | None) -> dict[str, Any] | None:
    if response is None:
        return None
    return {key: response[key] for key in _ANSWER_IDS if key in response}
