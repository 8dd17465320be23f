"""The demo's world: answers are valid and checkable, requests are the same everywhere, and splits stay
apart."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from datasketch import MinHash, MinHashLSH
from jsonschema import Draft202012Validator

from demo.world import SPLITS, TOOLS, canonical, case, exact_match, find, grade, schema_ok
from demo.world.splits import owner

ROWS = 1500


def _words(text: str) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def _chars(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def _jaccard(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)


def _minhash(shingles: set[str]) -> MinHash:
    sketch = MinHash(num_perm=64, seed=1)
    sketch.update_batch([one.encode() for one in shingles])
    return sketch


def test_every_answer_is_valid_for_the_published_schemas() -> None:
    """What the grader calls right is what a JSON Schema validator accepts, for every split."""
    validators = {name: Draft202012Validator(schema) for name, schema in TOOLS.items()}
    for split in SPLITS:
        for index in range(300):
            one = case(split, index)
            assert schema_ok(canonical(one.answer)), one
            for call in one.answer:
                validators[call["tool"]].validate(call)
            assert exact_match(canonical(one.answer), one.answer)


def test_the_traffic_is_as_varied_as_announced() -> None:
    """All tools, two-call requests, requests without a tool and Chinese ones occur, near the announced
    shares."""
    cases = [case("live", index) for index in range(3000)]
    calls = Counter(call["tool"] for one in cases for call in one.answer)
    assert set(calls) == set(TOOLS)
    assert min(calls.values()) > 100
    sizes = Counter(len(one.answer) for one in cases)
    assert sizes[0] / 3000 == pytest.approx(0.08, abs=0.02)
    assert sizes[2] / 3000 == pytest.approx(0.30, abs=0.03)
    assert sum(one.language == "zh" for one in cases) / 3000 == pytest.approx(0.2, abs=0.03)


def test_a_case_is_the_same_in_any_order_and_differs_by_seed() -> None:
    """Random access: reading case 7 first, last or twice gives case 7."""
    later = [case("live", index) for index in (9, 7)][1]
    assert later == case("live", 7) == find("live:7")
    assert later.id == "live:7"
    assert case("live", 7, seed=1).text != later.text
    with pytest.raises(ValueError, match="unknown split"):
        case("train", 0)


def test_identifiers_belong_to_one_split() -> None:
    """An order id or email seen in one split cannot occur in another, by its hash."""
    for split in SPLITS:
        for index in range(200):
            for call in case(split, index).answer:
                for name in ("order_id", "email", "zip", "card", "serial", "code"):
                    if name in call:
                        assert owner(call[name]) == split


@pytest.mark.parametrize("shingle", [_words, _chars], ids=["3 words", "5 characters"])
def test_no_two_splits_share_a_near_duplicate(shingle) -> None:  # type: ignore[no-untyped-def]
    """No request of one split has Jaccard similarity >= 0.7 with a request of another."""
    index, texts = MinHashLSH(threshold=0.6, num_perm=64), {}
    for split in SPLITS:
        for number in range(ROWS):
            one = case(split, number)
            shingles = shingle(one.text)
            for other in index.query(_minhash(shingles)):
                if not other.startswith(split):
                    assert _jaccard(shingles, texts[other]) < 0.7, (one.text, other)
            texts[one.id] = shingles
        for number in range(ROWS):
            index.insert(f"{split}:{number}", _minhash(texts[f"{split}:{number}"]))


def test_live_traffic_survives_near_deduplication() -> None:
    """At Jaccard 0.8 fewer than 3 % of live requests repeat an earlier one."""
    index, kept = MinHashLSH(threshold=0.8, num_perm=64), {}
    repeated = 0
    for number in range(ROWS):
        shingles = _words(case("live", number).text)
        sketch = _minhash(shingles)
        if any(_jaccard(shingles, kept[other]) >= 0.8 for other in index.query(sketch)):
            repeated += 1
            continue
        kept[str(number)] = shingles
        index.insert(str(number), sketch)
    assert repeated / ROWS < 0.03


def _request(case_id: str, text: str) -> dict[str, object]:
    return {
        "model": "support",
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": text}],
        "metadata": {"case": case_id},
    }


def test_the_grader_judges_the_case_that_was_asked() -> None:
    """Right calls in any JSON spelling pass; wrong calls, prose and half an answer fail."""
    one = next(case("live", i) for i in range(100) if len(case("live", i).answer) == 2)
    request = _request(one.id, one.text)
    assert grade(request, canonical(one.answer)) is True
    assert grade(request, json.dumps(one.answer, indent=2)) is True
    assert grade(request, canonical(one.answer[::-1])) is False
    assert grade(request, canonical(one.answer[:1])) is False
    assert grade(request, "Sure, done.") is False
    assert grade(request, canonical(one.answer)[:-1]) is False


def test_what_is_not_ours_is_not_graded() -> None:
    """No case id, an unknown one, or another text than the case's gives None: neither right nor wrong."""
    one = case("live", 3)
    good = canonical(one.answer)
    assert grade({"messages": [{"role": "user", "content": one.text}]}, good) is None
    assert grade(_request("elsewhere:3", one.text), good) is None
    assert grade(_request("live:x", one.text), good) is None
    assert grade(_request("live:3", one.text + " "), good) is None
    assert grade({"metadata": {"case": "live:3"}, "messages": []}, good) is None


@pytest.mark.parametrize(
    "text",
    [
        '[{"tool":"launch_rocket"}]',
        '[{"tool":"cancel_order"}]',
        '[{"tool":"cancel_order","order_id":"A-1"}]',
        "{}",
        "null",
        '[{"tool":"cancel_order","order_id":"A-12345","why":"x"}]',
        '[{"tool":"change_quantity","order_id":"A-12345","quantity":true}]',
        '[{"tool":"set_notifications","channel":"sms","enabled":1}]',
        '[{"tool":"get_price","product":"yacht"}]',
        '[{"tool":"book_callback","date":"02-30","hour":10}]',
        '[["tool"]]',
        '[{"tool":["x"]}]',
    ],
)
def test_calls_outside_the_schema_are_refused(text: str) -> None:
    """Unknown tools, missing or extra arguments, wrong types and values out of range are no valid answers."""
    assert schema_ok(text) is False


def test_true_is_not_one() -> None:
    """Python's 1 == True must not make a wrong JSON type count as right."""
    answer = [{"tool": "set_notifications", "channel": "sms", "enabled": True}]
    assert exact_match('[{"tool":"set_notifications","channel":"sms","enabled":1}]', answer) is False
