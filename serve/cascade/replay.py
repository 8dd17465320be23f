"""Logged requests that the second of a cascade answered, asked again of the first: what calibration rests on.

The first is asked as the router asks it: same body, same extra fields. Rows that a cascade passed on are left
out: they are the hard ones, not the traffic. Knows nothing about thresholds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contracts.cascade import CascadeFields, Signal
from contracts.errors import DataError, EngineError
from contracts.traffic import LogMode, Outcome, Upstream
from serve.cascade import signals
from serve.cascade.calibrate import Item
from serve.cascade.logprobs import ENDPOINTS, TokenScores, asking, read
from serve.request_log.rows import newest_first, rows_of_route
from serve.router.answer import answer_of, parse_body
from serve.router.bodies import dump
from serve.router.client import Broken, ConnectFailed, HttpClient
from serve.router.pool import Pools

Score = Callable[[dict[str, Any], str], float | None]

_HEADERS = b"content-type: application/json\r\naccept: application/json\r\n"
_TOLERATED = 0.02
"""Share of the requests that the first may fail to answer."""


class Row(NamedTuple):
    """One logged request and the second's answer."""

    endpoint: str
    request: dict[str, Any]
    answer: str


class Answered(NamedTuple):
    """The first's answer to a row."""

    text: str | None
    signals: dict[Signal, float | None]


def rows_of(folder: Path, route: str, then: str, wanted: Sequence[Signal], most: int) -> list[Row]:
    """The latest requests of a route that upstream `then` answered, as many as `most`.

    Raises: DataError when there are none.
    """
    found: list[Row] = []
    for segment in newest_first(folder):
        found += reversed([row for row in _read(segment, route, then) if _judged(row, wanted)])
        if len(found) >= most:
            return found[:most]
    if not found:
        raise DataError(
            f"the request log in {folder} holds no answer of {then!r} on route {route!r} with its texts; "
            "log.mode must be 'full' and the route served, or shadowed, by that upstream."
        )
    return found


def _read(segment: Path, route: str, then: str) -> Iterator[Row]:
    for row in rows_of_route(segment, route):
        whole = row.log_mode is LogMode.FULL and row.outcome is Outcome.OK and row.response_text is not None
        if whole and row.upstream == then and row.served_arm is row.arm:
            yield Row(row.endpoint, row.request, str(row.response_text))


def _judged(row: Row, wanted: Sequence[Signal]) -> bool:
    return row.endpoint in ENDPOINTS and all(signals.can_judge(s, row.endpoint, row.request) for s in wanted)


class First:
    """A cascade's first upstream, asked about logged rows."""

    def __init__(
        self,
        upstream: Upstream,
        fields: CascadeFields,
        http: HttpClient,
        pools: Pools,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        """`fields`: samples and temperature of self-consistency. `parameters`: the route's defaults."""
        self._upstream = upstream
        self._fields = fields
        self._http = http
        self._pools = pools
        self._parameters = dict(parameters or {})

    async def answers(
        self, rows: Sequence[Row], wanted: Sequence[Signal], at_once: int, score: Score | None = None
    ) -> list[Answered | None]:
        """An answer a row, None where the first failed.

        Args:
            score: of signal 'grader'.

        Raises: EngineError when it fails more than a few.
        """
        places, failures = asyncio.Semaphore(at_once), 0

        async def one(row: Row) -> Answered | None:
            nonlocal failures
            async with places:
                try:
                    return await self._answer(row, wanted, score)
                except EngineError:
                    failures += 1
                    if failures > max(10, _TOLERATED * len(rows)):
                        raise
                    return None

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(row)) for row in rows]
        return [task.result() for task in tasks]

    async def _answer(self, row: Row, wanted: Sequence[Signal], score: Score | None) -> Answered:
        body = {**self._parameters, **row.request}
        more, _ = asking(row.endpoint, body, max(signals.TOP.get(s, 0) for s in wanted))
        choice, text = await self._ask(row, {**body, **more})
        scores = TokenScores()
        try:
            read(choice, scores)
        except ValueError:
            scores = TokenScores()
        found = {s: signals.of_scores(s, scores) for s in wanted if s.of_logprobs}
        if Signal.SELF_CONSISTENCY in wanted:
            found[Signal.SELF_CONSISTENCY] = await self._agreement(row, body, choice)
        if Signal.GRADER in wanted and score is not None:
            found[Signal.GRADER] = None if text is None else score(row.request, text)
        return Answered(text, found)

    async def _agreement(self, row: Row, body: dict[str, Any], choice: dict[str, Any]) -> float | None:
        mine = signals.normalised(choice)
        more = {"n": self._fields.samples, "temperature": self._fields.temperature}
        answer = await self._post(row.endpoint, {**body, **more})
        others = [signals.normalised(c) for c in answer.get("choices") or () if isinstance(c, dict)]
        return None if mine is None else signals.agreement(mine, [one or "" for one in others])

    async def _ask(self, row: Row, body: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        answer = await self._post(row.endpoint, body)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise EngineError(f"upstream {self._upstream.name}: its answer has no choices.")
        return choices[0], answer_of(answer).text

    async def _post(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        name = self._upstream.name
        replica = self._pools.pick(self._upstream)
        if replica is None:
            raise EngineError(f"upstream {name}: no replica is registered; is the stack up?")
        data = dump({**body, "model": self._upstream.model, "stream": False, "stream_options": None})
        headers = _HEADERS + self._pools.authorization(self._upstream)
        replica.in_flight += 1
        try:
            connection = await self._http.ask(replica.target, "POST", endpoint, headers, data)
            try:
                status, said = connection.status, parse_body(await connection.read_all())
            finally:
                self._http.release(connection)
        except (ConnectFailed, Broken) as err:
            raise EngineError(f"upstream {name}: {err}.") from err
        finally:
            replica.in_flight -= 1
        if status != 200 or said is None:
            raise EngineError(f"upstream {name}: answered {status}.")
        return said


def items_of(
    rows: Sequence[Row], answers: Sequence[Answered | None], grade: Score | None
) -> tuple[list[Item], int]:
    """Rows that can be compared, and how many could not (no answer, or the grader abstained).

    Args:
        grade: scores an answer; None: the first is right where it says what the second said.
    """
    items = []
    for row, answer in zip(rows, answers, strict=True):
        if answer is None:
            continue
        if grade is None:
            same = answer.text is not None
            same = same and signals.normalised_text(str(answer.text)) == signals.normalised_text(row.answer)
            items.append(Item(answer.signals, float(same), 1.0))
            continue
        then = grade(row.request, row.answer)
        first = 0.0 if answer.text is None else grade(row.request, answer.text)
        if then is not None and first is not None:
            items.append(Item(answer.signals, first, then))
    return items, len(rows) - len(items)
