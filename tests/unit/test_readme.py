"""The README's figures are those that committed benchmarks printed, and its commands exist."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.results import RESULTS, Bar, Result, at_least, at_most, hardware, hardware_slug

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("file", [readme.README, readme.CHINESE], ids=lambda file: file.name)
def test_readmes_hold_the_committed_results(file: Path) -> None:
    """`python -m benchmarks.readme` has been run after the last benchmark or demo."""
    assert readme.rendered(file) == file.read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    """What is between code fences, in order."""
    return re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)


def targets(text: str) -> list[str]:
    """Where links and pictures lead, in order, without those between the two languages."""
    return [one for one in re.findall(r"\]\(([^)]+)\)", text) if not one.startswith("README")]


def names(text: str) -> Counter[str]:
    """What is written as code in running text: commands, files, options."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return Counter(re.findall(r"`([^`\n]+)`", prose))


def figures(text: str) -> list[str]:
    """Numbers of the running text, sorted; words for small numbers are the translation's own."""
    prose = re.sub(r"```.*?```|`[^`\n]+`|\]\([^)]+\)", "", text, flags=re.DOTALL)
    return sorted(re.findall(r"\d+(?:\.\d+)?", prose))


def test_the_chinese_readme_says_the_same() -> None:
    """Commands, output, links, names in code and figures are the English README's, and so are its headings'
    number and order: a change of one is a change of both."""
    english, chinese = (one.read_text(encoding="utf-8") for one in (readme.README, readme.CHINESE))
    assert code_blocks(chinese) == code_blocks(english)
    assert targets(chinese) == targets(english)
    assert names(chinese) == names(english)
    assert figures(chinese) == figures(english)
    levels = [[len(one) for one in re.findall(r"^(#+) ", text, re.MULTILINE)] for text in (english, chinese)]
    assert levels[0] == levels[1]


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
