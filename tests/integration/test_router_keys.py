"""API keys with real routers: unchanged clients, limits over two processes, live changes, no secret leaks."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from contracts.keys import ApiKey, KeyUsage
from serve.state.keys import KeyState, new_key
from serve.state.tables import open_state
from tests.integration.router_rig import Server, World, get, post, samples, total, wait_until

pytestmark = pytest.mark.integration
CHAT = "/v1/chat/completions"
HI: Any = [{"role": "user", "content": "hi"}]


class KeyWorld(World):
    """A world whose routers want keys."""

    def __init__(self, folder: Path, state_url: str | None = None) -> None:
        super().__init__(folder, state_url)
        self.keys = KeyState(open_state(self.state_url))
        self.split(1)

    def router(self, multiproc: bool = False, **config: Any) -> Server:
        """A router with keys on."""
        return super().router(multiproc, keys=True, **config)

    def key(self, name: str, **fields: Any) -> tuple[ApiKey, str]:
        """A key that every running router knows."""
        key, secret = new_key(name, **fields)
        self.keys.create_key(key)
        for router in self.routers:
            wait_until("the key is known", lambda at=router: models(at, secret) != 401)  # type: ignore[misc]
        return key, secret

    def usage(self, key: ApiKey) -> KeyUsage:
        """All that a key used, whatever the hour."""
        hours = self.keys.usage(key.id)
        return KeyUsage(
            key_id=key.id,
            hour=0,
            requests=sum(u.requests for u in hours),
            prompt_tokens=sum(u.prompt_tokens for u in hours),
            completion_tokens=sum(u.completion_tokens for u in hours),
        )


@pytest.fixture
def world(tmp_path: Path) -> Iterator[KeyWorld]:
    made = KeyWorld(tmp_path)
    yield made
    made.close()


def client(router: Server, secret: str) -> OpenAI:
    return OpenAI(base_url=f"{router.url}/v1", api_key=secret, max_retries=0, timeout=30)


def ask(router: Server, secret: str, **more: Any) -> int:
    """The status of one question."""
    body = {"model": "support", "messages": HI, **more}
    return post(f"{router.url}{CHAT}", body, Authorization=f"Bearer {secret}")[0]


def models(router: Server, secret: str) -> int:
    """The status of the list of models: asks nobody and counts nowhere."""
    address = router.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {secret}"})
    reply = connection.getresponse()
    reply.read()
    connection.close()
    return reply.status


def test_the_official_client_with_a_right_a_wrong_and_a_narrow_key(world: KeyWorld) -> None:
    """A client's api_key is all it takes; every refusal is the exception that OpenAI's client has for it."""
    router = world.router()
    world.split(1, route="other")
    key, secret = world.key("ci")
    narrow, narrow_secret = world.key("narrow", routes=("support",))
    wide = client(router, secret)
    wait_until("both routes are there", lambda: len(wide.models.list().data) == 2)
    assert wide.chat.completions.create(model="support", messages=HI).choices[0].message.content
    assert "authorization" not in world.stable.status()["last"]["headers"]
    assert "x-api-key" not in world.stable.status()["last"]["headers"]
    with pytest.raises(openai.AuthenticationError) as wrong:
        client(router, secret[:-1] + "~").chat.completions.create(model="support", messages=HI)
    assert wrong.value.code == "invalid_api_key"
    assert wrong.value.response.headers["www-authenticate"] == "Bearer"
    assert secret[:-1] not in str(wrong.value)
    with pytest.raises(openai.PermissionDeniedError, match="other"):
        client(router, narrow_secret).chat.completions.create(model="other", messages=HI)
    with pytest.raises(openai.NotFoundError) as missing:
        client(router, narrow_secret).chat.completions.create(model="nothing", messages=HI)
    assert "other" not in missing.value.message
    assert [m.id for m in client(router, narrow_secret).models.list()] == ["support"]
    with pytest.raises(openai.NotFoundError):
        client(router, narrow_secret).models.retrieve("other")
    with pytest.raises(openai.AuthenticationError):
        client(router, "none").models.list()
    status, answer, _ = post(f"{router.url}{CHAT}", {"model": "support", "messages": HI})
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert (
        post(f"{router.url}{CHAT}", {"model": "support", "messages": HI}, x_api_key=narrow_secret)[0] == 200
    )
    for path in ("/health", "/ready", "/metrics"):
        assert get(f"{router.url}{path}")[0] == 200
    assert get(f"{router.url}/targets")[0] == 401  # addresses of engines are not for everybody
    wait_until("the rows are written", lambda: len(world.rows()) == 2)
    assert [row["key_id"] for row in world.rows()] == [key.id, narrow.id]


def test_usage_is_exact_over_routers_streams_and_embeddings(world: KeyWorld) -> None:
    """Requests and tokens of a key are what was asked, whichever router and endpoint, and outlive them."""
    routers = [world.router(flush_s=0.1) for _ in range(2)]
    key, secret = world.key("ci")
    for router in routers:
        asks = client(router, secret)
        asks.chat.completions.create(model="support", messages=HI)
        assert len(list(asks.chat.completions.create(model="support", messages=HI, stream=True))) == 9
        asks.embeddings.create(model="support", input="x", encoding_format="float")
        with pytest.raises(openai.NotFoundError):
            asks.chat.completions.create(model="nothing", messages=HI)
    wait_until("the usage is written", lambda: world.usage(key).requests == 8)
    for router in routers:
        router.stop()
    used = world.usage(key)
    assert (used.requests, used.prompt_tokens, used.completion_tokens) == (8, 2 * 3 * 7, 2 * 2 * 8)


def test_a_client_that_leaves_a_stream_early_has_still_used_its_tokens(world: KeyWorld) -> None:
    """Leaving before the usage arrives is no way around a limit: what was streamed counts, an event each."""
    world.stable.control(tokens=50, tpot_s=0.05)
    router = world.router(flush_s=0.1, log=None)
    key, secret = world.key("ci")
    stream = client(router, secret).chat.completions.create(model="support", messages=HI, stream=True)
    for _ in range(6):
        next(stream)
    stream.close()
    wait_until("the usage is written", lambda: world.usage(key).completion_tokens > 0)
    assert 4 <= world.usage(key).completion_tokens < 20


def test_a_limit_holds_over_two_routers_and_a_restart(world: KeyWorld) -> None:
    """Two routers admit together what one would, but for one flush, and a new process forgets nothing."""
    routers = [world.router(flush_s=0.1, poll_s=0.05) for _ in range(2)]
    key, secret = world.key("ci", requests_per_minute=30)
    _away_from_the_end_of_a_minute()
    assert [ask(routers[0], secret) for _ in range(30)] == [200] * 30
    assert ask(routers[0], secret) == 429
    wait_until("the count is shared", lambda: world.usage(key).requests == 30)
    assert _passed_until_refused(routers[1], secret) < 5
    with pytest.raises(openai.RateLimitError) as limited:
        client(routers[0], secret).chat.completions.create(model="support", messages=HI)
    headers = limited.value.response.headers
    assert limited.value.code == "rate_limit_exceeded"
    assert 1 <= int(headers["retry-after"]) <= 120
    assert headers["x-ratelimit-limit-requests"] == "30"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    again = world.router(flush_s=0.1, poll_s=0.05)
    assert ask(again, secret) == 429


def test_answers_say_where_a_keys_limits_stand(world: KeyWorld) -> None:
    """By OpenAI's names, whole, streamed or failed; nothing for a key without limits."""
    router = world.router()
    _, secret = world.key("ci", requests_per_minute=100, tokens_per_minute=10_000)
    _, free = world.key("free")
    _away_from_the_end_of_a_minute()
    seen = []
    for stream in (False, True):
        raw = client(router, secret).chat.completions.with_raw_response
        seen.append(raw.create(model="support", messages=HI, stream=stream).headers)
    world.stable.control(status=500)
    with pytest.raises(openai.InternalServerError) as failed:
        client(router, secret).chat.completions.create(model="support", messages=HI)
    seen.append(failed.value.response.headers)
    world.stable.control(status=200)
    assert [h["x-ratelimit-limit-requests"] for h in seen] == ["100"] * 3
    assert [h["x-ratelimit-remaining-requests"] for h in seen] == ["99", "98", "97"]
    assert [h["x-ratelimit-limit-tokens"] for h in seen] == ["10000"] * 3
    assert [int(h["x-ratelimit-remaining-tokens"]) for h in seen][:2] == [10_000, 10_000 - 15]
    assert all(re.fullmatch(r"\d+s", h["x-ratelimit-reset-requests"]) for h in seen)
    unlimited = client(router, free).chat.completions.with_raw_response.create(model="support", messages=HI)
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]


def test_tokens_of_one_router_refuse_at_the_other(world: KeyWorld) -> None:
    """The tokens of a minute are one budget for all routers."""
    routers = [world.router(flush_s=0.1, poll_s=0.05) for _ in range(2)]
    key, secret = world.key("ci", tokens_per_minute=150)
    _away_from_the_end_of_a_minute()
    assert [ask(routers[0], secret) for _ in range(10)] == [200] * 10
    assert ask(routers[0], secret) == 429
    wait_until("the count is shared", lambda: world.usage(key).completion_tokens == 80)
    assert _passed_until_refused(routers[1], secret) < 5


def _passed_until_refused(router: Server, secret: str) -> int:
    """How many get through, asked slowly, at a router that would let many more through on its own."""
    for passed in range(10):
        if ask(router, secret) == 429:
            return passed
        time.sleep(0.5)
    return 10


def test_a_disabled_key_is_refused_by_both_routers_within_a_second(world: KeyWorld) -> None:
    """Whoever leaves is out: live, everywhere, while other keys go on."""
    routers = [world.router() for _ in range(2)]
    key, secret = world.key("leaver")
    _, stays = world.key("stays")
    assert [ask(r, secret) for r in routers] == [200, 200]
    world.keys.change_key(key.id, disabled=True)
    time.sleep(1.0)  # the promise is one second, so this is the one wait that must not be longer
    assert [ask(r, secret) for r in routers] == [401, 401]
    assert [ask(r, stays) for r in routers] == [200, 200]
    world.keys.delete_key(key.id)
    wait_until("it is forgotten", lambda: "disabled" not in _why(routers[0], secret))
    assert ask(routers[0], stays) == 200


def _why(router: Server, secret: str) -> str:
    answer = post(f"{router.url}{CHAT}", {"model": "support"}, Authorization=f"Bearer {secret}")[1]
    return str(answer["error"]["message"])


def test_fifty_key_changes_under_load_fail_nobody_else(world: KeyWorld) -> None:
    """Keys come, change and go all the time; a key that nobody touches never notices."""
    routers = [world.router() for _ in range(2)]
    _, steady = world.key("steady")
    made = [new_key(f"k{i}") for i in range(50)]

    def live(at: int) -> None:
        key, _ = made[at]
        world.keys.create_key(key)
        world.keys.change_key(key.id, requests_per_minute=at + 1)
        if at % 2:
            world.keys.delete_key(key.id)

    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(ask, routers[i % 2], steady) for i in range(200)]
        list(pool.map(live, range(50)))
        assert Counter(f.result() for f in asked) == {200: 200}
    for at, (_, secret) in enumerate(made):
        wanted = 401 if at % 2 else 200
        wait_until("the change is in force", lambda s=secret, w=wanted: models(routers[0], s) == w)  # type: ignore[misc]


ODD: list[bytes] = [
    "Bearer schlüssel-ключ-🔑".encode(),
    b"Bearer \xff\xfe\x80",
    b"Bearer",
    b"Bearer   ",
    b"",
    b"Basic Zm9vOmJhcg==",
    b"Bearer " + b"x" * 30_000,
    b"sk-sh-no-scheme",
    b"Bearer a b c",
]


def test_odd_authorization_headers_are_401_and_leave_no_trace(
    world: KeyWorld, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever is sent as a key is refused in OpenAI's shape; no log, metric or table holds a secret."""
    path = world.folder / "debug.json"
    log = {"dir": str(world.folder / "log")}
    path.write_text(json.dumps({"state_url": world.state_url, "keys": True, "flush_s": 0.1, "log": log}))
    router = Server(
        "-m", "serve.router", "--config", str(path), "--port", "0", "--workers", "1", "--log-level", "debug"
    )
    world.routers.append(router)
    key, secret = world.key("ci")
    off, off_secret = new_key("off", disabled=True)
    world.keys.create_key(off)
    for value in ODD:
        status, body = _raw(router, value)
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    wait_until("the disabled key is known", lambda: "disabled" in _why(router, off_secret))
    assert ask(router, secret) == 200
    assert ask(router, secret, model="nobody") == 404
    assert ask(router, secret, messages="not a list") in (200, 400)
    wait_until("the usage is written", lambda: world.usage(key).requests == 3)
    scrape = get(f"{router.url}/metrics")[1]
    assert total(scrape, "stillhouse_key_requests_total", key=key.id) == 3
    reasons = {dict(k)["reason"] for k in samples(scrape, "stillhouse_key_refused_total")}
    assert reasons == {"missing", "unknown", "disabled"}
    router.stop()
    written = [f.read_bytes() for f in world.folder.rglob("*") if f.is_file()]
    said = b"".join([*written, scrape.encode(), *(t.encode() for t in capfd.readouterr())])
    assert b"router" in said
    for hidden in (secret, off_secret):
        assert hidden.encode() not in said
        assert hidden.removeprefix("sk-sh-").encode() not in said
    assert b"Zm9vOmJhcg" not in said
    assert b"x" * 1000 not in said


def _raw(router: Server, authorization: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(router.url.removeprefix("http://"), timeout=20)
    body = json.dumps({"model": "support", "messages": HI})
    connection.request("POST", CHAT, body, {"Authorization": authorization})  # type: ignore[dict-item]
    reply = connection.getresponse()
    status, answer = reply.status, reply.read()
    connection.close()
    return status, answer


def _away_from_the_end_of_a_minute() -> None:
    """Sums over a minute are asserted below; let it not end in between."""
    left = 60 - time.time() % 60
    if left < 20:
        time.sleep(left + 0.1)
