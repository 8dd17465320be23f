"""Ten thousand requests, wrong in every way we could think of, among valid ones on the same connections.

What must hold: the router answers or hangs up, never with a 5xx of its own making; a valid request before,
after or pipelined with a malformed one gets its own answer; nobody sees another's bytes.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from tests.integration.raw_http import Reply, Wire, chat, request
from tests.integration.router_rig import Server, World, get, total, wait_until

pytestmark = pytest.mark.integration
MALFORMED = 10_000
CONNECTIONS = 16
TOKEN = re.compile(rb"tok-\d+-end")
_numbers = count()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("malformed"))
    made.stable.control(tokens=2)
    made.split(1)
    made.router(max_body_bytes=20_000, timeouts={"body_s": 5.0, "header_s": 5.0})
    yield made
    made.close()


def new_token() -> str:
    return f"tok-{next(_numbers)}-end"


# well framed, wrong inside: the connection lives on ---------------------------------------------------


def _json_of(draw: random.Random, depth: int = 0) -> object:
    """Any JSON."""
    kinds = 8 if depth < 3 else 6
    match draw.randrange(kinds):
        case 0:
            return None
        case 1:
            return draw.random() < 0.5
        case 2:
            return draw.choice([0, -1, 2**63, 10**30, 1e308, -0.0, draw.randrange(10**6)])
        case 3:
            return "".join(chr(draw.choice([0, 9, 34, 92, 0x7F, 0x2028, 0x4E2D, 0x1F600])) for _ in range(4))
        case 4 | 5:
            return draw.choice(["", "support", "user", "stable", "x" * 300])
        case 6:
            return [_json_of(draw, depth + 1) for _ in range(draw.randrange(4))]
        case _:
            keys = ["role", "content", "conversation_id", "include_usage", "a"]
            return {draw.choice(keys): _json_of(draw, depth + 1) for _ in range(draw.randrange(4))}


def wrong_types(draw: random.Random, token: str) -> bytes:
    names = ["model", "messages", "user", "metadata", "stream", "stream_options", "n", "tools", "input"]
    wrong = {name: _json_of(draw) for name in draw.sample(names, draw.randrange(1, 5))}
    return request(json.dumps({"model": "support", "q": token, **wrong}).encode(), draw.choice(PATHS))


def not_an_object(draw: random.Random, token: str) -> bytes:
    return request(json.dumps([_json_of(draw), token]).encode(), draw.choice(PATHS))


def cut_json(draw: random.Random, token: str) -> bytes:
    body = chat(token)
    return request(body[: draw.randrange(len(body))])


def bad_bytes(draw: random.Random, token: str) -> bytes:
    body = bytearray(chat(token))
    for _ in range(3):
        body[draw.randrange(len(body))] = draw.randrange(256)
    return request(bytes(body))


def bad_unicode(draw: random.Random, token: str) -> bytes:
    bad = draw.choice([b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\\ud800", b"\x00"])
    return request(b'{"model": "support", "x": "' + bad + b'", "q": "' + token.encode() + b'"}')


def deep(draw: random.Random, token: str) -> bytes:
    levels = draw.choice([129, 300, 2000, 6000])
    opening, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}")])
    tail = draw.choice([closing * levels, b""])
    body = b'{"model": "support", "q": "' + token.encode() + b'", "x": ' + opening * levels
    return request(body + (b"1" if opening != b"[" else b"") + tail + b"}")


def too_large(draw: random.Random, token: str) -> bytes:
    return request(chat(token, x="y" * draw.randrange(20_001, 60_000)))


def wrong_place(draw: random.Random, token: str) -> bytes:
    path = draw.choice(
        ["/v1/../admin", "/v1/chat/completions/", "//v1/models", "/%00", "/v1/models/" + token]
    )
    path = draw.choice([path, "/?" + "a" * 500, "/v1/chat/completions%2f", "/openapi", "/v1/messages"])
    return request(chat(token), path, draw.choice(["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "GET"]))


def wrong_model(draw: random.Random, token: str) -> bytes:
    return request(json.dumps({"model": token}).encode(), draw.choice(PATHS))


def odd_headers(draw: random.Random, token: str) -> bytes:
    value = draw.choice(["canary\t", "nobody", "\udcff\udcfe", "x" * 3000, "'; drop table", "${jndi:x}"])
    name = draw.choice(
        ["x-stillhouse-arm", "traceparent", "x-request-id", "accept-encoding", "authorization", "expect"]
    )
    return request(
        b'{"model": "support", "messages": 3, "q": "%b"}' % token.encode(),
        PATHS[0],
        "POST",
        f"{name}: {value}",
    )


# not HTTP: the server may answer once, and hangs up ----------------------------------------------------


def garbage(draw: random.Random, token: str) -> bytes:
    return draw.randbytes(draw.randrange(1, 300)) + b"\r\n\r\n"


def bad_request_line(draw: random.Random, token: str) -> bytes:
    line = draw.choice(
        [b"POST", b"GET /", b"BREW /v1/models HTTP/1.1", b"POST / HTTP/9.9", b"GET http:// HTTP/1.1"]
    )
    line = draw.choice(
        [line, b"POST /\xff\xfe HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"GET * HTTP/1.1", b"\x16\x03\x01"]
    )
    return line + b"\r\nhost: x\r\n\r\n"


def bad_length(draw: random.Random, token: str) -> bytes:
    value = draw.choice(
        ["-1", "abc", "1e3", "0x10", "99999999999999999999999", "5, 6", "+5", " ", "5\r\ncontent-length: 6"]
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {value}\r\n\r\n"
    return head.encode() + chat(token)


def smuggled(draw: random.Random, token: str) -> bytes:
    inner = request(chat(token))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n"
    coding = draw.choice([b"chunked", b"Chunked, identity", b"xchunked", b"identity, chunked"])
    return head + b"transfer-encoding: " + coding + b"\r\n\r\n0\r\n\r\n" + inner


def bad_chunks(draw: random.Random, token: str) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + draw.choice(
        [b"zz\r\nabc\r\n", b"-5\r\nabc\r\n", b"5\r\nabcdefgh\r\n", b"ffffffffffffffffff\r\n"]
    )


def bad_header(draw: random.Random, token: str) -> bytes:
    line = draw.choice(
        [b"no colon", b": empty", b"a b: c", b"x\x00y: 1", b"x: \x00", b" folded: 1", b"x:1\rfoo:2"]
    )
    return b"POST /v1/models HTTP/1.1\r\nhost: x\r\n" + line + b"\r\n\r\n"


def huge_header(draw: random.Random, token: str) -> bytes:
    size = draw.choice([33_000, 100_000, 600_000])
    line = draw.choice([b"x: " + b"y" * size, b"\r\n".join(b"h%d: v" % i for i in range(size // 8))])
    line = draw.choice([line, b"x" * size + b": y"])
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + line + b"\r\n\r\n"


PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/v1/embeddings",
    "/tokenize",
]
Maker = Callable[[random.Random, str], bytes]
FRAMED: list[Maker] = [
    wrong_types, wrong_types, not_an_object, cut_json, bad_bytes, bad_unicode, deep, too_large, wrong_place,
    wrong_model, odd_headers,
]  # fmt: skip
BROKEN: list[Maker] = [garbage, bad_request_line, bad_length, smuggled, bad_chunks, bad_header, huge_header]


class Storm:
    """Workers that send malformed requests until enough were sent, and look at every answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sent = self.valid = 0
        self.statuses: Counter[int | None] = Counter()

    async def worker(self, seed: int) -> None:
        draw = random.Random(seed)
        while self.sent < MALFORMED:
            wire = await Wire.open(self.url)
            try:
                await self.connection(wire, draw)
            finally:
                wire.close()

    async def connection(self, wire: Wire, draw: random.Random) -> None:
        """Framed requests with valid ones between them, then one thing that ends the connection."""
        for _ in range(draw.randrange(1, 12)):
            batch: list[tuple[bool, Maker | None, str]] = []
            data = b""
            for _ in range(draw.choice([1, 1, 1, 2, 4])):  # more than one: pipelined
                token, valid = new_token(), draw.random() < 0.3
                maker = draw.choice(FRAMED)
                data += self.good(draw, token) if valid else maker(draw, token)
                batch.append((valid, None if valid else maker, token))
            self.sent += sum(not valid for valid, _, _ in batch)
            await self.write_in_pieces(wire, data, draw)
            for valid, maker, token in batch:
                reply = await wire.reply()
                assert reply is not None, f"{maker and maker.__name__}: hung up on a well-framed request"
                self.check(reply, token, maker)
                if valid:
                    self.check_own(reply, token)
                if reply.closes:
                    return
        await self.last_words(wire, draw)

    async def last_words(self, wire: Wire, draw: random.Random) -> None:
        """Something that is not HTTP, perhaps behind a valid request, perhaps only half of one."""
        token = new_token()
        valid = draw.random() < 0.5
        maker = draw.choice(BROKEN)
        bad = maker(draw, token)
        if draw.random() < 0.3:
            bad = request(chat(token))[: -draw.randrange(1, 150)]
        self.sent += 1
        first = new_token()
        wire.write((self.good(draw, first) if valid else b"") + bad)
        if draw.random() < 0.2:
            return  # and hang up without waiting for anything
        if valid:
            reply = await wire.reply()
            assert reply is not None, f"{maker.__name__} took the answer before it away"
            self.check_own(reply, first)
        wire.finish()
        while (reply := await wire.reply()) is not None:
            self.check(reply, token, maker)

    def good(self, draw: random.Random, token: str) -> bytes:
        self.valid += 1
        body = chat(token, stream=draw.random() < 0.5)
        return request(body, PATHS[0], "POST", f"x-request-id: {token}")

    def check(self, reply: Reply, token: str, maker: Maker | None) -> None:
        self.statuses[reply.status] += 1
        name = maker.__name__ if maker else "valid"
        assert reply.status < 500, f"{name}: {reply}"
        others = {t for t in TOKEN.findall(reply.body) if t != token.encode()}
        assert not others, f"{name}: {others} in the answer to {token}"
        if reply.status >= 400 and reply.body:
            assert json.loads(reply.body)["error"]["message"]

    def check_own(self, reply: Reply, token: str) -> None:
        assert reply.status == 200, reply
        assert reply.headers["x-request-id"] == token
        assert set(TOKEN.findall(reply.body)) == {token.encode()}

    async def write_in_pieces(self, wire: Wire, data: bytes, draw: random.Random) -> None:
        """Mostly at once, sometimes torn anywhere."""
        if draw.random() < 0.2 and len(data) > 2:
            cut = draw.randrange(1, len(data))
            wire.write(data[:cut])
            await asyncio.sleep(0.001)
            data = data[cut:]
        wire.write(data)


async def test_ten_thousand_malformed_requests(world: World) -> None:
    """No 5xx of our making, no hang, nobody else's bytes; afterwards nothing runs and nothing is held."""
    router = world.routers[0]
    storm = Storm(router.url)
    async with asyncio.TaskGroup() as tasks:
        for seed in range(CONNECTIONS):
            tasks.create_task(storm.worker(seed))
    assert storm.sent >= MALFORMED
    assert storm.valid > MALFORMED // 10
    assert {200, 400, 404, 405, 413} <= set(storm.statuses)
    check_idle(router)


def check_idle(router: Server) -> None:
    """The router is as it was: ready, nothing in flight, and it counted no 5xx."""
    scrape = get(f"{router.url}/metrics")[1]
    assert get(f"{router.url}/ready")[0] == 200
    assert total(scrape, "stillhouse_in_flight") == 0
    assert not re.findall(r'^stillhouse_responses_total{code="5.*', scrape, re.MULTILINE)


async def answers(url: str, data: bytes, half_close: bool = False) -> list[Reply]:
    """Everything a connection says to these bytes until it ends."""
    wire = await Wire.open(url)
    wire.write(data)
    if half_close:
        wire.finish()
    found = []
    while (reply := await wire.reply()) is not None:
        found.append(reply)
        if reply.closes:
            break
    wire.close()
    return found


async def test_a_head_without_end_is_refused(world: World) -> None:
    """One header line that never ends, many headers, a long URL: 431, not memory."""
    url = world.routers[0].url
    endless = b"POST / HTTP/1.1\r\nx: " + b"y" * 3_000_000
    (reply,) = await answers(url, endless)
    assert (reply.status, reply.closes) == (431, True)
    assert json.loads(reply.body)["error"]["type"] == "invalid_request_error"
    (reply,) = await answers(url, b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
    assert reply.status == 431


async def test_a_head_or_body_that_never_comes_ends_the_connection(world: World) -> None:
    """A client that connects and stops talking, anywhere, holds its connection for a bounded time only."""
    url = world.routers[0].url
    silent, half_head, half_body = await asyncio.gather(
        answers(url, b""),
        answers(url, b"POST /v1/chat/completions HTTP/1.1\r\nhost:"),
        answers(
            url, b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 9\r\n\r\n{"
        ),
    )
    assert silent == []
    assert [r.status for r in half_head] == [408]
    assert [(r.status, json.loads(r.body)["type"]) for r in half_body] == [(408, "error")]


async def test_garbage_behind_a_request_waits_for_its_answer(world: World) -> None:
    """What is not HTTP never lands in the middle of an answer that is under way."""
    world.stable.control(tpot_s=0.05)
    try:
        token = new_token()
        good = request(chat(token, stream=True), "/v1/chat/completions", "POST", f"x-request-id: {token}")
        (reply,) = await answers(world.routers[0].url, good + b"\x00\x01 what\r\n\r\n")
    finally:
        world.stable.control(tpot_s=0.0)
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert b"HTTP/1.1" not in reply.body


async def test_a_client_that_leaves_a_pipeline_cancels_what_runs(world: World) -> None:
    """With requests queued on its connection too, a client that goes away stops its generation."""
    world.stable.control(tpot_s=0.5, tokens=100)
    before = world.stable.status()["cancelled"]
    try:
        wire = await Wire.open(world.routers[0].url)
        wire.write(request(chat(new_token(), stream=True)) * 2)
        await asyncio.to_thread(wait_until, "it runs", lambda: world.stable.status()["running"] == 1)
        wire.abort()
        await asyncio.to_thread(
            wait_until, "it was cancelled", lambda: world.stable.status()["cancelled"] == before + 1, 10
        )
    finally:
        world.stable.control(tpot_s=0.0, tokens=2)


async def test_an_offered_upgrade_is_declined(world: World) -> None:
    """Clients that offer HTTP/2 (Java's does) get their answers, body and connection as if they had not."""
    wire = await Wire.open(world.routers[0].url)
    offer = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk"
    for _ in range(2):
        token = new_token()
        wire.write(request(chat(token), "/v1/chat/completions", "POST", offer))
        reply = await wire.reply()
        assert reply is not None
        assert (reply.status, set(TOKEN.findall(reply.body))) == (200, {token.encode()})
    wire.write(b"CONNECT support:443 HTTP/1.1\r\nhost: x\r\n\r\n")
    refused = await wire.reply()
    assert refused is not None
    assert (refused.status, refused.closes) == (400, True)
    wire.close()
