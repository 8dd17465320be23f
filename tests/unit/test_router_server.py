"""The router's HTTP server, byte by byte: framing, order, bounds, and what a client that misbehaves gets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from serve.router.guard import Source
from serve.router.server import Bounds, HttpServer

POST = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"


async def _body(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError("gone")
        body += message["body"]
        if not message["more_body"]:
            return body


async def _reply(send: Any, body: bytes, status: int = 200) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class App:
    """Paths are behaviours."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.go = asyncio.Event()
        self.running = asyncio.Event()
        self.scopes: list[dict[str, Any]] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        path = scope["path"]
        if path == "/echo":
            await _reply(send, await _body(receive))
        elif path == "/slow":
            await _body(receive)
            self.running.set()
            await self.go.wait()
            await _reply(send, b"slow")
        elif path == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for part in (b"one", b"", b"two"):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        elif path == "/watch":
            assert isinstance(receive, Source)
            receive.on_disconnect(self.gone.set)
            self.running.set()
            await self.go.wait()
        elif path == "/refuse":
            await _reply(send, b"too large", 413)
        elif path == "/raise":
            raise ValueError("a bug")
        elif path == "/cut":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise ValueError("a bug")


class Client:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
        """One whole answer."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)).decode()
        first, *lines = head.rstrip().split("\r\n")
        headers = {n.lower(): v for n, v in (line.split(": ", 1) for line in lines)}
        if head_only:
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int((await self.reader.readline()).strip(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        else:
            body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), 5)
        return int(first.split()[1]), headers, body

    async def ended(self) -> bytes:
        """What comes until the server hangs up."""
        return await asyncio.wait_for(self.reader.read(), 5)


class World:
    """A server and its application."""

    def __init__(self, server: HttpServer, app: App, port: int) -> None:
        self.server, self.app, self._port = server, app, port
        self.clients: list[Client] = []

    async def client(self) -> Client:
        """A new connection."""
        client = Client(*await asyncio.open_connection("127.0.0.1", self._port))
        self.clients.append(client)
        return client


@asynccontextmanager
async def world(**settings: Any) -> AsyncIterator[World]:
    app = App()
    server = HttpServer(app, bounds=Bounds(**settings))
    listener = socket.create_server(("127.0.0.1", 0))
    await server.start(listener)
    made = World(server, app, listener.getsockname()[1])
    try:
        yield made
    finally:
        for client in made.clients:
            client.writer.close()
        app.go.set()
        await server.stop(1.0)


async def test_requests_of_one_connection_are_answered_one_after_another() -> None:
    """Keep-alive: the second request of a connection gets its own answer, whatever way its body comes."""
    async with world() as w:
        client = await w.client()
        client.write(POST % (5, b"first"))
        assert (await client.answer())[::2] == (200, b"first")
        client.write(b"POST /echo?q=1 HTTP/1.1\r\nhost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nsec\r\n")
        await asyncio.sleep(0.02)
        client.write(b"3\r\nond\r\n0\r\n\r\n")
        assert (await client.answer())[::2] == (200, b"second")
        assert w.app.scopes[1]["query_string"] == b"q=1"
        assert (b"transfer-encoding", b"chunked") in w.app.scopes[1]["headers"]
        client.write(POST % (0, b""))
        assert (await client.answer())[::2] == (200, b"")


async def test_a_stream_is_chunked_and_empty_pieces_do_not_end_it() -> None:
    """An empty body message in the middle must not become the last chunk."""
    async with world() as w:
        client = await w.client()
        client.write(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n")
        status, headers, body = await client.answer()
        assert (status, headers["transfer-encoding"], body) == (200, "chunked", b"onetwo")
        client.write(b"HEAD /stream HTTP/1.1\r\nhost: x\r\n\r\n" + POST % (4, b"next"))
        assert (await client.answer(head_only=True))[0] == 200
        assert (await client.answer())[2] == b"next"  # no byte of a body stood between the two


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    """A quick answer never overtakes a slow one of the same connection."""
    async with world() as w:
        client = await w.client()
        client.write(POST.replace(b"/echo", b"/slow") % (0, b"") + POST % (3, b"two") + POST % (5, b"three"))
        await w.app.running.wait()
        assert len(w.app.scopes) == 1
        w.app.go.set()
        assert [(await client.answer())[2] for _ in range(3)] == [b"slow", b"two", b"three"]


async def test_a_client_that_leaves_is_told_to_the_application() -> None:
    """Without a task that waits for it: this is how generation upstream is cancelled."""
    async with world() as w:
        client = await w.client()
        client.write(b"GET /watch HTTP/1.1\r\nhost: x\r\n\r\n")
        await w.app.running.wait()
        assert not w.app.gone.is_set()
        client.writer.close()
        await asyncio.wait_for(w.app.gone.wait(), 5)


async def test_a_body_nobody_reads_stays_in_the_network() -> None:
    """An application that does not ask for a body does not get all of it into memory."""
    async with world() as w:
        client = await w.client()
        size = 64 * 2**20
        client.write(b"POST /watch HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
        await w.app.running.wait()
        client.write(b"x" * size)
        await asyncio.sleep(0.2)
        left = client.writer.transport.get_write_buffer_size()
        assert left > size // 2


async def test_an_answer_before_the_end_of_the_body_arrives_and_ends_the_connection() -> None:
    """A refused upload gets its refusal, not a reset connection, and its rest is no second request."""
    async with world() as w:
        client = await w.client()
        client.write(b"POST /refuse HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 200_000)
        status, headers, body = await client.answer()
        assert (status, headers["connection"], body) == (413, "close", b"too large")
        client.write(b"x" * 700_000)
        assert await client.ended() == b""
        assert len(w.app.scopes) == 1


async def test_heads_are_bounded() -> None:
    """Neither many headers nor one endless line fill the memory; the client is told why."""
    for head in (
        b"GET /echo HTTP/1.1\r\n" + b"a: b\r\n" * 1000,
        b"GET /echo HTTP/1.1\r\na: " + b"b" * 5000,
        b"GET /" + b"b" * 5000 + b" HTTP/1.1\r\n\r\n",
    ):
        async with world(max_head_bytes=1024) as w:
            client = await w.client()
            for start in range(0, len(head), 500):
                client.write(head[start : start + 500])
                await asyncio.sleep(0.001)
            status, _, body = await client.answer()
            assert status == 431
            assert "1024 bytes" in json.loads(body)["error"]["message"]
            assert w.app.scopes == []


async def test_what_is_not_http_gets_an_error_and_the_answer_under_way_stays_whole() -> None:
    """Garbage behind a good request must not break the good one's answer."""
    async with world() as w:
        client = await w.client()
        client.write(b"\x00\x01garbage\r\n\r\n")
        status, _, body = await client.answer()
        assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")
        second = await w.client()
        second.write(POST.replace(b"/echo", b"/slow") % (0, b""))
        await w.app.running.wait()
        second.write(b"\x00\x01garbage\r\n\r\n")
        await asyncio.sleep(0.02)
        w.app.go.set()
        status, headers, body = await second.answer()
        assert (status, headers["connection"], body) == (200, "close", b"slow")
        assert await second.ended() == b""


async def test_a_broken_body_ends_its_request() -> None:
    """A chunk that is none is refused, and the application does not wait for the rest for ever."""
    async with world() as w:
        client = await w.client()
        client.write(b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        await asyncio.sleep(0.02)
        client.write(b"zz\r\n")
        assert (await client.answer())[0] == 400
        await asyncio.sleep(0.02)
        assert w.server.active == 0


async def test_an_offered_upgrade_is_declined_and_the_request_served() -> None:
    """Java's client offers HTTP/2 with every request; its body must not be taken for that protocol."""
    async with world() as w:
        client = await w.client()
        offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMA\r\n"
        client.write((POST % (4, b"java")).replace(b"host: x\r\n", b"host: x\r\n" + offer))
        assert (await client.answer())[::2] == (200, b"java")
        client.write(POST % (5, b"again"))
        assert (await client.answer())[::2] == (200, b"again")
        client.write(b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer())[0] == 400


async def test_a_bug_in_the_application_costs_one_request() -> None:
    """Before the head it is a 500; after it the connection breaks, so that half an answer is never whole."""
    async with world() as w:
        client = await w.client()
        client.write(b"GET /raise HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer())[0] == 500
        client.write(b"GET /cut HTTP/1.1\r\nhost: x\r\n\r\n")
        try:
            rest = await client.ended()
        except ConnectionError:
            rest = b""
        assert b"0\r\n\r\n" not in rest
        assert w.server.active == 0


async def test_old_clients_and_those_that_say_close_are_left() -> None:
    """HTTP/1.0 has no chunks; its answer ends with the connection, as does one whose client said so."""
    async with world() as w:
        client = await w.client()
        client.write(b"GET /stream HTTP/1.0\r\n\r\n")
        head, _, body = (await client.ended()).partition(b"\r\n\r\n")
        assert body == b"onetwo"
        assert b"chunked" not in head
        second = await w.client()
        second.write((POST % (2, b"hi")).replace(b"host: x", b"connection: close"))
        status, headers, body = await second.answer()
        assert (status, headers["connection"], body) == (200, "close", b"hi")
        assert await second.ended() == b""


async def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    """curl waits for 100 before a large body."""
    async with world() as w:
        client = await w.client()
        client.write(b"POST /echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        interim = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 5)
        assert interim.startswith(b"HTTP/1.1 100 ")
        client.write(b"ok")
        assert (await client.answer())[2] == b"ok"


async def test_a_stop_finishes_what_runs_and_takes_nothing_new() -> None:
    """Idle connections close, a running request gets its whole answer, and is told that it was the last."""
    async with world() as w:
        idle, busy = await w.client(), await w.client()
        busy.write(POST.replace(b"/echo", b"/slow") % (0, b""))
        await w.app.running.wait()
        stopping = asyncio.ensure_future(w.server.stop(5.0))
        assert await idle.ended() == b""
        assert not stopping.done()
        w.app.go.set()
        status, headers, body = await busy.answer()
        assert (status, headers["connection"], body) == (200, "close", b"slow")
        assert await stopping is True


async def test_a_stop_that_may_not_wait_says_so() -> None:
    """What does not end in time is cut, and the caller learns of it."""
    async with world() as w:
        client = await w.client()
        client.write(b"GET /watch HTTP/1.1\r\nhost: x\r\n\r\n")
        await w.app.running.wait()
        assert await w.server.stop(0.0) is False


async def test_a_head_that_does_not_come_is_refused() -> None:
    """A client may not hold a connection open by sending its head byte by byte."""
    async with world(head_s=0.1, keep_alive_s=60.0) as w:
        client, mute = await w.client(), await w.client()
        client.write(b"GET /echo HTTP/1.1\r\n")
        status, _, body = await client.answer()
        assert (status, json.loads(body)["error"]["type"]) == (408, "invalid_request_error")
        assert await mute.ended() == b""
