"""Pure graders: each kind's verdicts, what is refused in a configuration, and bounds on what users' rules
cost."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import ValidationError

from contracts.errors import ConfigError, DataError
from contracts.grading import GraderSet
from contracts.traffic import Upstream
from serve.grading.graders import as_score, pair_graders, paired, single_graders
from serve.grading.judge import evidence_name
from serve.grading.sampling import canary_first, sampled
from serve.router.config import RouterConfig

ASKED = {"messages": [{"role": "user", "content": "2+2?"}], "metadata": {"reference": " Four  apples\n"}}


def made(**grader: Any) -> GraderSet:
    return GraderSet.model_validate({"graders": {"g": grader}})


def score(text: str, request: dict[str, Any] | None = None, **grader: Any) -> float | None:
    (one,) = single_graders(made(**grader).graders)
    return one.score(request if request is not None else ASKED, text)


SCHEMA = {"type": "object", "required": ["tool"], "properties": {"tool": {"enum": ["a", "b"]}}}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"tool": "a"}', 1.0),
        (' {"tool": "b", "x": [1]}\n', 1.0),
        ('{"tool": "c"}', 0.0),
        ("{}", 0.0),
        ('{"tool": "a"} and more', 0.0),
        ("```json\n{}\n```", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_schema_passes_what_the_schema_accepts(text: str, verdict: float) -> None:
    """Not JSON, cut off, or nested beyond reading is a failed answer, not an error of the grader."""
    assert score(text, kind="json_schema", schema=SCHEMA) == verdict


def test_a_schema_that_is_none_is_refused_at_the_start() -> None:
    """The message names the field and what is wrong with it."""
    with pytest.raises(ConfigError, match=r"graders\.g\.schema: is not a JSON Schema: 'objekt'"):
        score("{}", kind="json_schema", schema={"type": "objekt"})


def test_a_schema_never_fetches_anything() -> None:
    """A reference outside the schema is an error of the grader; nothing is asked of the network."""
    with pytest.raises(Exception, match=r"127\.0\.0\.1:9"):
        score("{}", kind="json_schema", schema={"$ref": "http://127.0.0.1:9/s.json"})


def test_a_schema_survives_the_way_to_the_router() -> None:
    """Configurations travel as JSON to the routers' processes; a field called `schema` must arrive there."""
    config = RouterConfig.model_validate(
        {"state_url": "s", "log": {"dir": "d"}, "graders": {"g": {"kind": "json_schema", "schema": SCHEMA}}}
    )
    again = RouterConfig.model_validate_json(config.model_dump_json())
    assert again == config
    (one,) = single_graders(again.graders)
    assert one.score({}, '{"tool": "a"}') == 1.0


def test_regex_searches_and_abstains_on_long_texts() -> None:
    """The pattern decides whether it is anchored; a text over the bound gets no score at all."""
    assert score("say ok now", kind="regex", pattern="ok") == 1.0
    assert score("say ok now", kind="regex", pattern=r"\Aok\Z") == 0.0
    assert score("x" * 11, kind="regex", pattern="x", max_chars=10) is None
    with pytest.raises(ValidationError, match=r"is not a regular expression"):
        made(kind="regex", pattern="(")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(.*a){25}b"])
def test_a_catastrophic_pattern_is_stopped(pattern: str) -> None:
    """Exponential backtracking ends in an error that is counted, with the interpreter free meanwhile."""
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        score("a" * 5000 + "!", kind="regex", pattern=pattern)
    assert time.monotonic() - began < 30  # without the limit: longer than the universe is old


def test_exact_compares_with_the_requests_reference() -> None:
    """White space does not count unless it is told to; no reference, no score."""
    assert score("Four apples", kind="exact") == 1.0
    assert score("four apples", kind="exact") == 0.0
    assert score("FOUR apples", kind="exact", ignore_case=True) == 1.0
    assert score("Four apples", kind="exact", strip=False) == 0.0
    assert score("x", kind="exact", reference="other") is None
    assert score("x", {"metadata": "odd"}, kind="exact") is None
    assert score("x", {}, kind="exact") is None


def test_exact_can_compare_json() -> None:
    """Key order does not count; true is not 1; what is no JSON is wrong."""
    asked = {"metadata": {"reference": '{"a": 1, "b": [true]}'}}
    assert score('{"b":[true],"a":1}', asked, kind="exact", as_json=True) == 1.0
    assert score('{"b":[1],"a":1}', asked, kind="exact", as_json=True) == 0.0
    assert score("{", asked, kind="exact", as_json=True) == 0.0


@pytest.mark.parametrize(
    ("given", "found"), [(True, 1.0), (False, 0.0), (0.25, 0.25), (1, 1.0), (None, None)]
)
def test_functions_may_return_verdicts_scores_or_nothing(given: Any, found: float | None) -> None:
    """Bool, number in [0, 1] or None."""
    assert as_score(given) == found


@pytest.mark.parametrize("given", [float("nan"), 1.5, -0.1, 7, "yes", [1]])
def test_what_is_no_score_is_an_error_of_the_grader(given: Any) -> None:
    """A 7 out of 10 must not be counted as a 1."""
    with pytest.raises(DataError):
        as_score(given)


def test_texts_beyond_reason_are_not_graded() -> None:
    """A grader must not cost more than the answer did."""
    assert score("x" * 200_001, kind="function", function="tests.integration.graders:says_tick") is None


def test_pairs_of_scores_become_wins_ties_and_losses() -> None:
    """(canary - reference + 1) / 2, and nothing where one of them has no score."""
    assert [paired(1, 0), paired(0.5, 0.5), paired(0, 1), paired(0.25, 0.75)] == [1.0, 0.5, 0.0, 0.25]
    assert paired(None, 1) is None
    assert paired(1, None) is None


def test_every_grader_compares_pairs_unless_told_otherwise() -> None:
    """Unary ones by difference, functions on both as they say; `against: null` switches it off."""
    graders = GraderSet.model_validate(
        {
            "graders": {
                "shape": {"kind": "json_schema", "schema": SCHEMA},
                "words": {"kind": "regex", "pattern": "ok", "against": None},
                "longer": {
                    "kind": "function",
                    "function": "tests.integration.graders:longer_wins",
                    "pairwise": True,
                },
            }
        }
    ).graders
    found = {p.name: p for p in pair_graders(graders)}
    assert set(found) == {"shape", "longer"}
    assert found["shape"].prefer({}, '{"tool": "a"}', "no") == 1.0
    assert found["longer"].prefer({}, "a", "bb") == 0.0
    assert [g.name for g in single_graders(graders)] == ["shape", "words"]


@pytest.mark.parametrize(
    ("graders", "why"),
    [
        ({"feedback": {"kind": "regex", "pattern": "x"}}, "what users say"),
        ({"Bad Name": {"kind": "regex", "pattern": "x"}}, "lower-case"),
        ({"a" * 32: {"kind": "judge", "upstream": "u"}}, "at most 31"),
        ({"g": {"kind": "judge", "upstream": "u", "against": None}}, "needs 'against'"),
        ({"g": {"kind": "judge", "upstream": "u", "parameters": {"model": "m"}}}, "model: set by the router"),
        ({"g": {"kind": "oracle"}}, "oracle"),
        ({"g": {"kind": "exact", "sample": 0}}, "greater than 0"),
    ],
)
def test_odd_configurations_are_refused(graders: dict[str, Any], why: str) -> None:
    """With the field and the reason."""
    with pytest.raises(ValidationError, match=why):
        GraderSet.model_validate({"graders": graders})


def test_a_router_knows_what_its_graders_name() -> None:
    """A judge's upstream must be declared, and graders need the log whose threads they run in."""
    judge = {"kind": "judge", "upstream": "nobody"}
    with pytest.raises(ValidationError, match=r"graders\.g\.upstream: there is no upstream 'nobody'"):
        RouterConfig.model_validate({"state_url": "s", "log": {"dir": "d"}, "graders": {"g": judge}})
    with pytest.raises(ValidationError, match="give 'log' too"):
        RouterConfig.model_validate({"state_url": "s", "graders": {"g": {"kind": "exact"}}})


def test_samples_grow_and_orders_are_fair_coins() -> None:
    """A larger share only adds requests; half of the pairs show the canary first, the same half every
    time."""
    ids = [f"r{i}" for i in range(2000)]
    tenth, half = (made(kind="exact", sample=s).graders["g"] for s in (0.1, 0.5))
    small = {i for i in ids if sampled("g", tenth, i)}
    large = {i for i in ids if sampled("g", half, i)}
    assert small < large
    assert (len(small), len(large)) == (pytest.approx(200, abs=60), pytest.approx(1000, abs=110))
    first = [canary_first("j-1", i) for i in ids]
    assert first == [canary_first("j-1", i) for i in ids]
    assert sum(first) == pytest.approx(1000, abs=110)
    assert first != [canary_first("j-2", i) for i in ids]


def test_a_judges_name_changes_with_all_that_its_verdicts_hang_on() -> None:
    """Model, place, rubric, form and parameters make another judge, whose scores never mix; budgets do
    not."""
    up = Upstream(name="big", model="m", url="http://h:1")

    def name(upstream: Upstream = up, **fields: Any) -> str:
        judge = made(kind="judge", upstream="big", **fields).judges()["g"]
        return evidence_name("g", judge, upstream)

    others = {
        name(),
        name(up.model_copy(update={"model": "m2"})),
        name(up.model_copy(update={"url": "http://h:2"})),
        name(rubric="short"),
        name(pairwise=False),
        name(parameters={"temperature": 0, "max_tokens": 65}),
    }
    assert len(others) == 6
    assert name(per_hour=1, sample=0.5, min_agreement=0.9) == name()
    assert name().startswith("g-")
    assert len(name()) == len("g-") + 8
