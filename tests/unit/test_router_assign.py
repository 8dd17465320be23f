"""Assignment: sticky, monotone in the weight, independent between salts."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.traffic import Arm, Reason, Split, UnitKind, Upstream
from serve.router.assign import assign, fraction_of, unit_of

STABLE = Upstream(name="teacher", model="big", url="http://127.0.0.1:1")
CANARY = Upstream(name="student", model="small", url="http://127.0.0.1:2")


def split(weight: float, salt: str = "s", version: int = 3, canary: Upstream | None = CANARY) -> Split:
    return Split(route="support", version=version, salt=salt, stable=STABLE, canary=canary, weight=weight)


@pytest.mark.parametrize(
    ("salt", "unit", "fraction"),
    [
        ("s", "u", 0.49652160607454743),
        ("salt-1", "conversation-42", 0.3559310911138803),
        ("", "", 0.9996105273049686),
    ],
)
def test_known_vectors(salt: str, unit: str, fraction: float) -> None:
    """The fraction is a fixed function: another release, or another language, must place a unit alike."""
    assert fraction_of(salt, unit) == pytest.approx(fraction, abs=1e-15)
    by_hand = int.from_bytes(sha256(f"{salt}\x1f{unit}".encode()).digest()[:8], "big") / 2**64
    assert fraction_of(salt, unit) == by_hand


@given(st.text(), st.text(), st.floats(0, 1), st.floats(0, 1))
def test_raising_the_weight_never_moves_anybody_back(salt: str, unit: str, a: float, b: float) -> None:
    """A unit on the canary stays there at every higher weight of the same rollout."""
    low, high = sorted((a, b))
    at_low = assign(split(low, salt), UnitKind.HEADER, unit).arm
    at_high = assign(split(high, salt), UnitKind.HEADER, unit).arm
    assert not (at_low is Arm.CANARY and at_high is Arm.STABLE)


@given(st.text(max_size=20), st.text())
def test_a_fraction_is_below_one_and_the_extremes_hold(salt: str, unit: str) -> None:
    """Weight 1 takes everybody and weight 0 nobody, whatever the unit (lone surrogates included)."""
    assert 0.0 <= fraction_of(salt, unit) < 1.0
    assert assign(split(1.0, salt), UnitKind.HEADER, unit).arm is Arm.CANARY
    assert assign(split(0.0, salt), UnitKind.HEADER, unit).arm is Arm.STABLE


def test_shares_follow_the_weight_and_salts_are_independent() -> None:
    """The canary gets its share, and a new rollout draws its users independently of the last one."""
    units = [f"u{i}" for i in range(20_000)]
    first = {u for u in units if fraction_of("one", u) < 0.1}
    second = {u for u in units if fraction_of("two", u) < 0.1}
    assert len(first) == pytest.approx(2000, abs=170)  # four standard deviations
    assert len(first & second) == pytest.approx(200, abs=57)


def test_reasons_say_what_is_evidence() -> None:
    """Only a real draw is RANDOM; a wish of the client and the lack of a choice are not."""
    assert assign(split(0.5), UnitKind.USER, "u").reason is Reason.RANDOM
    assert assign(split(0.0), UnitKind.USER, "u").reason is Reason.ONLY_ARM
    assert assign(split(0.0, canary=None), UnitKind.USER, "u").reason is Reason.ONLY_ARM
    forced = assign(split(0.0), UnitKind.USER, "u", Arm.CANARY)
    assert (forced.arm, forced.reason, forced.split_version) == (Arm.CANARY, Reason.OVERRIDE, 3)


def test_unit_sources_in_order() -> None:
    """The best name of the conversation wins: header, user, metadata, first messages, request id."""
    body = {
        "user": "ann",
        "metadata": {"conversation_id": "c1"},
        "messages": [{"role": "user", "content": "hi"}],
    }
    assert unit_of("h", body, "r") == (UnitKind.HEADER, "h")
    assert unit_of(None, body, "r") == (UnitKind.USER, "ann")
    del body["user"]
    assert unit_of(None, body, "r") == (UnitKind.METADATA, "c1")
    del body["metadata"]
    assert unit_of(None, body, "r")[0] is UnitKind.MESSAGES
    del body["messages"]
    assert unit_of("", body, "r") == (UnitKind.REQUEST, "r")


def test_a_growing_chat_keeps_its_unit() -> None:
    """Every turn of a chat without an id lands on the same arm; another first question is another unit."""
    head = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    later = [*head, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}]
    other = [head[0], {"role": "user", "content": "bye"}]
    unit = unit_of(None, {"messages": head}, "1")
    assert unit_of(None, {"messages": later}, "2") == unit
    assert unit_of(None, {"messages": other}, "3") != unit


@pytest.mark.parametrize(
    "odd", [{"user": 3}, {"user": ""}, {"metadata": "x"}, {"messages": "x"}, {"messages": [1, None]}]
)
def test_wrong_types_are_not_ours_to_judge(odd: dict[str, object]) -> None:
    """A request of the wrong shape still gets an arm; its upstream explains what is wrong with it."""
    assert unit_of(None, odd, "r") == (UnitKind.REQUEST, "r")


def test_long_units_are_bounded() -> None:
    """A megabyte of `user` is hashed once and then as cheap as any other."""
    assert len(unit_of(None, {"user": "x" * 10**6}, "r")[1]) == 64
