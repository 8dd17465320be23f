"""What happens to segments once they are final: erasures that were missed, upload, retention.

One thread in every router process; the one that holds the folder's lock works, the others wait for it to die.
Nothing it does is felt by a request. Knows nothing about rows.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from serve.request_log.erase import expire_tombstones, settle
from serve.request_log.locks import KEEPER, REWRITE, FolderLock, locked
from serve.request_log.remote import Remote
from serve.request_log.segments import final_segments, opened_at

_log = logging.getLogger("stillhouse.request_log")
_TICK_S = 1.0
_LAST_WAIT_S = 3.0
_EXPIRE_S = 3600.0
_MAX_BACKOFF_S = 60.0
_SENT = ".sent"
_DAY_S = 86400.0


class Keeper:
    """Looks after the final segments of one folder."""

    def __init__(
        self,
        folder: Path,
        remote: Remote | None = None,
        keep_local: bool = True,
        retention_days: float | None = None,
        uploaded: Callable[[bool], None] = lambda ok: None,
    ) -> None:
        """`uploaded` is called after every upload with its success."""
        self._folder = folder
        self._remote = remote
        self._keep_local = keep_local
        self._retention_days = retention_days
        self._uploaded = uploaded
        self._lock = FolderLock(folder, KEEPER)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request-log-keeper", daemon=True)
        self._settled = False
        self._seen_at = -1
        """The folder's modification time when everything in it had been sent."""
        self._failures = 0
        self._retry_at = 0.0
        self._expired_at: float | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Send what is final by now, and stop; False when that took too long. Blocks.

        What another process holds the lock for, or cannot be sent in time, is sent by whoever comes next.
        """
        self._stop.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def tick(self, wait_s: float = 0.0) -> bool:
        """Do what is due; False when another process looks after the folder."""
        if not self._lock.take(wait_s):
            return False
        if not self._settled:
            for path in final_segments(self._folder):
                settle(path)  # a writer may have died between closing a segment and this
            self._settled = True
        self._expire()
        self._send_new()
        return True

    def _run(self) -> None:
        while True:
            stopping = self._stop.is_set()
            if stopping:
                self._retry_at = 0.0
            self._tick_safely(_LAST_WAIT_S if stopping and self._remote is not None else 0.0)
            if stopping:
                break
            self._stop.wait(_TICK_S)
        self._lock.give_back()

    def _tick_safely(self, wait_s: float) -> None:
        try:
            self.tick(wait_s)
        except Exception as err:  # noqa: BLE001 reason: remote folders raise anything; the next tick tries again
            self._back_off()
            _log.error("the request log's segments could not be looked after, will try again: %r", err)

    # upload ----------------------------------------------------------------------------------------

    def _send_new(self) -> None:
        if self._remote is None or time.monotonic() < self._retry_at:
            return
        changed_at = self._folder.stat().st_mtime_ns
        if changed_at == self._seen_at:
            return
        for path in final_segments(self._folder):
            if not self._send(path, self._remote):
                return
        self._seen_at = changed_at

    def _send(self, path: Path, remote: Remote) -> bool:
        """Upload a segment unless it is there already; False when that failed.

        A process killed anywhere in here does it again: the name is the same, and the same bytes replace it.
        """
        try:
            if self._mark(path).is_file() and self._mark(path).read_text() == _identity(path):
                return True
            settle(path)
            identity = _identity(path)
            data = path.read_bytes()
        except FileNotFoundError:  # expired meanwhile
            return True
        try:
            remote.write(path.name, data)
        except Exception as err:  # noqa: BLE001 reason: every store has its own errors; told, counted, repeated
            self._uploaded(False)
            self._back_off()
            _log.error(
                "segment %s could not be uploaded to %s, next try in %.0f s: %r",
                path.name, remote.url, self._retry_at - time.monotonic(), err,
            )  # fmt: skip
            return False
        self._failures = 0
        self._uploaded(True)
        return self._finish(path, identity)

    def _finish(self, path: Path, identity: str) -> bool:
        with locked(self._folder, REWRITE):
            try:
                if _identity(path) != identity:
                    return False  # an erasure rewrote it meanwhile: what was sent must be replaced
            except FileNotFoundError:
                return True
            if self._keep_local:
                self._mark(path).parent.mkdir(exist_ok=True)
                self._mark(path).write_text(identity)
            else:
                path.unlink()
                self._mark(path).unlink(missing_ok=True)
        return True

    def _mark(self, path: Path) -> Path:
        return self._folder / _SENT / path.name

    def _back_off(self) -> None:
        self._failures += 1
        pause = min(_MAX_BACKOFF_S, 2.0 ** min(self._failures - 1, 10))
        self._retry_at = time.monotonic() + pause * random.uniform(0.5, 1.0)

    # retention -------------------------------------------------------------------------------------

    def _expire(self) -> None:
        now = time.monotonic()
        if self._expired_at is not None and now - self._expired_at < _EXPIRE_S:
            return
        self._expired_at = now
        expire_tombstones(self._folder)
        if self._retention_days is None:
            return
        # By the segment's beginning: no row outlives the retention, some go up to one rotation earlier.
        oldest = time.time() - self._retention_days * _DAY_S
        for path in final_segments(self._folder):
            if opened_at(path.name) < oldest:
                with locked(self._folder, REWRITE):
                    path.unlink(missing_ok=True)
                    self._mark(path).unlink(missing_ok=True)
        if self._remote is not None:
            for name in self._remote.names():
                if opened_at(name) < oldest:
                    self._remote.delete(name)


def _identity(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"
