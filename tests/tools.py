"""Real tools that tests compare with, fetched once into a cache when the machine lacks them.

A Debian package is downloaded and unpacked, never installed, so no daemon starts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

CACHE = Path(os.environ.get("STILLHOUSE_TOOLS", Path.home() / ".cache" / "stillhouse" / "tools"))


def debian_binary(package: str, binary: str) -> Path:
    """A program: the one on PATH, else from its Debian package. Raises: RuntimeError saying what to do."""
    on_path = shutil.which(binary)
    if on_path:
        return Path(on_path)
    folder = CACHE / package
    found = folder / "usr" / "bin" / binary
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not _fetch(package, folder):
            _apt("update", cwd=folder)
            if not _fetch(package, folder):
                raise RuntimeError(
                    f"{binary} is needed: install it, or make 'apt-get download {package}' work."
                )
    return found


def _fetch(package: str, folder: Path) -> bool:
    if not _apt("download", package, cwd=folder):
        return False
    archive = max(folder.glob(f"{package}_*.deb"), key=lambda f: f.stat().st_mtime)
    done = subprocess.run(["dpkg", "-x", str(archive), str(folder)], capture_output=True, check=False)
    archive.unlink()
    return done.returncode == 0


def _apt(*arguments: str, cwd: Path) -> bool:
    if shutil.which("apt-get") is None:
        return False
    done = subprocess.run(
        ["apt-get", "-q", *arguments], cwd=cwd, capture_output=True, timeout=300, check=False
    )
    return done.returncode == 0
