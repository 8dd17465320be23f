"""docs/teachers.md: what it shows is a configuration that works."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from contracts.config import parse_config
from distill_jobs.augmenting.config import AugmentConfig
from distill_jobs.augmenting.prompts import NAMES, read_prompt
from distill_jobs.teaching.config import TeachConfig

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "teachers.md"


def test_every_example_of_the_guide_is_valid() -> None:
    """Fields are renamed in one place and shown in another."""
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    sections = [(name, data) for block in blocks for name, data in yaml.safe_load(block).items()]
    assert [name for name, _ in sections] == ["teach"] * 5 + ["augment"]
    for name, data in sections:
        parse_config(data, TeachConfig if name == "teach" else AugmentConfig)


def test_the_built_in_prompts_are_whole() -> None:
    """Each has all the placeholders that the code fills, and no other."""
    for name, fields in NAMES.items():
        assert set(read_prompt(name, None).get_identifiers()) == set(fields)
