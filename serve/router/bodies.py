"""The JSON of requests, read and written so that integers of any size survive.

orjson does the work; it turns integers beyond 64 bits into floats, so a body that may hold one, by its run of
digits, is read again by the standard library. Knows nothing about what a body means.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

_DIGITS = bytes(0x30 if 0x30 <= byte <= 0x39 else byte for byte in range(256))
_LONG = b"0" * 19
"""-2**63 - 1 has 19 digits, 2**64 has 20; what is shorter fits."""
_SPARSE = b"000"


def parse(body: bytes) -> Any:
    """Any JSON value. Raises: orjson.JSONDecodeError, also for numbers beyond 64-bit floats."""
    parsed = orjson.loads(body)
    if not may_hold_long_integer(body):
        return parsed
    try:
        return json.loads(body)
    except RecursionError:  # deeper than anything that is passed on; the caller refuses it
        return parsed


def may_hold_long_integer(body: bytes) -> bool:
    """True when there are that many digits in a row, in a number or in a text."""
    # Of 19 bytes in a row every sixth is at least three: bodies without such a three need no closer look.
    return _SPARSE in body[::6].translate(_DIGITS) and _LONG in body.translate(_DIGITS)


def dump(value: Any, sort_keys: bool = False) -> bytes:
    """Compact JSON."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys)
        return text.encode()
