"""The router's HTTP client against scripted bytes: any chunk boundary, any way a peer can misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from serve.router.client import Broken, ConnectFailed, HttpClient, Target, target_of

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"


@asynccontextmanager
async def peer(script: Script) -> AsyncIterator[Target]:
    """A server that runs `script` for every connection."""

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(run, "127.0.0.1", 0)
    async with server:
        yield target_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base")


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.startswith(b"content-length"))
    return head + await reader.readexactly(length)


async def ask(client: HttpClient, target: Target) -> bytes:
    connection = await client.ask(target, "POST", "/v1/x", b"a: b\r\n", b"body")
    try:
        return await connection.read_all()
    finally:
        client.release(connection)


@pytest.mark.parametrize(("raw", "body"), [(WHOLE, b"hello"), (CHUNKED, b"abcde")])
async def test_an_answer_in_single_bytes(raw: bytes, body: bytes) -> None:
    """However the network cuts an answer, its body is the same."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        for at in range(len(raw)):
            writer.write(raw[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0)

    async with peer(script) as target:
        assert await ask(HttpClient(2), target) == body


async def test_the_request_is_what_was_asked_and_connections_are_reused() -> None:
    """Prefix, host, headers and body arrive; three requests need one connection."""
    seen: list[bytes] = []
    connections = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        while True:
            seen.append(await request(reader))
            writer.write(WHOLE)

    async with peer(script) as target:
        client = HttpClient(2)
        for _ in range(3):
            assert await ask(client, target) == b"hello"
        client.close()
    expected = (
        f"POST /base/v1/x HTTP/1.1\r\nhost: {target.authority}\r\ncontent-length: 4\r\na: b\r\n\r\nbody"
    )
    assert seen == [expected.encode()] * 3
    assert len(connections) == 1


async def test_a_kept_connection_that_was_closed_is_replaced() -> None:
    """A server that closes idle connections costs nothing: the request goes out on a fresh one."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(WHOLE)
        await writer.drain()
        await request(reader)  # the second request arrives, and is never answered

    async with peer(script) as target:
        client = HttpClient(2)
        assert await ask(client, target) == b"hello"
        assert await ask(client, target) == b"hello"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nconte",
        b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello",
        CHUNKED[:-5],
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
async def test_cut_off_and_nonsense_answers_are_broken(raw: bytes) -> None:
    """No answer that is not whole is ever taken for one, and none hangs."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(raw)
        await writer.drain()

    async with peer(script) as target, asyncio.timeout(10):
        with pytest.raises(Broken):
            await ask(HttpClient(2), target)


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    """HTTP/1.0 style answers are whole when the peer closes, and the connection is not kept."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")

    async with peer(script) as target:
        client = HttpClient(2)
        assert await ask(client, target) == b"all of it"
        assert await ask(client, target) == b"all of it"


async def test_bytes_of_a_second_answer_never_reach_anybody() -> None:
    """A peer that answers twice cannot have its second answer taken for somebody else's."""
    answers = [WHOLE + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nEVIL!", WHOLE]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answers.pop(0))
        await writer.drain()
        await reader.read()

    async with peer(script) as target:
        client = HttpClient(2)
        assert [await ask(client, target), await ask(client, target)] == [b"hello", b"hello"]


async def test_interim_answers_are_skipped() -> None:
    """103 Early Hints and the like are not the answer."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + WHOLE)

    async with peer(script) as target:
        assert await ask(HttpClient(2), target) == b"hello"


async def test_nobody_there_is_a_failed_connection() -> None:
    """A refused connection is told apart from a broken one: the request was never seen."""
    async with peer(lambda _r, _w: asyncio.sleep(0)) as target:
        pass
    with pytest.raises(ConnectFailed):
        await ask(HttpClient(2), target)


async def test_a_large_answer_is_read_at_the_readers_pace() -> None:
    """A slow client does not make the router hold a whole large answer in memory."""
    size = 8 * 2**20

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size // 65536):
            writer.write(b"x" * 65536)
            await writer.drain()

    async with peer(script) as target:
        client = HttpClient(2)
        connection = await client.ask(target, "GET", "/", b"")
        await asyncio.sleep(0.2)
        assert connection._buffered <= 1024 * 1024
        assert len(await connection.read_all()) == size
        client.release(connection)
