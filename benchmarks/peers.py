"""Environments of the projects we compare with: one each below `.cache/bench/`, made from a pinned file.

Where STILLHOUSE_PEERS=here, they are all in this interpreter's own: for machines that reach no package index.
Knows nothing about what runs in them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PEERS = ROOT / ".cache" / "bench"


class NotInstalled(RuntimeError):
    """An environment could not be made."""


def make(peer: str, pins: Path) -> None:
    """Make the environment of `peer` from `pins` when it is missing or out of date. Raises NotInstalled."""
    if _here():
        return
    folder = _PEERS / peer
    stamp = folder / "pins.txt"
    if stamp.exists() and stamp.read_text() == pins.read_text():
        return
    print(f"making {folder.relative_to(ROOT)} (downloads packages the first time) …", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # pip, because it reads its own settings of index and certificates; the pins are whole.
    command = [program(peer, "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--no-deps", "-r", str(pins)], capture_output=True, text=True)
    if done.returncode:
        raise NotInstalled(f"{peer} could not be installed:\n{done.stderr[-2000:]}")
    stamp.write_text(pins.read_text())


def program(peer: str, name: str) -> str:
    """The path of a program of the environment."""
    if _here():
        return str(Path(sys.executable).with_name(name))
    return str(_PEERS / peer / "bin" / name)


def _here() -> bool:
    return os.environ.get("STILLHOUSE_PEERS") == "here"
