"""The example of docs/datasets.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_guides_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """A reader can paste it: refusals go, addresses are redacted, the prompt is found, a card comes out."""
    guide = (Path(__file__).resolve().parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    exec(compile(example, "docs/datasets.md", "exec"), {})
    told = capsys.readouterr().out
    assert "'refusal': 8" in told
    assert "'redacted': 400" in told
    assert "# Dataset card" in told
    assert "| `login` |" in told
    assert "Taken out of the students' system message" in told
    assert "@example.com" not in told
