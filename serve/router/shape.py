"""What a route's settings make of a request: its completion limit, and what keeps it on one replica.

Pure functions of the parsed request. Knows nothing about routes, replicas or HTTP.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Final

from contracts.routes import Affinity
from serve.router.bodies import dump
from serve.router.errors import RequestRefused

_LIMIT_FIELDS: Final = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
"""Endpoint → the fields that bound its completion, the one to set first."""
_HEAD_CHARS: Final = 2048
"""Characters of a prompt that must agree for two requests to share a replica; about 500 tokens."""


def completion_cap(endpoint: str, body: dict[str, Any], most: int) -> tuple[str, int] | None:
    """The field and value to add when the client set no completion limit, None when it did.

    Raises: RequestRefused when the client asks for more than `most`.
    """
    fields = _LIMIT_FIELDS.get(endpoint)
    if fields is None:
        return None
    given = [f for f in fields if body.get(f) is not None]
    for field in given:
        wish = body[field]
        if isinstance(wish, int) and not isinstance(wish, bool) and wish > most:
            raise RequestRefused(f"{field!r} may be at most {most} here, not {wish}.", param=field)
    return None if given else (fields[0], most)


def affinity_key(kind: Affinity, unit: str, body: dict[str, Any]) -> bytes:
    """What should stay on one replica: the conversation, or the head of the prompt."""
    if kind is Affinity.CONVERSATION:
        return unit.encode("utf-8", "surrogatepass")[:64]
    prompt = next((body[f] for f in ("messages", "input", "prompt") if f in body), None)
    return blake2b(_head(prompt), digest_size=16).digest()


def _head(prompt: object) -> bytes:
    if isinstance(prompt, str):
        return prompt[:_HEAD_CHARS].encode("utf-8", "surrogatepass")
    # Two messages are as far as prompts of different conversations agree: system, and the first question.
    return dump(prompt[:2] if isinstance(prompt, list) else prompt)[:_HEAD_CHARS]
