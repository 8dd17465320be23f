"""Keeps one router process and the state store in step: splits and endpoints in, evidence and reports out.

The store is only ever touched in threads of its own; while it is unreachable the last splits stay in force
and evidence waits. Knows nothing about requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from contracts.errors import ConfigError, StateError
from contracts.routes import RouteSettings
from contracts.traffic import Split
from serve.router.config import RouterConfig
from serve.router.keysync import KeySync
from serve.router.ledger import Ledger
from serve.router.metrics import Metrics
from serve.router.names import stack_name
from serve.router.pool import Pools
from serve.router.table import RouteTable
from serve.state.keys import KeyState
from serve.state.settings import SettingsState
from serve.state.tables import open_state
from serve.state.traffic import Endpoint, RouterReport, TrafficState

T = TypeVar("T")

_log = logging.getLogger("stillhouse.router")
_FAILURES = (StateError, SQLAlchemyError, ValidationError, ConfigError, OSError)


class _Seen(NamedTuple):
    splits: dict[str, Split]
    settings: dict[str, RouteSettings]
    endpoints: dict[str, list[Endpoint]]


class StateSync:
    """The background tasks of one router process."""

    def __init__(
        self,
        config: RouterConfig,
        replica: str,
        table: RouteTable,
        pools: Pools,
        ledger: Ledger,
        metrics: Metrics,
        keys: KeySync | None = None,
    ) -> None:
        self._config = config
        self._replica = replica
        self._table = table
        self._pools = pools
        self._ledger = ledger
        self._metrics = metrics
        self._keys = keys
        self._key_state: KeyState | None = None
        # Two threads: a write that waits for the store's lock must not delay the next look at the splits.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="router-state")
        self._state: TrafficState | None = None
        self._changed = asyncio.Event()
        self._failing: set[str] = set()
        self._address: str | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Look once (a store that is down does not stop the router from starting) and begin."""
        self._metrics.state_read.set_to_current_time()  # one that never reads is as late as it is old
        await self._poll()
        self._tasks = [asyncio.create_task(self._poll_forever()), asyncio.create_task(self._flush_forever())]

    def listens(self, address: str) -> None:
        """Have the reports say where this process listens, as host:port; whoever balances reads it there."""
        self._address = address
        self._changed.set()

    async def stop(self) -> None:
        """Store the last evidence and leave the list of routers."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._flush()
        await self._in_thread("leave", self._leave)
        self._threads.shutdown(wait=False)

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.poll_s)
            await self._poll()

    async def _flush_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.flush_s):
                    await self._changed.wait()
            self._changed.clear()
            await self._flush()

    async def _poll(self) -> None:
        if self._keys is not None:
            await self._poll_keys(self._keys)
        seen = await self._in_thread("read splits", self._read)
        if seen is None:
            return
        self._metrics.state_read.set_to_current_time()
        try:
            self._pools.apply(seen.endpoints)
        except ConfigError as err:
            _log.error("an endpoint in the state store is not a URL: %s", err)
        if self._table.apply(seen.splits, seen.settings):
            self._changed.set()
        replicas = {name: len(self._pools.replicas(u)) for name, u in self._table.upstreams().items()}
        self._metrics.splits.count(replicas, self._table.waiting())

    async def _poll_keys(self, keys: KeySync) -> None:
        seen = await self._in_thread("read keys", lambda: keys.read(self._open_keys()))
        if seen is not None:
            keys.apply(seen)

    async def _flush(self) -> None:
        here = {"address": self._address, "pid": os.getpid(), "stack": stack_name()}
        report = self._table.report(self._replica).model_copy(update=here)
        await self._in_thread("write evidence", lambda: self._write(report))
        self._metrics.ledger_backlog.set(self._ledger.backlog())
        if (keys := self._keys) is not None:
            counted = keys.unwritten()
            written = await self._in_thread("write usage", lambda: keys.write(self._open_keys(), counted))
            if written is not None:
                keys.stored(written)

    async def _in_thread(self, what: str, call: Callable[[], T]) -> T | None:
        """Run one visit to the store; None when it failed, which is logged once until it works again."""
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except _FAILURES as err:
            self._metrics.state_errors.inc()
            if what not in self._failing:
                self._failing.add(what)
                _log.error("cannot %s, going on with what is known: %s", what, err)
            return None
        if what in self._failing:
            self._failing.discard(what)
            _log.warning("can %s again", what)
        return result

    def _open(self) -> TrafficState:
        if self._state is None:
            engine = open_state(self._config.state_url)
            self._settings = SettingsState(engine)
            self._key_state = KeyState(engine)
            self._state = TrafficState(engine)
        return self._state

    def _open_keys(self) -> KeyState:
        self._open()
        assert self._key_state is not None
        return self._key_state

    def _read(self) -> _Seen:
        state = self._open()
        return _Seen(state.splits(), self._settings.settings(), state.endpoints())

    def _write(self, report: RouterReport) -> None:
        # Evidence first: whoever sees a version reported here finds all that was counted before it.
        state = self._open()
        entries = self._ledger.cut()
        if entries:
            state.append_ledger(entries)
            self._ledger.stored(entries)
        state.report_router(report)

    def _leave(self) -> None:
        self._open().drop_router(self._replica)
