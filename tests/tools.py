"""Real tools that tests compare with, fetched once into a cache when the machine lacks them.

A Debian package is downloaded and unpacked, never installed, so no daemon starts.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("STILLHOUSE_TOOLS", Path.home() / ".cache" / "stillhouse" / "tools"))


def debian_binary(package: str, binary: str) -> Path:
    """A program: the one on PATH, else from its Debian package. Raises: RuntimeError saying what to do."""
    on_path = shutil.which(binary)
    if on_path:
        return Path(on_path)
    found = CACHE / package / "usr" / "bin" / binary
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{package}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not found.exists() and not _fetch(package):
            _apt("update", cwd=CACHE)
            if not _fetch(package):
                raise RuntimeError(
                    f"{binary} is needed: install it, or make 'apt-get download {package}' work."
                )
    return found


def _fetch(package: str) -> bool:
    """Download and unpack into the cache: the folder appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        folder = Path(place)
        if not _apt("download", package, cwd=folder):
            return False
        (archive,) = folder.glob(f"{package}_*.deb")
        unpacked = folder / "unpacked"
        done = subprocess.run(["dpkg", "-x", str(archive), str(unpacked)], capture_output=True, check=False)
        if done.returncode == 0:
            shutil.rmtree(CACHE / package, ignore_errors=True)
            unpacked.rename(CACHE / package)
        return done.returncode == 0


def _apt(*arguments: str, cwd: Path) -> bool:
    if shutil.which("apt-get") is None:
        return False
    done = subprocess.run(
        ["apt-get", "-q", *arguments], cwd=cwd, capture_output=True, timeout=300, check=False
    )
    return done.returncode == 0
