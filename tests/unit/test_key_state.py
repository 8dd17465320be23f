"""Keys, usage and route settings in the state store: what races and repeated writes cannot break."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from contracts.errors import ConfigError, ConflictError, NotFoundError
from contracts.keys import KeyUsage
from contracts.routes import RouteLimits, RouteSettings
from serve.state.keys import KeyState, MinuteUsage, Spent, new_key
from serve.state.settings import SettingsState
from serve.state.tables import metadata

HOUR = 500_000
MINUTE = HOUR * 60


@pytest.fixture
def state(engine: Engine) -> KeyState:
    """Keys of an empty store."""
    return KeyState(engine)


def test_a_key_is_found_by_its_secrets_digest_and_stored_without_it(
    state: KeyState, engine: Engine, tmp_path: Path
) -> None:
    """The whole store, SQLite's journal included, can be read without learning a secret."""
    key, secret = new_key("ci", routes=("a", "b"), requests_per_minute=3)
    state.create_key(key)
    assert state.find(key.digest) == key == state.get_key(key.id)
    assert state.keys() == {key.id: key}
    with engine.connect() as db:
        rows = [str(row) for table in metadata.sorted_tables for row in db.execute(select(table))]
    stored = "\n".join(rows).encode() + b"".join(f.read_bytes() for f in tmp_path.rglob("state.db*"))
    assert key.digest.encode() in stored
    assert secret.encode() not in stored
    assert secret.removeprefix("sk-sh-").encode() not in stored


def test_the_same_secret_twice_is_a_conflict(state: KeyState) -> None:
    """A digest means one key."""
    key, _ = new_key("ci")
    state.create_key(key)
    with pytest.raises(ConflictError):
        state.create_key(key.model_copy(update={"id": "other"}))


def test_unknown_keys_are_not_found(state: KeyState) -> None:
    """Every access by id says that there is no such key."""
    with pytest.raises(NotFoundError, match="nobody"):
        state.get_key("nobody")
    with pytest.raises(NotFoundError):
        state.change_key("nobody", disabled=True)
    with pytest.raises(NotFoundError):
        state.delete_key("nobody")
    assert state.find("0" * 64) is None


def test_a_bad_change_names_its_fields_and_changes_nothing(state: KeyState) -> None:
    """A change is checked as a whole, before anything is written."""
    key, _ = new_key("ci")
    state.create_key(key)
    with pytest.raises(ConfigError, match="tokens_per_minute"):
        state.change_key(key.id, disabled=True, tokens_per_minute=-1)
    assert state.get_key(key.id) == key


def test_fifty_changes_at_once_all_last(state: KeyState) -> None:
    """Concurrent changes of different fields never undo each other: each field ends at its last value."""
    key, _ = new_key("ci")
    state.create_key(key)

    def ten_times(field: str) -> None:
        for i in range(1, 11):
            state.change_key(key.id, **{field: f"n{i}" if field == "name" else 10**10 + i})

    fields = ["requests_per_minute", "tokens_per_minute", "expires_at", "created_at", "name"]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(ten_times, fields))
    after = state.get_key(key.id)
    assert [getattr(after, f) for f in fields] == [10**10 + 10] * 4 + ["n10"]


def test_keys_that_did_not_change_are_not_parsed_again(state: KeyState) -> None:
    """A router reads all keys many times a second: only what changed costs."""
    key, other = new_key("a")[0], new_key("b")[0]
    state.create_key(key)
    state.create_key(other)
    before = state.keys()
    state.change_key(other.id, disabled=True)
    after = state.keys()
    assert after[key.id] is before[key.id]
    assert after[other.id].disabled


def test_usage_is_absolute_and_never_falls(state: KeyState) -> None:
    """Writing again changes nothing, and an older write that arrives late undoes nothing."""
    row = MinuteUsage("k", MINUTE, 2, 30, 40)
    for rows in ([row], [row], [row._replace(requests=1, prompt_tokens=3)], []):
        state.put_usage("r1", rows)
    assert state.usage() == [
        KeyUsage(key_id="k", hour=HOUR, requests=2, prompt_tokens=30, completion_tokens=40)
    ]


def test_others_counts_are_those_of_recent_minutes_without_ones_own(state: KeyState) -> None:
    """A router adds what the others wrote to its own count, so its own rows must not be in it."""
    state.put_usage("me", [MinuteUsage("k", MINUTE, 100, 100, 100)])
    state.put_usage("r1", [MinuteUsage("k", MINUTE, 2, 3, 4), MinuteUsage("k", MINUTE - 1, 1, 0, 0)])
    state.put_usage("r2", [MinuteUsage("k", MINUTE, 5, 6, 7), MinuteUsage("k", MINUTE - 9, 1, 1, 1)])
    assert state.spent_by_others("me", MINUTE - 1) == {"k": {MINUTE: Spent(7, 20), MINUTE - 1: Spent(1, 0)}}


def test_usage_by_hour_is_the_same_before_and_after_folding(state: KeyState) -> None:
    """Old counts shrink to a row an hour and lose nothing, also when two routers fold at once."""
    for replica in ("r1", "r2"):
        rows = [MinuteUsage(k, MINUTE + m, 1, 2, 3) for k in ("a", "b") for m in range(0, 180, 10)]
        state.put_usage(replica, rows)
    before = state.usage()
    assert before[0] == KeyUsage(key_id="a", hour=HOUR, requests=12, prompt_tokens=24, completion_tokens=36)
    assert [(u.key_id, u.hour - HOUR) for u in before] == [(k, h) for h in range(3) for k in ("a", "b")]
    with ThreadPoolExecutor(2) as pool:
        gone = sum(pool.map(state.fold_usage, [HOUR + 2, HOUR + 2]))
    assert gone == 48
    assert state.usage() == before
    state.put_usage("late", [MinuteUsage("a", MINUTE, 1, 0, 0)])
    assert state.fold_usage(HOUR + 2) == 1
    assert state.usage("a", HOUR, HOUR + 1) == [before[0].model_copy(update={"requests": 13})]


def test_settings_are_written_by_compare_and_set(engine: Engine) -> None:
    """Of two writers with the same version one is told; nothing is overwritten unseen."""
    state = SettingsState(engine)
    assert state.get_settings("r") is None
    first = RouteSettings(route="r", version=1, parameters={"temperature": 0})
    state.put_settings(first)
    with pytest.raises(ConflictError, match="already has settings"):
        state.put_settings(first)
    second = first.model_copy(update={"version": 2, "limits": RouteLimits(max_in_flight=3)})
    state.put_settings(second)
    with pytest.raises(ConflictError, match="not at version 1"):
        state.put_settings(second)
    with pytest.raises(ConflictError):
        state.put_settings(RouteSettings(route="new", version=2))
    assert state.settings() == {"r": second} == {"r": state.get_settings("r")}
