"""The README's figures are those that committed benchmarks printed, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import readme
from benchmarks.results import RESULTS, Bar, Result, at_least, at_most, hardware, hardware_slug

ROOT = Path(__file__).resolve().parents[2]


def test_readme_holds_the_committed_results() -> None:
    """`python -m benchmarks.readme` has been run after the last benchmark."""
    assert readme.rendered() == (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_committed_result_parses_and_names_its_hardware() -> None:
    """A result without its machine and command is worth nothing."""
    files = list(RESULTS.glob("*.json"))
    assert files
    for file in files:
        result = Result.model_validate_json(file.read_text())
        assert file.name == f"{result.name}.{hardware_slug(result.hardware)}.json"
        assert result.command
        assert result.bars


def test_make_verbs_of_the_readme_exist() -> None:
    """Every `make verb` that the README prints is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z0-9]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named
    assert named <= targets


def test_bars_compare_inclusively() -> None:
    """A value on the bar meets it."""
    assert at_least("a", 3.0, 3).ok
    assert not at_least("a", 2.99, 3).ok
    assert at_most("a", 1.02, 1.02) == Bar(what="a", value=1.02, bar="≤ 1.02", ok=True)
    assert not at_most("a", 1.03, 1.02).ok


def test_hardware_slug_is_a_file_name() -> None:
    """Letters, digits and dashes only, with cores and memory."""
    assert re.fullmatch(r"[a-z0-9-]+-\d+c-\d+g", hardware_slug(hardware()))
    facts = {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "memory_gib": 24}
    assert hardware_slug(facts) == "intel-xeon-2c-24g"
