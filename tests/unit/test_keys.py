"""API keys in the router: who is let in, what they may ask for, and how much, over all router processes."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from contracts.errors import ConfigError
from contracts.keys import ApiKey
from serve.router.errors import RequestRefused
from serve.router.keys import KeyTable, in_scope
from serve.router.windows import UsageBook, rate, wait_s
from serve.state.keys import PREFIX, MinuteUsage, Spent, digest_of, new_key

T0 = 1_000_000 * 60.0
"""The first second of a minute."""
M0 = 1_000_000


class FakeMetrics:
    """The two counters that a KeyTable writes."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.key_requests = Counter("requests", "", ["key"], registry=registry)
        self.key_refused = Counter("refused", "", ["reason"], registry=registry)


class Clock:
    """A clock that is set by hand."""

    now = T0

    def __call__(self) -> float:
        return self.now


def table(*keys: ApiKey, clock: Clock | None = None) -> KeyTable:
    """A table with these keys in force."""
    made = KeyTable(True, FakeMetrics(), clock or Clock())  # type: ignore[arg-type]
    made.apply(keys)
    return made


def bearer(secret: str | bytes) -> list[tuple[bytes, bytes]]:
    """Request headers with a key."""
    raw = secret.encode() if isinstance(secret, str) else secret
    return [(b"host", b"x"), (b"authorization", b"Bearer " + raw)]


def refusal(keys: KeyTable, headers: list[tuple[bytes, bytes]]) -> RequestRefused:
    """How a request is turned away."""
    with pytest.raises(RequestRefused) as caught:
        keys.admit(headers)
    return caught.value


def test_a_secret_has_256_bits_and_only_its_digest_is_kept() -> None:
    """Two keys never share a secret, and nothing of it is in the record."""
    key, secret = new_key("ci")
    other, second = new_key("ci")
    assert secret.startswith(PREFIX)
    assert len(secret) == len(PREFIX) + 43
    assert set(secret.removeprefix(PREFIX)) <= set(string.ascii_letters + string.digits + "-_")
    assert key.digest == digest_of(secret.encode())
    assert secret not in key.model_dump_json()
    assert (key.id, secret) != (other.id, second)
    assert key.id != other.id


def test_bad_fields_of_a_new_key_are_named() -> None:
    """Whoever makes a key hears which fields are wrong, all at once."""
    with pytest.raises(ConfigError) as caught:
        new_key("", requests_per_minute=0)
    assert "name" in str(caught.value)
    assert "requests_per_minute" in str(caught.value)


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER   "])
def test_openai_and_anthropic_clients_are_let_in(scheme: bytes) -> None:
    """A key comes as a bearer token or as x-api-key; a bearer token wins."""
    key, secret = new_key("a")
    keys = table(key)
    assert keys.admit([(b"authorization", scheme + secret.encode())]) == key
    assert keys.admit([(b"x-api-key", secret.encode())]) == key
    assert keys.admit([(b"x-api-key", b"wrong"), *bearer(secret)]) == key


def test_keys_off_lets_everybody_in_uncounted() -> None:
    """Without keys nothing is asked for and nothing is counted."""
    keys = KeyTable(False, FakeMetrics())  # type: ignore[arg-type]
    assert keys.admit([]) is None
    keys.check_route(None, "any")
    assert keys.book.unwritten() == []


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ([], "didn't provide"),
        ([(b"authorization", b"Basic abc")], "didn't provide"),
        (bearer(b""), "Incorrect"),
        (bearer(b"sk-sh-nobody"), "Incorrect"),
        (bearer("schlüssel-ключ-🔑".encode()), "Incorrect"),
        (bearer(b"x" * 1_000_000), "Incorrect"),
        ([(b"authorization", b"Bearer")], "Incorrect"),
        ([(b"x-api-key", b"\xff\xfe\x00")], "Incorrect"),
    ],
)
def test_without_a_right_key_it_is_401_in_openais_shape(
    headers: list[tuple[bytes, bytes]], says: str
) -> None:
    """Whatever is sent instead of a key is refused the same way and never repeated."""
    refused = refusal(table(new_key("a")[0]), headers)
    error = refused.body["error"]
    assert (refused.status, error["code"], error["type"]) == (401, "invalid_api_key", "invalid_request_error")
    assert says in error["message"]
    assert dict(refused.headers)[b"www-authenticate"] == b"Bearer"


def test_disabled_and_expired_keys_are_refused_with_the_reason() -> None:
    """The holder of a key hears why it does not work any more."""
    clock = Clock()
    off, off_secret = new_key("off", disabled=True)
    old, old_secret = new_key("old", expires_at=T0 + 1)
    keys = table(off, old, clock=clock)
    assert "disabled" in str(refusal(keys, bearer(off_secret)))
    assert keys.admit(bearer(old_secret)) == old
    clock.now = T0 + 1
    assert "expired" in str(refusal(keys, bearer(old_secret)))


def test_before_the_keys_are_read_nobody_is_called_wrong() -> None:
    """A router that could not read its keys says so with 503 instead of refusing right keys with 401."""
    keys = KeyTable(True, FakeMetrics())  # type: ignore[arg-type]
    assert keys.missing() == ["the API keys"]
    assert refusal(keys, bearer("sk-sh-any")).status == 503
    keys.apply([])
    assert keys.missing() == []


def test_a_key_may_only_ask_for_its_routes() -> None:
    """A route out of scope is 403; a key without a scope has them all, an empty scope has none."""
    key, _ = new_key("a", routes=("one",))
    keys = table(key)
    keys.check_route(key, "one")
    with pytest.raises(RequestRefused) as caught:
        keys.check_route(key, "two")
    assert (caught.value.status, caught.value.body["error"]["code"]) == (403, "model_not_allowed")
    assert in_scope(new_key("b")[0], "two")
    assert not in_scope(new_key("c", routes=())[0], "two")


def test_the_request_above_the_limit_is_429_and_says_when_to_come_back() -> None:
    """A key gets exactly its requests of a minute; Retry-After is honoured by what comes then."""
    clock = Clock()
    key, secret = new_key("a", requests_per_minute=5)
    keys = table(key, clock=clock)
    for _ in range(5):
        keys.admit(bearer(secret))
    clock.now = T0 + 20
    refused = refusal(keys, bearer(secret))
    headers = dict(refused.headers)
    error = refused.body["error"]
    assert (refused.status, error["code"], error["type"]) == (429, "rate_limit_exceeded", "requests")
    assert headers[b"retry-after"] == b"41"
    assert headers[b"x-ratelimit-limit-requests"] == b"5"
    assert headers[b"x-ratelimit-remaining-requests"] == b"0"
    assert headers[b"x-ratelimit-reset-requests"] == b"100s"  # until nothing of this minute counts any more
    clock.now = T0 + 61
    assert keys.admit(bearer(secret)) == key


def test_limits_are_told_before_they_are_reached() -> None:
    """OpenAI's six headers, after this request was counted; none for a key without limits."""
    clock = Clock()
    key, secret = new_key("a", requests_per_minute=10, tokens_per_minute=1000)
    keys = table(key, clock=clock)
    keys.admit(bearer(secret))
    keys.ended(key.id, 100, 50)
    keys.admit(bearer(secret))
    clock.now = T0 + 12.5
    assert keys.limit_lines(key) == (
        (b"x-ratelimit-limit-requests", b"10"),
        (b"x-ratelimit-remaining-requests", b"8"),
        (b"x-ratelimit-reset-requests", b"108s"),
        (b"x-ratelimit-limit-tokens", b"1000"),
        (b"x-ratelimit-remaining-tokens", b"850"),
        (b"x-ratelimit-reset-tokens", b"108s"),
    )
    clock.now = T0 + 90  # half of the minute before still counts
    assert dict(keys.limit_lines(key))[b"x-ratelimit-remaining-tokens"] == b"925"
    assert dict(keys.limit_lines(key))[b"x-ratelimit-reset-tokens"] == b"30s"
    clock.now = T0 + 200
    assert dict(keys.limit_lines(key))[b"x-ratelimit-reset-requests"] == b"0s"
    only = new_key("b", tokens_per_minute=7)[0]
    assert keys.limit_lines(only)[0][0] == b"x-ratelimit-limit-tokens"
    assert len(keys.limit_lines(only)) == 3
    assert keys.limit_lines(new_key("c")[0]) == ()


def test_spent_tokens_refuse_the_next_request() -> None:
    """Tokens count when a request ends; embeddings spend prompt tokens only."""
    clock = Clock()
    key, secret = new_key("a", tokens_per_minute=100)
    keys = table(key, clock=clock)
    keys.admit(bearer(secret))
    keys.ended(key.id, 7, None)
    keys.ended(key.id, 40, 52)
    assert keys.admit(bearer(secret)) == key
    keys.ended(key.id, None, 1)
    refused = refusal(keys, bearer(secret))
    assert refused.body["error"]["type"] == "tokens"
    assert dict(refused.headers)[b"x-ratelimit-limit-tokens"] == b"100"
    assert keys.book.unwritten() == [MinuteUsage(key.id, M0, 2, 47, 53)]


def test_other_routers_requests_count_against_the_limit() -> None:
    """What the other processes wrote is added to this one's exact count."""
    key, secret = new_key("a", requests_per_minute=5)
    keys = table(key)
    keys.book.take_others({key.id: {M0: Spent(3, 0)}})
    keys.admit(bearer(secret))
    keys.admit(bearer(secret))
    assert refusal(keys, bearer(secret)).status == 429


def test_a_removed_key_still_pays_for_what_it_had_running() -> None:
    """Deleting a key refuses it at once and loses none of its usage."""
    key, secret = new_key("a")
    keys = table(key)
    keys.admit(bearer(secret))
    keys.apply([])
    assert refusal(keys, bearer(secret)).status == 401
    keys.ended(key.id, 7, 8)
    assert keys.book.unwritten() == [MinuteUsage(key.id, M0, 1, 7, 8)]


COUNT = st.integers(0, 10_000)
SECOND = st.floats(0, 59.999)


@given(previous=COUNT, current=COUNT, limit=st.integers(1, 10_000), second=SECOND)
def test_waiting_as_told_is_enough_and_no_wait_means_free(
    previous: int, current: int, limit: int, second: float
) -> None:
    """Retry-After never sends a client into a second refusal, and is not longer than two minutes."""
    now = T0 + second
    wait = wait_s(previous, current, limit, now)
    if wait == 0:
        assert rate(previous, current, now) < limit
        return
    assert wait <= 120
    then = now + wait
    moved = int(then // 60) - M0
    before, within = {0: (previous, current), 1: (current, 0)}.get(moved, (0, 0))
    assert rate(before, within, then) < limit


@given(
    events=st.lists(st.tuples(st.floats(0, 179.99), st.integers(0, 2)), max_size=60), limit=st.integers(1, 8)
)
def test_replicas_that_know_each_other_admit_what_one_would(
    events: list[tuple[float, int]], limit: int
) -> None:
    """Three routers in step hold a limit exactly as one router does, at every moment."""
    key, secret = new_key("a", requests_per_minute=limit)
    clock = Clock()
    one = table(key, clock=clock)
    several = [table(key, clock=clock) for _ in range(3)]

    def let_in(keys: KeyTable) -> bool:
        try:
            keys.admit(bearer(secret))
        except RequestRefused:
            return False
        return True

    for second, which in sorted(events):
        clock.now = T0 + second
        asked = several[which]
        asked.book.take_others(_sum_of(several, asked))
        assert let_in(asked) == let_in(one)


def _sum_of(several: list[KeyTable], but: KeyTable) -> dict[str, dict[int, Spent]]:
    found: dict[str, dict[int, Spent]] = {}
    for one in several:
        if one is but:
            continue
        for row in one.book.unwritten():
            minutes = found.setdefault(row.key_id, {})
            old = minutes.get(row.minute, Spent(0, 0))
            minutes[row.minute] = Spent(old.requests + row.requests, 0)
    return found


def test_no_count_is_lost_between_a_flush_and_the_next() -> None:
    """What is counted while a write is under way is written by the next one; old minutes are forgotten."""
    book = UsageBook()
    book.add("k", T0, 1, 0, 0)
    written = book.unwritten()
    book.add("k", T0, 1, 3, 4)
    book.stored(written, T0)
    assert book.unwritten() == [MinuteUsage("k", M0, 2, 3, 4)]
    book.stored(book.unwritten(), T0)
    assert book.unwritten() == []
    assert book.spent("k", M0) == Spent(2, 7)
    book.stored([], T0 + 180)
    assert book.spent("k", M0) == Spent(0, 0)


def test_a_burst_at_the_edge_of_a_minute_is_not_doubled() -> None:
    """Fixed minutes would let twice the limit through around their edge; the sliding one does not."""
    clock = Clock()
    key, secret = new_key("a", requests_per_minute=10)
    keys = table(key, clock=clock)
    passed: list[float] = []
    for tenth in range(550, 700):  # ten requests a second, from 55 s to 70 s
        clock.now = T0 + tenth / 10
        try:
            keys.admit(bearer(secret))
        except RequestRefused:
            continue
        passed.append(clock.now)
    assert sum(1 for p in passed if p < T0 + 60) == 10
    assert sum(1 for p in passed if p >= T0 + 60) == 2  # 10 s later a sixth of the burst has left the window
