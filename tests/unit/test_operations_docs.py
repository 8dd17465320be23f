"""The documents of operations name what there is: files, tests, commands, fields."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from cli.main import app
from contracts.logs import LogConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("SECURITY.md", "docs/threat-model.md", "docs/guides/operations.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page: str) -> None:
    """A mitigation whose file or test is gone is none."""
    text = (ROOT / page).read_text()
    last = ROOT
    for name in re.findall(r"`([\w./-]+(?:\.py|/))`", text):
        found = ROOT / name if "/" in name else last / name
        assert found.exists(), name
        last = found.parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).resolve().exists(), link


def test_every_command_that_is_named_exists() -> None:
    """Verb by verb; a renamed one changes its guide."""
    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`|'|\$ )stillhouse ([a-z][a-z-]+)", text, re.MULTILINE))
    assert {"backup", "restore", "upgrade", "doctor", "support-bundle", "keys"} <= named <= verbs


def test_the_logging_section_is_one() -> None:
    """The guide's YAML is parsed by the configuration's own model, and shows its defaults."""
    text = (ROOT / "docs/guides/operations.md").read_text()
    (section,) = re.findall(r"```yaml\n(logging:.*?)```", text, re.DOTALL)
    assert LogConfig(**yaml.safe_load(section)["logging"]) == LogConfig()
