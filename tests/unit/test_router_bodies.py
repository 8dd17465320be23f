"""Integers of any size in requests: read, compared and written as the client wrote them."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.routes import Affinity
from contracts.traffic import UnitKind
from serve.router.assign import unit_of
from serve.router.bodies import dump, may_hold_long_integer, parse
from serve.router.shape import affinity_key

NUMBERS = (
    st.integers()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@given(JSON)
@settings(deadline=None)
def test_any_json_survives(value: Any) -> None:
    """What is written is what was read: no integer becomes a float, no text changes."""
    body = json.dumps(value, ensure_ascii=False).encode()
    assert repr(json.loads(dump(parse(body)))) == repr(value)


@pytest.mark.parametrize("number", [2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**300])
@pytest.mark.parametrize("pad", range(7))
def test_no_integer_is_overlooked(number: int, pad: int) -> None:
    """Wherever it stands; orjson alone would read the longest ones as floats."""
    body = b" " * pad + json.dumps({"a": [number, "x" * pad]}).encode()
    assert parse(body) == {"a": [number, "x" * pad]}
    assert type(parse(body)["a"][0]) is int
    assert str(number).encode() in dump(parse(body))


def test_only_bodies_with_long_runs_of_digits_are_read_twice() -> None:
    """Dates, prices, vectors and telephone numbers cost nothing more."""
    assert not may_hold_long_integer(orjson.dumps({"x": [0.123456789012345678, 123456789012345678] * 50}))
    assert not may_hold_long_integer(b"2026-11-26T11:00:00.123456789Z +49 (0) 30 1234567890")
    assert may_hold_long_integer(b"x1234567890123456789x")


def test_what_is_no_json_stays_refused() -> None:
    """The standard library is laxer than orjson; it is asked only once orjson agreed."""
    for wrong in (b'{"a": NaN, "b": 12345678901234567890}', b'["\\ud800", 12345678901234567890]', b"1" * 400):
        with pytest.raises(orjson.JSONDecodeError):
            parse(wrong)


def test_units_and_prefixes_take_such_numbers() -> None:
    """A conversation whose head holds one is still assigned by its head, and kept on its replica."""
    body = {"messages": [{"role": "user", "content": [{"n": 2**70}]}]}
    other = {"messages": [{"role": "user", "content": [{"n": 2**70 + 1}]}]}
    assert unit_of(None, body, "r")[0] is UnitKind.MESSAGES
    assert unit_of(None, body, "r") != unit_of(None, other, "r")
    assert affinity_key(Affinity.PREFIX, "u", body) != affinity_key(Affinity.PREFIX, "u", other)
