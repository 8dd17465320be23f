"""Load on a gateway: wrk for throughput, a client of our own for latency, and a check that answers are right.

Knows nothing about which gateway it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvloop

from benchmarks.gateway.backend import TEXT, TOKENS
from benchmarks.gateway.processes import Failed

_LUA = Path(__file__).with_name("wrk.lua")
_WAIT_S = 20.0


@dataclass(frozen=True)
class Door:
    """Where a gateway is asked, and as whom."""

    url: str
    model: str = "bench"
    key: str = "none"
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 80)

    def request(self, stream: bool, conversation: int = 0) -> bytes:
        """The bytes of one chat completion."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"Question {conversation}: what time is it?"}],
            "max_tokens": TOKENS,
            "temperature": 0,
            **self.more,
        }
        if stream:
            body["stream"] = True
        data = json.dumps(body, separators=(",", ":")).encode()
        host, port = self.address
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {self.key}\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data


@dataclass(frozen=True)
class Throughput:
    """What wrk saw."""

    requests_per_s: float
    requests: int
    errors: int
    p50_ms: float
    p99_ms: float


def need_wrk() -> None:
    """Raises SystemExit that says how to get wrk when it is missing."""
    if shutil.which("wrk") is None:
        raise SystemExit(
            "benchmarks.gateway: wrk is missing. Install it (Debian, Ubuntu: apt-get install wrk; "
            "macOS: brew install wrk; elsewhere build github.com/wg/wrk 4.1 or newer) and run this again."
        )


def throughput(door: Door, stream: bool, clients: int, seconds: float) -> Throughput:
    """Requests a second that `clients` connections get, one thread of wrk."""
    command = [
        "wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "-s", str(_LUA),
        door.url, "--", door.model, door.key, "stream" if stream else "whole", json.dumps(door.more),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    line = next((ln for ln in done.stdout.splitlines() if ln.startswith("SUMMARY ")), None)
    if line is None:
        raise Failed(f"wrk gave no summary: {done.stdout[-500:]}{done.stderr[-500:]}")
    found = json.loads(line.removeprefix("SUMMARY "))
    return Throughput(
        found["requests"] / found["seconds"],
        found["requests"],
        found["errors"],
        found["p50_ms"],
        found["p99_ms"],
    )


class Answer:
    """Reads one answer after another from the bytes of a connection."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.forget()

    def forget(self) -> None:
        """Before the next answer."""
        self.body = b""
        self.first = 0.0
        """When the first byte of the body came."""
        self.whole = False

    def feed(self, data: bytes) -> None:
        """Bytes of the connection."""
        self._parser.feed_data(data)

    @property
    def status(self) -> int:
        """The status code."""
        return self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if not self.body:
            self.first = time.perf_counter()
        self.body += body

    def on_message_complete(self) -> None:
        """The end."""
        self.whole = True


class OneClient:
    """One connection, one request at a time, blocking: the least a client can add to what it measures."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self.answer = Answer()
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.create_connection(self._door.address, timeout=_WAIT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._used = False

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def ask(self, request: bytes) -> tuple[float, float]:
        """Seconds to the first byte of the body, and to its end."""
        answer = self.answer
        answer.forget()
        started = time.perf_counter()
        begun = False
        self._socket.sendall(request)
        while not answer.whole:
            data = self._socket.recv(1 << 16)
            if not data and self._used and not begun:
                # Closed between two answers, as a load balancer may that was given a new configuration.
                self.close()
                self._connect()
                return self.ask(request)
            if not data:
                raise Failed(f"{self._door.url} closed the connection within an answer")
            begun = True
            answer.feed(data)
        self._used = True
        if answer.status != 200:
            raise Failed(f"{self._door.url} answered {answer.status}: {answer.body[:300]!r}")
        return answer.first - started, time.perf_counter() - started


def latencies(door: Door, stream: bool, seconds: float) -> list[float]:
    """One client's milliseconds: to the end of a whole answer, to the first chunk of a stream."""
    requests = [door.request(stream, i) for i in range(512)]
    client = OneClient(door)
    found = []
    try:
        for request in requests[:50]:
            client.ask(request)
        end = time.perf_counter() + seconds
        at = 0
        while time.perf_counter() < end:
            first, whole = client.ask(requests[at % 512])
            found.append((first if stream else whole) * 1e3)
            at += 1
    finally:
        client.close()
    return found


def check(door: Door) -> None:
    """Answers are right: whole and streamed, of several conversations. Raises Failed."""
    client = OneClient(door)
    try:
        for conversation in range(8):
            client.ask(door.request(False, conversation))
            reply = json.loads(client.answer.body)
            _must(door, reply["choices"][0]["message"]["content"] == TEXT * TOKENS, "its text is wrong")
            _must(door, reply["usage"]["completion_tokens"] == TOKENS, "its usage is wrong")
            client.ask(door.request(True, conversation))
            text, ended = _stream_text(client.answer.body)
            _must(door, text == TEXT * TOKENS, f"its stream says {text[:80]!r}")
            _must(door, ended, "its stream does not end with [DONE]")
    finally:
        client.close()


def _must(door: Door, right: bool, why: str) -> None:
    if not right:
        raise Failed(f"{door.url} answers, but {why}: what is fast and wrong is not measured")


def _stream_text(body: bytes) -> tuple[str, bool]:
    events = [e.removeprefix(b"data:").strip() for e in body.split(b"\n\n") if e.startswith(b"data:")]
    chunks = [json.loads(e) for e in events if e != b"[DONE]"]
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    return "".join(d.get("content") or "" for d in deltas), bool(events) and events[-1] == b"[DONE]"


# a fixed rate -------------------------------------------------------------------------------------


class _Paced(asyncio.Protocol):
    """A connection of the paced client; free again when its answer is whole."""

    def __init__(self) -> None:
        self._answer = Answer()
        self._done: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._answer.feed(data)
        if self._answer.whole and self._done is not None and not self._done.done():
            self._done.set_result(self._answer.status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(Failed("the connection was closed within an answer"))

    async def ask(self, request: bytes) -> int:
        """The answer's status, once it is whole."""
        self._answer.forget()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        """Hang up."""
        self._transport.close()


def paced(door: Door, stream: bool, per_s: float, seconds: float) -> list[float]:
    """Milliseconds of whole answers at a fixed rate, sent whether or not earlier ones have come back."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_paced(door, stream, per_s, seconds))


async def _paced(door: Door, stream: bool, per_s: float, seconds: float) -> list[float]:
    loop = asyncio.get_running_loop()
    host, port = door.address
    free: list[_Paced] = [(await loop.create_connection(_Paced, host, port))[1] for _ in range(8)]
    every, found, running = list(free), list[float](), set[asyncio.Task[None]]()

    async def one(number: int) -> None:
        if free:
            connection = free.pop()
        else:
            connection = (await loop.create_connection(_Paced, host, port))[1]
            every.append(connection)
        sent = time.perf_counter()
        status = await asyncio.wait_for(connection.ask(door.request(stream, number % 512)), _WAIT_S)
        if status != 200:
            raise Failed(f"{door.url} answered {status} at {per_s:g} requests a second")
        found.append((time.perf_counter() - sent) * 1e3)
        free.append(connection)

    started = time.perf_counter() + 0.01
    for number in range(round(per_s * seconds)):
        due = started + number / per_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        running.add(loop.create_task(one(number)))
    await asyncio.gather(*running)
    for connection in every:
        connection.close()
    return found


def percentile(values: list[float], share: int) -> float:
    """The `share`-th percentile."""
    return quantiles(values, n=100, method="inclusive")[share - 1]


def machine_is_quiet() -> bool:
    """False when something else keeps more than a third of a core busy, which would be measured too."""
    return os.getloadavg()[0] < 0.35 * (os.cpu_count() or 1)
