"""Log-probabilities of answers in OpenAI's two shapes: asked for, read, and taken out of what a client sees.

Chat completions give `content`, a list of tokens; completions give lists side by side. Pure. Knows nothing
about thresholds or HTTP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
ENDPOINTS: Final = frozenset((CHAT, COMPLETIONS))
"""Those whose answers can carry log-probabilities of every token."""


class Wish(NamedTuple):
    """What a client asked for itself."""

    any: bool
    """It wants log-probabilities."""
    top: int
    """So many of the most likely tokens."""


@dataclass(slots=True)
class TokenScores:
    """Log-probabilities of an answer's tokens, in nats."""

    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """Of each token: its log-probability minus that of the best other one; none without top two."""


def asking(endpoint: str, body: dict[str, Any], top: int) -> tuple[dict[str, Any], Wish]:
    """Fields that make an upstream tell log-probabilities, and what the client wanted.

    Args:
        top: so many of the most likely tokens are needed; 0: those of the answer's tokens alone.
    """
    given = body.get("logprobs")
    if endpoint == COMPLETIONS:
        wish = Wish(True, given) if type(given) is int and given >= 0 else Wish(False, 0)
        return {"logprobs": max(1, wish.top, top)}, wish
    number = body.get("top_logprobs")
    wish = Wish(True, number if type(number) is int else 0) if given is True else Wish(False, 0)
    need = max(wish.top, top)
    return {"logprobs": True, **({"top_logprobs": need} if need else {})}, wish


def read(choice: dict[str, Any], into: TokenScores) -> None:
    """Add a choice's tokens, of a whole answer or of one event. Raises: ValueError when they are odd."""
    said = choice.get("logprobs")
    if said is None:
        return
    try:
        if said.get("content") is not None:
            for token in said["content"]:
                _add(into, token["logprob"], [t["logprob"] for t in token.get("top_logprobs") or ()])
        elif said.get("token_logprobs") is not None:
            tops = said.get("top_logprobs") or [None] * len(said["token_logprobs"])
            for logprob, top in zip(said["token_logprobs"], tops, strict=True):
                _add(into, logprob, list((top or {}).values()))
    except (TypeError, KeyError, AttributeError) as err:
        raise ValueError(f"log-probabilities of an unknown shape: {err!r}") from err


def take_out(choice: dict[str, Any], wish: Wish) -> None:
    """Leave in a choice what the client asked for and nothing more."""
    said = choice.get("logprobs")
    if said is None:
        return
    if not wish.any:
        choice["logprobs"] = None
    elif said.get("content") is not None:
        for token in said["content"]:
            token["top_logprobs"] = (token.get("top_logprobs") or [])[: wish.top]
    elif said.get("top_logprobs") is not None:
        tokens = said.get("tokens") or [None] * len(said["top_logprobs"])
        tops = zip(said["top_logprobs"], tokens, strict=True)
        said["top_logprobs"] = [top and _largest(top, wish.top, token) for top, token in tops]


def _add(into: TokenScores, logprob: object, top: list[float]) -> None:
    if not isinstance(logprob, int | float) or math.isnan(logprob):
        raise ValueError(f"a token's log-probability is {logprob!r}")
    into.logprobs.append(float(logprob))
    if len(top) > 1:
        first, second = sorted(map(float, top), reverse=True)[:2]
        into.margins.append(logprob - (second if logprob >= first else first))


def _largest(top: dict[str, float], count: int, token: str | None) -> dict[str, float]:
    """The most likely ones in their order, and the answer's own token, which servers give besides."""
    kept = set(sorted(top, key=lambda t: top[t], reverse=True)[:count]) | {token}
    return {t: v for t, v in top.items() if t in kept}
