"""Priority of background work against serving, where the kernel first shares the processors among sessions.

Linux's autogroups (sched(7)) give every session the same share; a nice level counts only within one, so a
niced run in a session of its own takes as much as the engines. Knows nothing about what runs.
"""

from __future__ import annotations

import os
from pathlib import Path


def lower(nice: int) -> None:
    """Add `nice` to this process' level, and give its session the level, too."""
    level = os.nice(nice)
    _set(os.getpid(), level)


def follow(pid: int) -> None:
    """Give the session of a child (its leader's `pid`) this process' own level."""
    if level := os.getpriority(os.PRIO_PROCESS, 0):
        _set(pid, level)


def _set(pid: int, level: int) -> None:
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(level), encoding="ascii")
    except OSError:  # a kernel without autogroups, or a child that ended: nothing to share
        pass
