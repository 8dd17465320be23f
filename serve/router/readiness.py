"""Whether the first request would be answered: every route has a split whose stable upstream answers.

Knows nothing about arms beyond stable.
"""

from __future__ import annotations

import asyncio
import time

from contracts.traffic import Upstream
from serve.router.client import Broken, ConnectFailed, HttpClient
from serve.router.pool import Pools, Replica
from serve.router.table import RouteTable

_PROBE_S = 2.0
_REMEMBER_S = 0.5


class Readiness:
    """Asks upstreams for their health when somebody asks for ours."""

    def __init__(self, routes: tuple[str, ...], table: RouteTable, pools: Pools, client: HttpClient) -> None:
        """`routes`: those that must be there; empty: all that are, and at least one."""
        self._routes = routes
        self._table = table
        self._pools = pools
        self._client = client
        self._checked_at = float("-inf")
        self._missing: list[str] = []

    async def missing(self) -> list[str]:
        """What is not ready, one sentence each; empty when all is. Remembered for half a second."""
        if time.monotonic() - self._checked_at > _REMEMBER_S:
            names = list(self._routes) or self._table.names()
            found = await asyncio.gather(*(self._lacks(name) for name in names))
            self._missing = [m for m in found if m] if names else ["there is no route yet"]
            self._checked_at = time.monotonic()
        return self._missing

    async def _lacks(self, name: str) -> str | None:
        route = self._table.get(name)
        if route is None:
            return f"route {name!r} has no split"
        stable = route.split.stable.parts[-1]  # a cascade can answer as long as its second one can
        replicas = self._pools.replicas(stable)
        if not replicas:
            return f"route {name!r}: no replica of {stable.name!r} is registered"
        answers = await asyncio.gather(*(self._answers(stable, r) for r in replicas))
        return None if any(answers) else f"route {name!r}: no replica of {stable.name!r} answers"

    async def _answers(self, upstream: Upstream, replica: Replica) -> bool:
        """True for any answer but a server error: hosted APIs have no /health, a 404 is life enough."""
        try:
            async with asyncio.timeout(_PROBE_S):
                connection = await self._client.ask(
                    replica.target, "GET", "/health", self._pools.authorization(upstream)
                )
                await connection.read_all()
        except (ConnectFailed, Broken, TimeoutError):
            return False
        self._client.release(connection)
        return connection.status < 500
