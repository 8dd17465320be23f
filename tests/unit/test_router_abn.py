"""A/B/n tests in the router: who gets which student, and whose evidence a request is."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.traffic import Arm, Assignment, Reason, Slot, Split, UnitKind, Upstream
from serve.router.assign import assign, fraction_of
from serve.router.exchange import Exchange
from serve.router.ledger import EvidenceKey, Ledger
from serve.router.metrics import Metrics
from serve.router.pairs import pair_evidence
from serve.router.scores import Scores
from serve.router.table import Route, RouteTable
from serve.router.verdicts import Verdicts

STABLE = Upstream(name="teacher", model="big", url="http://127.0.0.1:1")


def student(name: str) -> Upstream:
    return Upstream(name=name, model=f"model-{name}", app=name)


def split(
    weight: float = 0.2, *others: tuple[str, float, float], salt: str = "t", **changes: object
) -> Split:
    """Three students of 20 % unless told otherwise; a slot is (name, start, weight), its rollout r-NAME."""
    slots = others or (("b", 0.2, 0.2), ("c", 0.4, 0.2))
    values: dict[str, object] = {
        "route": "support",
        "version": 7,
        "salt": salt,
        "stable": STABLE,
        "canary": student("a") if weight else None,
        "weight": weight,
        "rollout_id": "r-a" if weight else None,
        "others": tuple(
            Slot(upstream=student(n), start=s, weight=w, rollout_id=f"r-{n}") for n, s, w in slots
        ),
    }
    return Split(**{**values, **changes})  # type: ignore[arg-type]


def given_to(where: Split, unit: str) -> Assignment:
    return assign(where, UnitKind.HEADER, unit)


@given(st.text(max_size=20), st.text(min_size=1, max_size=40))
def test_a_unit_is_where_its_fraction_falls(salt: str, unit: str) -> None:
    """The intervals [0, .2), [.2, .4), [.4, .6) and the rest: one draw, cut into four, always random."""
    found = given_to(split(salt=salt), unit)
    at = fraction_of(salt, unit)
    expected = (
        (Arm.CANARY, 0) if at < 0.2
        else (Arm.CANARY, 1) if at < 0.4
        else (Arm.CANARY, 2) if 0.4 <= at < 0.4 + 0.2
        else (Arm.STABLE, 0)
    )  # fmt: skip
    assert (found.arm, found.slot) == expected
    assert found.reason is Reason.RANDOM


@given(st.text(min_size=1, max_size=40))
def test_a_student_that_leaves_moves_nobody_else(unit: str) -> None:
    """Its units go to the stable arm; those of the others and of stable stay where they were."""
    before, after = given_to(split(), unit), given_to(split(0.2, ("c", 0.4, 0.2)), unit)
    names = {(Arm.CANARY, 0): "a", (Arm.CANARY, 1): "b", (Arm.CANARY, 2): "c", (Arm.STABLE, 0): "stable"}
    was = names[before.arm, before.slot]
    now = {**names, (Arm.CANARY, 1): "c"}[after.arm, after.slot]
    assert now == ("stable" if was == "b" else was)


def test_shares_are_the_weights() -> None:
    """20 % each of 20 000 units, within four standard deviations of a fair draw."""
    where = split()
    drawn = Counter((a.arm, a.slot) for a in (given_to(where, f"u{i}") for i in range(20_000)))
    for slot in range(3):
        assert abs(drawn[Arm.CANARY, slot] - 4000) < 4 * (20_000 * 0.2 * 0.8) ** 0.5
    assert abs(drawn[Arm.STABLE, 0] - 8000) < 4 * (20_000 * 0.4 * 0.6) ** 0.5


def test_without_a_canary_the_slots_are_still_drawn() -> None:
    """ONLY_ARM is said only when nobody but stable can be drawn; an override always is one."""
    alone = split(0.0, ("c", 0.4, 0.2))
    reasons = {given_to(alone, f"u{i}").reason for i in range(50)}
    assert reasons == {Reason.RANDOM}
    assert {given_to(alone, f"u{i}").arm for i in range(50)} == {Arm.STABLE, Arm.CANARY}
    assert given_to(alone.model_copy(update={"others": ()}), "u").reason is Reason.ONLY_ARM
    forced = assign(split(), UnitKind.HEADER, "u", Arm.CANARY)
    assert (forced.slot, forced.reason) == (0, Reason.OVERRIDE)


def exchange(where: Split, arm: Arm, slot: int = 0, reason: Reason = Reason.RANDOM) -> Exchange:
    """A request that was drawn like this."""
    assignment = Assignment(arm, reason, UnitKind.HEADER, "h", 0.5, where.version, slot)
    return Exchange("q", "/v1/chat/completions", Route(where), assignment, {"messages": []}, 0.0, b"")


def test_a_students_request_counts_for_its_rollout_and_a_stable_one_for_all() -> None:
    """Every ledger entry stays one rollout's; what was asked for by name counts nowhere."""

    def key(rollout: str, arm: str) -> EvidenceKey:
        return EvidenceKey("support", rollout, arm, 7)

    where = split()
    assert exchange(where, Arm.CANARY).evidence() == (key("r-a", "canary"),)
    assert exchange(where, Arm.CANARY, 1).evidence() == (key("r-b", "canary"),)
    assert exchange(where, Arm.CANARY, 2).evidence() == (key("r-c", "canary"),)
    assert exchange(where, Arm.STABLE).evidence() == tuple(key(r, "stable") for r in ("r-a", "r-b", "r-c"))
    assert exchange(where, Arm.STABLE, reason=Reason.OVERRIDE).evidence() == ()
    assert exchange(split(0.0), Arm.STABLE).evidence() == (key("r-b", "stable"), key("r-c", "stable"))
    plain = split(0.2, others=())
    assert exchange(plain, Arm.STABLE).evidence() == (key("r-a", "stable"),)
    assert exchange(plain.model_copy(update={"rollout_id": None}), Arm.STABLE).evidence() == ()
    assert [k.arm for k in pair_evidence(exchange(where, Arm.STABLE))] == ["pair"]
    assert pair_evidence(exchange(split(0.0), Arm.STABLE)) == ()


def test_scores_of_a_stable_answer_count_for_every_student() -> None:
    """Quality is compared with the same stable answers for each; a student's is its own."""
    ledger, metrics = Ledger("r"), Metrics()
    verdicts = Verdicts(metrics, ledger)
    for arm, slot, score in ((Arm.STABLE, 0, 1.0), (Arm.CANARY, 2, 0.0)):
        verdicts.graded(exchange(split(), arm, slot), "exact", score)
    assert Scores(metrics, ledger, None) is not None
    found = {(e.rollout_id, e.arm): e.counts.scores["exact"] for e in ledger.cut()}
    assert set(found) == {("r-a", "stable"), ("r-b", "stable"), ("r-c", "stable"), ("r-c", "canary")}
    assert (found["r-b", "stable"][-1], found["r-c", "canary"][0]) == (1, 1)


@pytest.mark.parametrize(("slot", "name"), [(0, "a"), (1, "b"), (2, "c")])
def test_a_slot_has_its_own_upstream(slot: int, name: str) -> None:
    """It is asked, held until the request ends, named in the headers, and no fallback; its row is its own."""
    ex = exchange(split(), Arm.CANARY, slot)
    assert (ex.served.name, ex.build().rollout_id) == (name, f"r-{name}")
    lines = dict(ex.route.headers(ex.assignment, ex.served))
    assert (lines[b"x-stillhouse-arm"], lines[b"x-stillhouse-model"]) == (b"canary", f"model-{name}".encode())
    assert b"x-stillhouse-fallback" not in lines
    assert dict(ex.route.headers(ex.assignment, STABLE))[b"x-stillhouse-fallback"] == b"true"
    table = RouteTable(Metrics())
    held = table.hold(ex.route, ex.assignment)
    assert table.report("r").in_flight == {"teacher": 1, name: 1}
    table.release(held)
    assert table.report("r").in_flight == {}


def test_a_stable_row_names_the_first_rollout() -> None:
    """One row, one rollout: the canary's, or the first slot's where there is no canary."""
    assert exchange(split(), Arm.STABLE).build().rollout_id == "r-a"
    assert exchange(split(0.0), Arm.STABLE).build().rollout_id == "r-b"
