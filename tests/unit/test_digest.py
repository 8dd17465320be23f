"""The digest of an artifact folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from contracts.errors import NotFoundError
from registry.digest import bytes_of, digest_file, digest_folder


def test_digest_is_of_names_and_contents_only(tmp_path: Path) -> None:
    """Where a folder lies, when it was written and what tools hid in it don't matter; names and bytes do."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "x").write_text("1")
        (folder / "y").write_text("22")
    (b / ".lock").write_text("hidden")
    (b / ".cache").mkdir()
    (b / ".cache" / "z").write_text("hidden")
    assert digest_folder(a) == digest_folder(b)
    assert bytes_of(a) == bytes_of(b) == 3
    (b / "y").rename(b / "z")
    assert digest_folder(a) != digest_folder(b)


def test_moving_bytes_between_files_changes_the_digest(tmp_path: Path) -> None:
    """Two folders never share a digest by having the same concatenation."""
    for name, first, second in (("a", "12", "3"), ("b", "1", "23")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(first)
        (tmp_path / name / "y").write_text(second)
    assert digest_folder(tmp_path / "a") != digest_folder(tmp_path / "b")


def test_a_prefix_has_its_own_digest(tmp_path: Path) -> None:
    """A growing log file keeps the digest of its pinned first bytes."""
    file = tmp_path / "log"
    file.write_text("12345")
    assert digest_file(file, 3) == hashlib.sha256(b"123").hexdigest()
    assert digest_file(file) == hashlib.sha256(b"12345").hexdigest()
    assert digest_file(file, 0) == hashlib.sha256(b"").hexdigest()


def test_a_missing_folder_is_not_an_empty_one(tmp_path: Path) -> None:
    """A wrong path is an error, not the digest of nothing."""
    with pytest.raises(NotFoundError, match="no folder"):
        digest_folder(tmp_path / "gone")
