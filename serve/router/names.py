"""Names of router processes, which are also in the names of their log segments. Knows nothing else."""

from __future__ import annotations

import os
import re
import secrets
import socket

STACK_ENV = "STILLHOUSE_STACK_ID"
"""Names the stack, or the cluster, that a process belongs to: all of them inherit it."""


def stack_name() -> str | None:
    """The stack that this process belongs to, None outside of one."""
    return os.environ.get(STACK_ENV)


def host_name() -> str:
    """This machine, in characters that every name may have."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64] or "host"


def replica_name() -> str:
    """host-pid-random: unique for every start of every process."""
    return f"{host_name()}-{os.getpid()}-{secrets.token_hex(4)}"


def is_here(replica: str, pid: int) -> bool:
    """True when the router of this name and process id runs, or ran, on this machine."""
    return replica.startswith(f"{host_name()}-{pid}-")
