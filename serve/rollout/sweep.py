"""Deletes what the evidence ledger no longer needs: entries of rollouts that are over, and consumed ones.

Deletes nothing that a running rollout has yet to consume, however old. Knows the ledger and statuses'
cursors, nothing of looks.
"""

from __future__ import annotations

from collections.abc import Callable

from serve.state.rollouts import RolloutState
from serve.state.traffic import TrafficState

KEPT_S = 3600.0
"""Also for people who look into the store, and for an upgrade that must go back."""
EVERY_S = 60.0
AT_ONCE = 5000
"""Rows a transaction: routers write to the same table, and SQLite lets one write at a time."""


class LedgerSweep:
    """The controller's housekeeping of the ledger."""

    def __init__(self, rollouts: RolloutState, traffic: TrafficState, clock: Callable[[], float]) -> None:
        self._rollouts, self._traffic, self._clock = rollouts, traffic, clock
        self._next = 0.0

    def sweep(self) -> int:
        """Delete up to `AT_ONCE` entries a minute, at each call while there are more; returns how many."""
        now = self._clock()
        if now < self._next:
            return 0
        # Read from the store: what a controller remembers lacks a rollout whose last tick it lost.
        cursors = {one.spec.id: one.status.cursor for one in self._rollouts.active()}
        deleted = self._traffic.prune_ledger(now - KEPT_S, cursors, AT_ONCE)
        self._next = now if deleted == AT_ONCE else now + EVERY_S
        return deleted
