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


class NodeRecord(Record):
    """A further node of the stack's Ray."""

    name: str
    pid: int
    """Of the process that all others of the node descend from."""
    started_at: float
    starts: int
    """How often it was started: once, and again after each time it died."""
    resources: dict[str, float] = {}

    @property
    def alive(self) -> bool:
        """True while its process lives."""
        return lives(self.pid, self.started_at)


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
    nodes: tuple[NodeRecord, ...] = ()
    """Further nodes of a Ray of our own."""

    @property
    def supervised(self) -> bool:
        """True while the supervisor's process lives."""
        return lives(self.pid, self.pid_started)


def lives(pid: int, created_at: float) -> bool:
    """True while the process made at this time lives; its pid alone may be somebody else's by now."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created_at) < 2 and process.status() != psutil.STATUS_ZOMBIE
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
