"""Benchmarks of several parts: what was measured stays in the result until it is measured again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import parts, results
from benchmarks.results import Bar, Result, at_least, hardware_slug

PARTS = ("first", "second", "third")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setenv("STILLHOUSE_COMMIT", "before")


def _result() -> Result:
    return Result.model_validate_json(results.result_file("bench").read_text())


def test_a_part_takes_the_place_of_what_it_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and bars of other parts stay, each row with the commit that it was measured at, in the order of
    parts; what is lacking is said."""
    lacking = parts.record("bench", "second", ([{"name": "b", "n": 1}], [at_least("two", 1, 2)]), PARTS)
    assert lacking == ["first", "third"]
    monkeypatch.setenv("STILLHOUSE_COMMIT", "now")
    assert parts.record("bench", "first", ([{"name": "a"}], []), PARTS) == ["third"]
    assert _result().rows == [
        {"name": "a", "part": "first", "commit": "now"},
        {"name": "b", "n": 1, "part": "second", "commit": "before"},
    ]
    assert _result().bars == [Bar(what="two", value=1, bar="≥ 2", ok=False, part="second")]
    parts.record("bench", "second", ([{"name": "b", "n": 2}], [at_least("two", 2, 2)]), PARTS)
    assert [(row["part"], row["commit"]) for row in _result().rows] == [("first", "now"), ("second", "now")]
    assert _result().bars == [Bar(what="two", value=2, bar="≥ 2", ok=True, part="second")]


def test_a_part_that_is_no_more_leaves_the_result() -> None:
    """Nobody could measure it again."""
    parts.record("bench", "gone", ([{"name": "x"}], []), ("gone",))
    parts.record("bench", "first", ([{"name": "a"}], []), PARTS)
    assert [row["part"] for row in _result().rows] == ["first"]


def test_a_gpu_names_the_result() -> None:
    """What ran on it is not a figure of the processor beside it."""
    facts = {"cpu": "Intel(R) Xeon(R) Processor", "cores": 16, "memory_gib": 126, "gpus": ["NVIDIA H200"]}
    assert hardware_slug(facts) == "nvidia-h200-16c-126g"
