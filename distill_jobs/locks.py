"""Files that one process at a time holds. A lock dies with its process, so SIGKILL leaves nothing behind.

Knows nothing about what is guarded.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from contracts.errors import ConflictError

GLANCE_S = 0.5
"""Longer than `is_locked` holds a lock to see whether it could."""
_AGAIN_S = 0.05


def is_locked(file: Path) -> bool:
    """True while somebody holds a lock file. Takes the lock for an instant itself."""
    try:
        with file.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def take(lock: IO[str], wait_s: float = 0.0) -> bool:
    """Lock an open file; False when somebody else still holds it after so many seconds."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_AGAIN_S)
        else:
            return True


@contextmanager
def held(file: Path, refusal: Callable[[str], str], wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file, with this process's id in it.

    Raises: ConflictError with what `refusal` says of the process that holds it.
    """
    with file.open("a+", encoding="utf-8") as lock:
        if not take(lock, wait_s):
            lock.seek(0)
            raise ConflictError(refusal(lock.read().strip() or "unknown"))
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
