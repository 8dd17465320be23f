"""Takes secrets out of text and configuration before a person or another program sees them.

By name (a field called password, token, authorization …) and by pattern (keys of known forms, bearer tokens,
passwords in URLs). What is left may still be private: texts of users are redaction.py's. Knows nothing about
where the text goes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASKED = "***"

_SECRET_NAME = re.compile(
    r"(?i)(?:^|[_\-. ])(?:pass(?:word|wd|phrase)?|secrets?|tokens?|(?:api|private|access)[_\-]?keys?"
    r"|credentials?|authorization|cookies?|dsn|signature|bearer)(?:$|[_\-. ])"
)
_NO_SECRET = re.compile(
    r"(?i)_env$|_file$|(?:max|min|prompt|completion|total|read|micro|sampled)_.*tokens?|tokens?_per|_tokens$"
)
"""Names of variables, places, and counts of tokens."""

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", MASKED),
        # user:password@ of any URL, also where the password has slashes; up to the last @ before a space.
        (r"(?P<a>\b[A-Za-z][A-Za-z0-9+.\-]*://)[^\s/@:\"']*:[^\s@\"']+@", rf"\g<a>{MASKED}@"),
        (r"(?P<a>\b[A-Za-z][A-Za-z0-9+.\-]*://)[^\s/@:\"']{8,}@", rf"\g<a>{MASKED}@"),
        (r"(?i)(?P<a>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=\-]{6,}", rf"\g<a>{MASKED}"),
        (r"\bsk-[A-Za-z0-9_\-]{8,}", MASKED),
        (r"\b(?:ghp|gho|ghs|ghr|github_pat|glpat|hf|xox[abprs]|npm|pypi)[_\-][A-Za-z0-9_\-]{10,}", MASKED),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}", MASKED),
        (r"\bAIza[A-Za-z0-9_\-]{20,}", MASKED),
        (r"\beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]*", MASKED),
        # NAME=value and "name": "value" of secret names.
        (
            r"(?i)(?P<a>\b[\w\-]*(?:password|passwd|passphrase|secret|token|api[_\-]?key|access[_\-]?key"
            r"|private[_\-]?key|credential|authorization|cookie|signature)[\w\-]*[\"']?\s*[=:]\s*)"
            r"(?P<q>[\"']?)(?!\*\*\*)(?!\d+(?:\.\d+)?\b)(?:[^\s\"',;&}\]]{4,})",
            rf"\g<a>\g<q>{MASKED}",
        ),
    )
)


def is_secret(name: str) -> bool:
    """True for the name of a field or variable whose value nobody should see; `*_env` only names one."""
    return bool(_SECRET_NAME.search(name)) and not _NO_SECRET.search(name)


def mask(text: str) -> str:
    """The text without anything that looks like a secret."""
    for pattern, to in _PATTERNS:
        text = pattern.sub(to, text)
    return text


def masked(data: Any) -> Any:
    """JSON-able data: values of secret names replaced, all other strings searched."""
    if isinstance(data, Mapping):
        return {key: _value(str(key), value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [masked(one) for one in data]
    return mask(data) if isinstance(data, str) else data


def _value(key: str, value: Any) -> Any:
    if is_secret(key) and isinstance(value, str | bytes | int | float) and not isinstance(value, bool):
        return MASKED
    return masked(value)
