"""What one of the stack's own HAProxy processes is told: its configuration file, and changes while it runs.

Pure text. The options of a connection are those that Ray Serve gives its HAProxy (timeouts, reuse, no header
added), so a client cannot tell which of them it talks to. One more: a request whose router died before the
first byte of an answer goes to another one (`empty-response`), as far as HAProxy holds it (16 kB). The dead
one counted nothing for it, since a router counts when a request ends; feedback it may have stored, so that
is not sent again. Routers come and go by HAProxy's runtime API and not by reloads: after a reload the old
process would keep its list of servers, check none of them any more, and its streams would be cut when its
time is over. Knows nothing about processes, Ray or the store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from serve.router.errors import error_body

BACKEND = "routers"
SHOW = f"show servers state {BACKEND}"
"""The question whose answer `changes` reads."""
_CHECK = "check inter 500ms fall 2 rise 2 observe layer4 error-limit 3 on-error mark-down"
"""A router that drains says so to the first check and goes on listening for two seconds (`drain_s` of
serve/router/haproxy.py): two checks must fit into them."""
_ERRORS = {
    502: ("Bad Gateway", "The router's answer was cut off."),
    503: ("Service Unavailable", "No router is there to answer; try again."),
    504: ("Gateway Timeout", "The router did not answer in time."),
}
_MAINTENANCE = 0x01
"""Bit of HAProxy's `srv_admin_state`."""


class RouterAddress(NamedTuple):
    """One router replica as HAProxy has it."""

    name: str
    address: str
    """host:port"""

    @classmethod
    def of(cls, replica: str, address: str) -> RouterAddress:
        """With a name that HAProxy takes."""
        return cls(re.sub(r"[^A-Za-z0-9._-]", "_", replica), address)


class Places(NamedTuple):
    """What differs from one process to the next."""

    socket: Path
    """Of its runtime API."""
    listener: int
    """File descriptor of the listening socket that it inherits."""
    rays: int
    """Port of Ray Serve's own HAProxy on this machine."""
    errors: Path
    """Folder of `error_files`."""


def configuration(routers: Iterable[RouterAddress], places: Places) -> str:
    """The file one process starts with.

    Ray's own HAProxy is asked only while no router is known or none answers: a router that Ray had to put
    behind its own HTTP server reports no address. What it says before it knows its routes (404, in plain
    text) is never a router's answer, so clients are told to try again instead.
    """
    files = "\n".join(f"    errorfile {status} {places.errors / f'{status}.http'}" for status in _ERRORS)
    servers = "\n".join(f"    server {r.name} {r.address}" for r in routers)
    return f"""global
    stats socket {places.socket} mode 600 level admin
    maxconn 4096
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout http-keep-alive 90s
    timeout check 5s
    option abortonclose
    option splice-request
    option splice-response
    option http-no-delay
    option idle-close-on-response
    option redispatch 1
    retry-on conn-failure empty-response
    option http-buffer-request
    balance leastconn
    http-reuse always
    http-check expect status 200
{files}
frontend public
    bind fd@{places.listener}
    use_backend {BACKEND} if {{ nbsrv({BACKEND}) gt 0 }}
    default_backend ray
backend {BACKEND}
    http-request disable-l7-retry if {{ path -m beg /v1/feedback }}
    option httpchk GET /-/healthz
    default-server {_CHECK}
{servers}
backend ray
    option httpchk GET /health
    acl not_a_router res.hdr(content-type) -m beg text/
    http-response return status 503 default-errorfiles if {{ status 404 }} not_a_router
    server ray 127.0.0.1:{places.rays} check inter 1s fall 2 rise 1
"""


def error_files() -> dict[str, str]:
    """File name → content of what HAProxy answers by itself, in OpenAI's shape; clients retry all of them."""
    files = {}
    for status, (reason, message) in _ERRORS.items():
        body = json.dumps(error_body(message, "server_error", "no_router"))
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        files[f"{status}.http"] = f"{head}Content-Length: {len(body)}\r\n\r\n{body}"
    return files


def changes(shown: str, wanted: Iterable[RouterAddress]) -> list[str]:
    """Commands that bring a running process from what it answered to `SHOW` closer to `wanted`.

    A router that is not wanted gets no new request and is deleted once its last one is over: HAProxy refuses
    to delete before, so that command comes again with every call until then.
    """
    missing = {r.name: r for r in wanted}
    commands = []
    for name, address, admin in _servers(shown):
        if missing.get(name) == RouterAddress(name, address):
            del missing[name]
            if admin & _MAINTENANCE:
                commands.append(f"enable server {BACKEND}/{name}")
        else:
            if not admin & _MAINTENANCE:
                commands.append(f"disable server {BACKEND}/{name}")
            commands.append(f"del server {BACKEND}/{name}")
    for router in missing.values():
        at = f"{BACKEND}/{router.name}"
        commands += [f"add server {at} {router.address} {_CHECK}"]
        commands += [f"enable health {at}", f"enable server {at}"]
    return commands


def _servers(shown: str) -> list[tuple[str, str, int]]:
    """Name, address and administrative state; columns by the header that HAProxy prints above them."""
    lines = [line for line in shown.splitlines() if line.strip()]
    header = next((line for line in lines if line.startswith("# be_id")), "")
    columns = header.removeprefix("# ").split()
    found = []
    for line in lines:
        row = dict(zip(columns, line.split(), strict=False))
        if row.get("be_name") == BACKEND:
            host = row["srv_addr"]
            host = f"[{host}]" if ":" in host else host
            found.append((row["srv_name"], f"{host}:{row['srv_port']}", int(row["srv_admin_state"])))
    return found
