"""Locks on a log folder, held across processes and given back by the kernel when a process dies.

Knows nothing about what they protect.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.05

REWRITE = ".rewrite.lock"
"""Held while one final segment is replaced or removed; milliseconds."""
ERASE = ".erase.lock"
"""Held by an erasure, so that two do not rewrite the same remote segment."""
KEEPER = ".keeper.lock"
"""Held by the one process that uploads and expires the folder's segments, for as long as it lives."""


class FolderLock:
    """One lock of a folder, taken and given back by hand."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / name
        self._fd: int | None = None

    def take(self, wait_s: float = 0.0) -> bool:
        """True when it is ours, now or within `wait_s`."""
        deadline = time.monotonic() + wait_s
        while not self._try():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def give_back(self) -> None:
        """Somebody else may have it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _try(self) -> bool:
        if self._fd is not None:
            return True
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold a lock of the folder, waiting for it as long as it takes."""
    fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
