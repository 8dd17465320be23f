"""Ledger entries not yet consumed, kept by rollout between looks: each entry is read from the store once.

Rebuilt from the statuses' cursors whenever the process begins to lead, so losing it loses nothing. Knows
nothing about looks or evidence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from contracts.rollout import LedgerEntry, RolloutSpec, RolloutStatus
from serve.rollout.observation import SeenWindow
from serve.state.traffic import TrafficState


@dataclass
class Unread:
    """What one rollout has not consumed: windows by split version, and the cursor behind them."""

    cursor: dict[str, int]
    windows: dict[int, SeenWindow] = field(default_factory=dict)

    def add(self, entry: LedgerEntry) -> None:
        """Take an entry in, unless it is known."""
        if entry.seq <= self.cursor.get(entry.replica, 0):
            return
        version = entry.split_version
        window = self.windows.get(version) or SeenWindow(split_version=version)
        self.windows[version] = window.plus(entry.arm, entry.counts)
        self.cursor[entry.replica] = entry.seq

    def ordered(self) -> tuple[SeenWindow, ...]:
        """The windows, oldest split first."""
        return tuple(self.windows[version] for version in sorted(self.windows))


class LedgerTail:
    """The unread entries of every rollout with traffic."""

    def __init__(self, traffic: TrafficState) -> None:
        self._traffic = traffic
        self._ends: dict[str, int] | None = None
        self._unread: dict[str, Unread] = {}

    def reset(self) -> None:
        """Forget everything: another process may have consumed since."""
        self._ends, self._unread = None, {}

    def forget(self, rollout_id: str) -> None:
        """Read this rollout from its stored cursor again: it consumed, or lost a race."""
        self._unread.pop(rollout_id, None)

    def consumed(self, rollout_id: str) -> None:
        """Its windows are in its status now."""
        unread = self._unread.get(rollout_id)
        if unread is not None:
            unread.windows = {}

    def follow(self, active: Collection[str]) -> None:
        """Read what was appended since the last call, and drop rollouts that are over."""
        ends = self._traffic.ledger_ends()
        if self._ends is not None:
            before = self._ends
            grown = {r: before.get(r, 0) for r, seq in ends.items() if seq > before.get(r, 0)}
            for entry in self._traffic.read_beyond(grown):
                unread = self._unread.get(entry.rollout_id or "")
                if unread is not None:
                    unread.add(entry)
        self._ends = ends
        for gone in self._unread.keys() - set(active):
            del self._unread[gone]

    def of(self, spec: RolloutSpec, status: RolloutStatus) -> Unread:
        """What the rollout has not consumed."""
        unread = self._unread.get(spec.id)
        if unread is None:
            unread = self._unread[spec.id] = Unread(dict(status.cursor))
            for entry in self._traffic.read_ledger(spec.route, spec.id, status.cursor):
                unread.add(entry)
        return unread
