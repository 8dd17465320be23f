"""The digest of an artifact folder: one definition, used by everybody who names a checkpoint.

sha256 over the sorted (relative name, file content) pairs. Knows nothing about models or registries.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from contracts.errors import NotFoundError

_CHUNK_BYTES = 1 << 20


def digest_file(path: Path, length: int | None = None) -> str:
    """sha256 of a file, or of its first `length` bytes (a log segment that is still being written)."""
    digest = hashlib.sha256()
    left = length if length is not None else -1
    with path.open("rb") as source:
        while left != 0:
            chunk = source.read(_CHUNK_BYTES if left < 0 else min(left, _CHUNK_BYTES))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk) if left > 0 else 0
    return digest.hexdigest()


def digest_folder(folder: Path) -> str:
    """sha256 over the sorted (relative name, content) pairs of a folder; of one file when given a file.

    Hidden files and folders are left out: they are tools' leftovers, and no engine reads them.
    Raises: NotFoundError when there is nothing at the path.
    """
    if folder.is_file():
        return digest_file(folder)
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder at {folder}, so its digest cannot be taken. Check the path.")
    digest = hashlib.sha256()
    for file in files_of(folder):
        name = file.relative_to(folder).as_posix()
        # Lengths are part of the stream, so that no two folders share one concatenation.
        digest.update(f"{len(name)}:{name}:{file.stat().st_size}:".encode())
        digest.update(bytes.fromhex(digest_file(file)))
    return digest.hexdigest()


def files_of(folder: Path) -> list[Path]:
    """Every file of a folder that belongs to it, sorted by relative name, hidden ones left out."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(root) / n for n in names if not n.startswith(".")]
    return sorted(found, key=lambda f: f.relative_to(folder).as_posix())


def bytes_of(path: Path) -> int:
    """Size of a file, or the sum over a folder's files."""
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in files_of(path))
