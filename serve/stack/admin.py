"""The admin API's process beside a stack, and the key with which the stack asks its own first question.

Knows nothing about what the admin API does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from serve.config import ServeConfig
from serve.stack.processes import end_child
from serve.state.keys import KeyState, new_key
from serve.state.tables import open_state

_FILE = "admin.json"
_LOG = "admin.log"
_STOP_S = 10.0


class AdminProcess:
    """Started with the stack, started again when it dies, ended with the stack."""

    def __init__(self, config: ServeConfig) -> None:
        """Does nothing unless the configuration has an `admin` section."""
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The running process, None before the first start."""
        return self._process.pid if self._process is not None else None

    def keep(self) -> None:
        """See that it runs; it inherits the stack's marker, so that it never outlives the stack."""
        section = self._config.admin
        if section is None or (self._process is not None and self._process.poll() is None):
            return
        file = self._config.run_dir / _FILE
        # The state store's URL may hold a password, so it goes through a file and not the command line.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(self._config.router_config().model_dump_json())
        command = [sys.executable, "-m", "serve.admin", "--config", str(file)]
        command += ["--host", section.host, "--port", str(section.port)]
        with (self._config.log_dir / _LOG).open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def stop(self) -> None:
        """End it."""
        end_child(self._process, _STOP_S)


@contextmanager
def stack_key(config: ServeConfig) -> Iterator[dict[str, str]]:
    """Request headers with a key of the stack's own while the block runs; none where keys are off."""
    if not config.router.keys:
        yield {}
        return
    state = KeyState(open_state(config.state_url))
    key, secret = new_key("stillhouse up", expires_at=time.time() + config.start_timeout_s)
    state.create_key(key)
    try:
        yield {"Authorization": f"Bearer {secret}"}
    finally:
        state.delete_key(key.id)
