"""The set-up program: what is locked, and where torch's CPU build is looked for."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def install() -> ModuleType:
    """requirements/install.py as a module."""
    spec = importlib.util.spec_from_file_location("stillhouse_install", ROOT / "requirements" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["main", "compress"])
def test_locks_pin_cpu_torch_and_none_of_the_cuda_builds(name: str) -> None:
    """torchvision, torchaudio and torchcodec beside a CPU torch break `import transformers`."""
    lock = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert re.search(r"^torch==2\.13\.0\+cpu$", lock, re.MULTILINE)
    assert not re.search(r"^(torchvision|torchaudio|torchcodec)\b", lock, re.MULTILINE)


@pytest.mark.parametrize("name", ["main", "compress"])
def test_locks_name_no_registry(name: str) -> None:
    """The same lock works behind any mirror."""
    assert "://" not in (ROOT / "requirements" / f"{name}.txt").read_text()


def test_every_direct_requirement_is_locked() -> None:
    """An .in file changed without `make lock` is caught here."""
    for name in ("main", "compress"):
        wanted = re.findall(
            r"^([A-Za-z0-9_-]+)", (ROOT / "requirements" / f"{name}.in").read_text(), re.MULTILINE
        )
        lock = (ROOT / "requirements" / f"{name}.txt").read_text().lower().replace("_", "-")
        for package in wanted:
            assert f"\n{package.lower().replace('_', '-')}==" in f"\n{lock}"


def test_torch_mirror_wins_and_pips_places_are_kept(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STILLHOUSE_TORCH_INDEX is an index for uv; PIP_FIND_LINKS still counts."""
    monkeypatch.setenv("STILLHOUSE_TORCH_INDEX", "http://mirror.test/cpu")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    assert install._torch_sources(ROOT / ".venv") == [
        "--find-links",
        "/wheels",
        "--index",
        "http://mirror.test/cpu",
        "--index-strategy",
        "unsafe-best-match",
    ]


def test_unknown_environment_is_refused_with_the_known_ones() -> None:
    """A typo costs a sentence, not an environment."""
    command = [sys.executable, str(ROOT / "requirements" / "install.py"), "mian"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there are main, compress" in done.stderr
