"""A route's logged requests as work for an engine: same prompts, answers of the same length.

A row that kept its texts is asked in its own words, so prefixes are shared as they are in life; of one that
kept only counts a prompt of as many random tokens is made, and nothing is shared. Knows nothing about
engines.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from contracts.errors import DataError
from contracts.traffic import LogMode, Outcome, RequestRow
from serve.request_log.rows import newest_first, rows_of_route

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_FORMS = {CHAT: "messages", COMPLETIONS: "prompt"}
_KEPT = ("messages", "prompt", "tools", "chat_template_kwargs")
"""What of a body makes the prompt; sampling and streaming are the measurement's."""
_FIRST_TOKEN = 3
"""Lower ids are padding and the ends of texts in the tokenizers we know."""


class Work(NamedTuple):
    """One request to measure with."""

    endpoint: str
    body: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    task: str


class Traffic(NamedTuple):
    """What a route's log says about its load."""

    work: list[Work]
    requests_per_s: float | None
    """Arrivals, over the time the rows span; None of one row."""
    e2e_s: float
    """Mean seconds of a request as it was served."""

    @property
    def concurrency(self) -> float | None:
        """Requests in flight on average, by Little's law."""
        return None if self.requests_per_s is None else self.requests_per_s * self.e2e_s


def traffic_of(folder: Path, route: str, most: int, by: str | None = None, vocabulary: int = 0) -> Traffic:
    """The latest answered requests of a route, in the order of their arrival.

    Args:
        by: dotted path into the request's body that names its task, e.g. metadata.task; None: the route.
        vocabulary: of the model, for rows without texts; 0 leaves them out.

    Raises: DataError when there are none.
    """
    rows: list[RequestRow] = []
    for segment in newest_first(folder):
        rows += [row for row in rows_of_route(segment, route) if _usable(row, vocabulary)]
        if len(rows) >= most:
            break
    rows = sorted(rows, key=lambda row: row.ts)[-most:]
    if not rows:
        raise DataError(
            f"the request log in {folder} holds no answered chat or completion of route {route!r} with "
            "its token counts. Check --log and the route's name; a route of log.mode 'off' leaves no rows."
        )
    span = rows[-1].ts - rows[0].ts
    return Traffic(
        [_work(row, by, vocabulary) for row in rows],
        (len(rows) - 1) / span if span > 0 else None,
        sum(row.e2e_s for row in rows) / len(rows),
    )


def _usable(row: RequestRow, vocabulary: int) -> bool:
    if row.outcome is not Outcome.OK or row.pair_id is not None:
        return False
    if not row.prompt_tokens or not row.completion_tokens or row.endpoint not in _FORMS:
        return False
    return vocabulary > _FIRST_TOKEN or _worded(row)


def _worded(row: RequestRow) -> bool:
    return row.log_mode is LogMode.FULL and bool(row.request.get(_FORMS[row.endpoint]))


def _work(row: RequestRow, by: str | None, vocabulary: int) -> Work:
    assert row.prompt_tokens is not None  # _usable saw to both
    assert row.completion_tokens is not None
    task = row.route if by is None else _named(row.request, by)
    counts = (row.prompt_tokens, row.completion_tokens)
    if _worded(row):
        return Work(row.endpoint, {k: row.request[k] for k in _KEPT if k in row.request}, *counts, task)
    draw = random.Random(row.request_id)
    ids = [draw.randrange(_FIRST_TOKEN, vocabulary) for _ in range(row.prompt_tokens)]
    return Work(COMPLETIONS, {"prompt": ids}, *counts, task)


def _named(body: dict[str, Any], path: str) -> str:
    found: Any = body
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return "other" if found is None or isinstance(found, dict | list) else str(found)


def lengths(work: Iterable[Work]) -> str:
    """The lengths in words: median and largest of prompts and answers."""
    prompts, answers = zip(*((one.prompt_tokens, one.completion_tokens) for one in work), strict=True)
    middle = len(prompts) // 2
    return (
        f"{len(prompts)} requests; prompts of {sorted(prompts)[middle]} tokens (at most {max(prompts)}), "
        f"answers of {sorted(answers)[middle]} (at most {max(answers)})"
    )
