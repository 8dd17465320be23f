"""The nouns refuse what is wrong and say which field."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from contracts import errors
from contracts.config import StrictConfig, canonical_json, load_config, write_atomic
from contracts.errors import ConfigError, StillhouseError
from contracts.gates import Gate, GateReport, Verdict, judge
from contracts.metrics import LATENCY_BUCKETS_S, ArmCounts, MetricSpec, pass_fail
from contracts.rollout import RolloutSpec, Step
from contracts.traffic import Outcome, Split, Upstream


class Inner(StrictConfig):
    """A section of Outer."""

    size: int = Field(ge=1)


class Outer(StrictConfig):
    """A configuration with a section."""

    name: str = "x"
    inner: Inner


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_unknown_key_is_named_with_the_known_ones(tmp_path: Path) -> None:
    """A misspelt key is never dropped in silence."""
    file = _write(tmp_path / "c.yaml", "nmae: a\ninner: {size: 1}\n")
    with pytest.raises(ConfigError, match=r"nmae: unknown key; known keys: inner, name"):
        load_config(file, Outer)


def test_wrong_value_is_named_by_its_dotted_path(tmp_path: Path) -> None:
    """The message leads to the line to change."""
    file = _write(tmp_path / "c.yaml", "inner: {size: 0}\n")
    with pytest.raises(
        ConfigError, match=r"inner\.size: Input should be greater than or equal to 1 \(got 0\)"
    ):
        load_config(file, Outer)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    """`--set inner.size=3` reaches the section."""
    file = _write(tmp_path / "c.yaml", "inner: {size: 1}\n")
    assert load_config(file, Outer, {"inner.size": 3}).inner.size == 3


def test_environment_is_expanded_and_a_missing_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """${NAME:-default} works; ${NAME} without a value is an error, not an empty string."""
    monkeypatch.delenv("STILLHOUSE_TEST_NAME", raising=False)
    file = _write(tmp_path / "c.yaml", 'name: "${STILLHOUSE_TEST_NAME:-käse}"\ninner: {size: 1}\n')
    assert load_config(file, Outer).name == "käse"
    with pytest.raises(ConfigError, match="STILLHOUSE_TEST_NAME"):
        load_config(_write(tmp_path / "d.yaml", 'name: "${STILLHOUSE_TEST_NAME}"'), Outer)


@pytest.mark.parametrize("text", ["", "- a list", "{", "a: b: c", "just words"])
def test_malformed_files_are_config_errors(tmp_path: Path, text: str) -> None:
    """Whatever is in the file, the user gets a sentence and no traceback."""
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(_write(tmp_path / "c.yaml", text), Outer)


def test_missing_file_is_a_config_error(tmp_path: Path) -> None:
    """A wrong path is said as such."""
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml", Outer)


def test_write_atomic_leaves_no_temporary_file(tmp_path: Path) -> None:
    """A reader sees the whole new text and nothing else appears in the folder."""
    target = tmp_path / "deep" / "a.json"
    write_atomic(target, "one")
    write_atomic(target, "two")
    assert target.read_text() == "two"
    assert [p.name for p in target.parent.iterdir()] == ["a.json"]


def test_canonical_json_does_not_depend_on_key_order() -> None:
    """Digests are taken of this form."""
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'
    assert canonical_json({"a": "é", "b": 1}) == canonical_json({"b": 1, "a": "é"})


def test_every_error_is_in_the_tree_and_in_its_drawing() -> None:
    """One tree: each exception derives from StillhouseError and is drawn at the top of the file."""
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert len(classes) >= 8
    for cls in classes:
        assert issubclass(cls, StillhouseError)
        assert cls.__name__ in (errors.__doc__ or "")


def test_gate_without_data_never_passes() -> None:
    """Missing, NaN and a zero reference are NO_DATA."""
    gate = Gate(metric="a", at_least=0.5)
    assert judge([gate], {}).verdict is Verdict.NO_DATA
    assert judge([gate], {"a": math.nan}).verdict is Verdict.NO_DATA
    relative = Gate(metric="a", relative_to="b", at_least=0.5)
    assert judge([relative], {"a": 1.0, "b": 0.0}).verdict is Verdict.NO_DATA
    assert GateReport().verdict is Verdict.NO_DATA


def test_gate_bounds_are_inclusive_and_relative() -> None:
    """0.98 of the teacher passes at_least 0.98; a hair below fails and the reason has the figures."""
    gate = Gate(metric="s", relative_to="t", at_least=0.98)
    assert judge([gate], {"s": 0.98, "t": 1.0}).verdict is Verdict.PASS
    report = judge([gate], {"s": 0.97, "t": 1.0})
    assert report.verdict is Verdict.FAIL
    assert report.results[0].reason == "s/t = 0.97 is below 0.98"
    assert judge([Gate(metric="s", at_most=1.0)], {"s": 1.5}).verdict is Verdict.FAIL


def test_worst_verdict_of_a_report_wins() -> None:
    """One failure among passes is a failure."""
    gates = [Gate(metric="a", at_least=0), Gate(metric="b", at_least=1)]
    assert judge(gates, {"a": 1.0, "b": 0.0}).verdict is Verdict.FAIL
    assert judge(gates, {"a": 1.0}).verdict is Verdict.NO_DATA


def test_upstream_has_exactly_one_target() -> None:
    """A Serve application or a URL, never both, never neither; /v1 is cut off."""
    assert Upstream(name="t", model="m", url="http://h:1/v1/").url == "http://h:1"
    for wrong in ({}, {"app": "a", "url": "http://h"}, {"url": "ftp://h"}):
        with pytest.raises(ValidationError):
            Upstream(name="t", model="m", **wrong)


def test_split_with_weight_needs_a_canary() -> None:
    """A weight without a canary would send traffic nowhere."""
    stable = Upstream(name="t", model="m", url="http://h")
    with pytest.raises(ValidationError, match="weight > 0 needs a canary"):
        Split(route="r", version=1, salt="s", stable=stable, weight=0.1)


def test_outcomes_that_count_are_the_arms_own() -> None:
    """A client that went away or sent nonsense says nothing about the arm."""
    assert {o for o in Outcome if o.counts} == {
        Outcome.OK,
        Outcome.UPSTREAM_ERROR,
        Outcome.TIMEOUT,
        Outcome.BROKEN_STREAM,
    }
    assert all(o.counts for o in Outcome if o.failed)


def test_rollout_spec_refuses_what_cannot_decide() -> None:
    """Falling weights, no metrics, doubled metrics and thresholds off the buckets are refused by name."""
    good = {
        "id": "r1",
        "route": "support",
        "model_ref": "m:1",
        "candidate": Upstream(name="c", model="m", app="c"),
        "steps": (Step(weight=0.1), Step(weight=0.5)),
        "metrics": (MetricSpec(kind="errors", margin=0.02),),
        "created_at": 1.0,
    }
    assert RolloutSpec(**good).metrics[0].harm_tolerance == 0.005
    for field, value, message in (
        ("steps", (Step(weight=0.5), Step(weight=0.1)), "strictly rising"),
        ("steps", (), "must not be empty"),
        ("metrics", (), "must not be empty"),
        ("metrics", good["metrics"] * 2, "need different names"),
    ):
        with pytest.raises(ValidationError, match=message):
            RolloutSpec(**{**good, field: value})
    with pytest.raises(ValidationError, match="bucket edges"):
        MetricSpec(kind="ttft", margin=0.1, thresholds_s=(0.123,))
    with pytest.raises(ValidationError, match="only for latency"):
        MetricSpec(kind="errors", margin=0.1, thresholds_s=(0.1,))


def test_counts_add_up_bucket_by_bucket() -> None:
    """Sums over replicas and windows are exact, also when one side has no histogram yet."""
    buckets = tuple(range(len(LATENCY_BUCKETS_S) + 1))
    one = ArmCounts(n=2, errors=1, scores={"grade": pass_fail(1, 1)}, ttft=buckets)
    total = one.plus(ArmCounts(n=3, ttft=buckets)).plus(ArmCounts())
    assert (total.n, total.errors, total.graded(), total.failed()) == (5, 1, 2, 1)
    assert total.ttft == tuple(2 * b for b in buckets)
    assert total.e2e == ()


def test_the_nouns_import_nothing_heavy() -> None:
    """contracts must load in any process: no torch, ray, vllm, transformers or mlflow behind it."""
    code = (
        "import sys, contracts.traffic, contracts.rollout, contracts.model, contracts.dataset\n"
        "print(sorted({m.split('.')[0] for m in sys.modules}"
        " & {'torch','ray','vllm','transformers','mlflow','sqlalchemy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
