"""A port for a server that a test ends and starts again, which nobody else may take in between."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []
"""Kept until this process ends, so that no test has to say which start of its server was the last."""


def held_port() -> int:
    """A port of 127.0.0.1 that is this process' own until it ends, for servers that set SO_REUSEADDR.

    A port that is merely free is anybody's whenever the server is away, and tests run side by side. This one
    is bound and never listened on. Linux refuses connections to it, lets a server that sets SO_REUSEADDR
    listen there, as nearly all do, and gives it to nobody who looks for a free port or needs one to connect
    from: neither `bind` to port 0 nor a probe without SO_REUSEADDR, like that of `free_ports`, gets it.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return int(holder.getsockname()[1])
