"""The official Node clients: installed once from a committed lock file into a cache, run as a script."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "node"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "node-clients"


def node_modules() -> Path:
    """The folder of the installed clients. Raises: RuntimeError saying what is missing."""
    manifests = [HERE / "package.json", HERE / "package-lock.json"]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in manifests)).hexdigest()[:16]
    folder = CACHE / digest
    ready = folder / "ready"
    if not ready.exists():
        _need("npm")
        folder.mkdir(parents=True, exist_ok=True)
        for manifest in manifests:
            shutil.copy(manifest, folder)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed in {folder}:\n{done.stderr[-2000:]}")
        ready.touch()
    return folder / "node_modules"


def run_node(script: str, **settings: str) -> dict[str, Any]:
    """Run a script of tests/clients/node with these environment variables; what it printed, as JSON."""
    _need("node")
    env = {**os.environ, "NODE_PATH": str(node_modules()), **settings}
    done = subprocess.run(
        ["node", str(HERE / script)], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise AssertionError(f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout))


def _need(program: str) -> None:
    if shutil.which(program) is None:
        raise RuntimeError(
            f"{program} is needed to test the official Node clients: install Node.js 20 or newer, with npm."
        )
