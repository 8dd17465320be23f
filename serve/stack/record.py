"""`stack.json`: what a running stack is and how other commands reach it.

Written by the supervisor, read by every other command. Knows nothing about Ray Serve.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
from pydantic import ValidationError

from contracts.config import Record, dump_resolved
from contracts.errors import NotFoundError
from serve.config import ServeConfig

FILE = "stack.json"


class StackRecord(Record):
    """One stack. `phase`: starting, ready, stopping or failed."""

    stack_id: str
    """Environment marker that every process of the stack carries."""
    pid: int
    pid_started: float
    """Creation time of the supervisor's process: a pid alone may be somebody else's by now."""
    url: str
    admin_url: str | None = None
    """Where the admin API listens."""
    config: str
    phase: str = "starting"
    detail: str = ""
    started_at: float
    ready_at: float | None = None
    ray_address: str | None = None
    token_file: str | None = None
    ray_dir: str | None = None
    """Ray's temporary folder when it is ours to delete."""

    @property
    def supervised(self) -> bool:
        """True while the supervisor's process lives."""
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.pid_started) < 2 and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False


def record_path(config: ServeConfig) -> Path:
    """Where the record of this configuration's stack is."""
    return config.run_dir / FILE


def read_record(config: ServeConfig) -> StackRecord | None:
    """The record, or None when there is no stack (or its file is torn)."""
    try:
        return StackRecord.model_validate_json(record_path(config).read_text())
    except (FileNotFoundError, ValidationError):  # a record we cannot read names nothing we could end
        return None


def write_record(config: ServeConfig, record: StackRecord) -> None:
    """Store it atomically."""
    dump_resolved(record, record_path(config))


def running_record(config: ServeConfig) -> StackRecord:
    """The record of a stack that runs. Raises: NotFoundError saying how to start one."""
    record = read_record(config)
    if record is None or not record.supervised:
        raise NotFoundError(f"no stack runs in {config.run_dir}; start it with 'stillhouse up'.")
    return record


def ray_environment(record: StackRecord) -> dict[str, str]:
    """What a process needs in its environment to join the stack's Ray."""
    env = {}
    if record.ray_address:
        env["RAY_ADDRESS"] = record.ray_address
    if record.token_file:
        env.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=record.token_file)
    return env


def join(record: StackRecord) -> None:
    """Set this process's environment so that `ray.init()` finds the stack's Ray."""
    os.environ.update(ray_environment(record))
