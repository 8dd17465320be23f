"""Asks a judge: one chat completion at a declared upstream, its reply as text.

Used by the router's background judging and by `stillhouse judge check`, so that what is checked is what
judges. Knows nothing about prompts, budgets or evidence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson

from contracts.errors import EngineError
from contracts.grading import JudgeGrader
from contracts.traffic import Upstream
from serve.router.answer import answer_of, parse_body
from serve.router.client import Broken, ConnectFailed, Connection, HttpClient
from serve.router.pool import Pools

_PATH = "/v1/chat/completions"
_HEADERS = b"content-type: application/json\r\naccept: application/json\r\n"
_MAX_REPLY = 2**20


class JudgeClient:
    """All judges of one process, used from one event loop."""

    def __init__(self, client: HttpClient, pools: Pools, upstreams: Mapping[str, Upstream]) -> None:
        self._client = client
        self._pools = pools
        self._upstreams = upstreams

    async def ask(self, grader: JudgeGrader, body: dict[str, Any]) -> str:
        """The judge's reply, "" when it said nothing. Raises: EngineError when there is none in time."""
        upstream = self._upstreams[grader.upstream]
        replica = self._pools.pick(upstream)
        if replica is None:
            raise EngineError(f"judge {upstream.name}: no replica is registered.")
        data = orjson.dumps({**body, "model": upstream.model})
        replica.in_flight += 1
        try:
            async with asyncio.timeout(grader.timeout_s):
                headers = _HEADERS + self._pools.authorization(upstream)
                connection = await self._client.ask(replica.target, "POST", _PATH, headers, data)
                try:
                    return _reply(upstream, connection.status, await _whole(connection))
                finally:
                    self._client.release(connection)
        except (ConnectFailed, Broken) as err:
            raise EngineError(f"judge {upstream.name}: {err}.") from err
        except TimeoutError as err:
            raise EngineError(f"judge {upstream.name}: no answer within {grader.timeout_s:g} s.") from err
        finally:
            replica.in_flight -= 1


async def _whole(connection: Connection) -> bytes:
    parts, size = [], 0
    while data := await connection.read():
        parts.append(data)
        size += len(data)
        if size > _MAX_REPLY:
            raise Broken(f"its reply is longer than {_MAX_REPLY} bytes")
    return b"".join(parts)


def _reply(upstream: Upstream, status: int, data: bytes) -> str:
    if status != 200:
        raise EngineError(f"judge {upstream.name}: answered {status}.")
    return answer_of(parse_body(data)).text or ""
