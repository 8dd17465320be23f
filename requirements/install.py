"""Make the two environments of Stillhouse: `.venv` (everything) and `.venv-compress` (quantization).

Usage: python3 requirements/install.py [main] [compress] [--relock]

Runs on the standard library alone. Bootstraps uv through pip, takes pip's own index settings over, and
installs the locked versions; run again, it costs a fraction of a second. The CPU build of torch comes
from wherever pip already finds it, else from the PyTorch CPU wheel index (STILLHOUSE_TORCH_INDEX names
a mirror of it). Knows nothing about what the packages are for.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "requirements"
UV = "uv==0.13.8"
VENVS = {"main": ".venv", "compress": ".venv-compress"}
TORCH = "torch==2.13.0+cpu"
FORBIDDEN = ("torchvision", "torchaudio", "torchcodec")


def main(argv: list[str]) -> int:
    """Make the environments named in `argv` (default: both); 0 when all are ready."""
    relock = "--relock" in argv
    names = [a for a in argv if not a.startswith("--")] or list(VENVS)
    unknown = [n for n in names if n not in VENVS]
    if unknown:
        print(f"setup: unknown environment {unknown[0]!r}; there are {', '.join(VENVS)}", file=sys.stderr)
        return 2
    if sys.version_info[:2] != (3, 11):
        print(
            f"setup: Python 3.11 is needed, this is {platform.python_version()}. "
            "Install it and run `make setup PYTHON=python3.11`.",
            file=sys.stderr,
        )
        return 2
    for name in names:
        if relock:
            _lock(name)
        elif not _ready(name):
            _make(name)
    return 0


def _make(name: str) -> None:
    started = time.monotonic()
    venv = ROOT / VENVS[name]
    print(
        f"setup: making {VENVS[name]} (the first time downloads packages; this takes minutes) …", flush=True
    )
    if not _python(venv).exists():
        _run([sys.executable, "-m", "venv", str(venv)])
    uv, env, sources = _uv(venv), _uv_env(), _torch_sources(venv)
    lock = [
        "--no-deps",
        "-r",
        str(HERE / f"{name}.txt"),
    ]  # the lock is whole; dependencies are not asked again
    # Bytecode now, once: where PYTHONDONTWRITEBYTECODE is set, vLLM would take 90 s instead of 15 s to start.
    options = ["--compile-bytecode", "--python", str(_python(venv))]
    _run([str(uv), "pip", "install", *options, *sources, *lock], env)
    if name == "main":
        _run([str(uv), "pip", "install", "--python", str(_python(venv)), "--no-deps", "-e", str(ROOT)], env)
    _verify(venv)
    (venv / ".stillhouse").write_text(_stamp(name))
    print(f"setup: {VENVS[name]} is ready ({time.monotonic() - started:.0f} s)", flush=True)


def _ready(name: str) -> bool:
    stamp = ROOT / VENVS[name] / ".stillhouse"
    return stamp.exists() and stamp.read_text() == _stamp(name)


def _stamp(name: str) -> str:
    digest = hashlib.sha256()
    for file in (HERE / f"{name}.txt", ROOT / "pyproject.toml", Path(__file__)):
        digest.update(file.read_bytes())
    return f"{digest.hexdigest()} {platform.python_version()} {ROOT}\n"


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _uv(venv: Path) -> Path:
    uv = venv / "bin" / "uv"
    if not uv.exists():
        _run([str(_python(venv)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV])
    return uv


def _uv_env() -> dict[str, str]:
    """uv reads no pip configuration: hand over the index, the certificate and nothing else."""
    env = dict(os.environ)
    index, extra, cert = (_pip_setting(k) for k in ("index-url", "extra-index-url", "cert"))
    if index:
        env.setdefault("UV_DEFAULT_INDEX", index[0])
    remote = [u for u in extra if u.startswith("http")]
    if remote:
        env.setdefault("UV_INDEX", " ".join(remote))
    if cert:
        env.setdefault("SSL_CERT_FILE", cert[0])
    env.setdefault("UV_HTTP_TIMEOUT", "180")
    env.setdefault("UV_LINK_MODE", "copy" if os.environ.get("PIP_NO_CACHE_DIR") else "hardlink")
    return env


def _pip_setting(key: str) -> list[str]:
    variable = os.environ.get("PIP_" + key.upper().replace("-", "_"))
    if variable:
        return variable.split()
    for section in ("install", "global"):
        done = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", f"{section}.{key}"], capture_output=True, text=True
        )
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()
    return []


def _torch_sources(venv: Path) -> list[str]:
    """Options that make uv find the CPU build of torch: pip's own places, a mirror, or PyTorch's index."""
    links = [o for place in _pip_setting("find-links") for o in ("--find-links", place)]
    mirror = os.environ.get("STILLHOUSE_TORCH_INDEX")
    if mirror:
        return [*links, "--index", mirror, "--index-strategy", "unsafe-best-match"]
    probe = [
        str(_uv(venv)),
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--python",
        str(_python(venv)),
        *links,
        TORCH,
    ]
    if subprocess.run(probe, env=_uv_env(), capture_output=True).returncode == 0:
        return links
    print("setup: torch (CPU build) comes from the PyTorch CPU wheel index", flush=True)
    return [*links, "--torch-backend", "cpu"]


def _verify(venv: Path) -> None:
    """Refuse an environment that would fail later with a stranger message."""
    code = (
        "import importlib.metadata as m, torch\n"
        f"bad=[p for p in {FORBIDDEN!r} if any(True for d in m.distributions() if d.metadata['Name']==p)]\n"
        "assert torch.version.cuda is None, f'torch {torch.__version__} is a CUDA build'\n"
        "assert not bad, f'CUDA builds in the CPU environment: {bad}'\n"
    )
    _run([str(_python(venv)), "-c", code])


def _lock(name: str) -> None:
    venv = ROOT / VENVS[name]
    if not _python(venv).exists():
        _run([sys.executable, "-m", "venv", str(venv)])
    out, source = HERE / f"{name}.txt", HERE / f"{name}.in"
    options = ["--override", str(HERE / "overrides.txt"), "--no-header", "--no-emit-index-url", "-q"]
    sources = _torch_sources(venv)
    _run(
        [str(_uv(venv)), "pip", "compile", str(source), *options, *sources, "-o", str(out)],
        _uv_env(),
        cwd=HERE,
    )


def _run(command: list[str], env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
    log = ROOT / ".setup.log"
    with log.open("ab") as out:
        done = subprocess.run(command, env=env, cwd=cwd, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = log.read_text(errors="replace").splitlines()[-25:]
        width = shutil.get_terminal_size().columns
        print("\n".join(line[: width * 3] for line in tail), file=sys.stderr)
        raise SystemExit(f"setup: failed: {' '.join(command[:6])} … (whole log: {log})")


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit("setup: interrupted; run it again to continue") from None
