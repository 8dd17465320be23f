"""The bill of materials is of the lock files as they are."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sbom() -> ModuleType:
    """requirements/sbom.py, which is a program and no package."""
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "requirements" / "sbom.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pin_of_both_locks_is_in_the_committed_bill(sbom: ModuleType) -> None:
    """Changed a lock? `python requirements/sbom.py` writes it again; licences are as they were committed."""
    assert sbom.main(["--check"]) == 0
    there = json.loads((ROOT / "docs" / "sbom.cdx.json").read_text())
    listed = {(c["name"], c["version"]) for c in there["components"]}
    for name in ("main", "compress"):
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        pinned = [line.partition(";")[0].strip() for line in lines if re.match(r"[A-Za-z0-9].*==", line)]
        for line in pinned:
            package, _, version = line.partition("==")
            assert (re.sub(r"[-_.]+", "-", package.partition("[")[0]).lower(), version) in listed


def test_a_changed_lock_is_noticed(sbom: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version, a package more, one less."""
    lock = tmp_path / "main.txt"
    lock.write_text("Some_Package==1.0\n    # via x\nother[extra]==2.0+cpu ; python_version > '3'\n")
    monkeypatch.setattr(sbom, "LOCKS", {"main": lock})
    monkeypatch.setattr(sbom, "OUT", tmp_path / "sbom.json")
    assert sbom.main(["--check"]) == 1
    assert sbom.main([]) == 0
    assert sbom.main(["--check"]) == 0
    purls = [c["purl"] for c in json.loads((tmp_path / "sbom.json").read_text())["components"]]
    assert purls == ["pkg:pypi/other@2.0%2Bcpu", "pkg:pypi/some-package@1.0"]
    lock.write_text("Some_Package==1.1\n")
    assert sbom.main(["--check"]) == 1


def test_the_bill_is_cyclonedx(sbom: ModuleType) -> None:
    """The fields that the standard demands, and a unique reference for every component."""
    made = sbom.bill({})
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", made["serialNumber"])
    refs = [c["bom-ref"] for c in made["components"]]
    assert len(refs) == len(set(refs)) > 200
    assert all(c["type"] == "library" and c["name"] and c["version"] for c in made["components"])


def test_licences_are_those_of_the_version_that_is_installed(sbom: ModuleType) -> None:
    """Another version may have another licence: then none is stated."""
    from importlib.metadata import version

    assert "MIT" in (sbom.licence("pydantic", version("pydantic")) or "")
    assert sbom.licence("pydantic", "0.0.1") is None
    assert sbom.licence("no-such-package-here", "1") is None
