"""The one form of a benchmark's result: a JSON file with the hardware in its name, and its bars.

Knows nothing about what was measured.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pydantic import Field

from contracts.config import Record, write_atomic

RESULTS = Path(__file__).resolve().parent / "results"


class Bar(Record):
    """A promise: what was measured, the bar as people say it, and whether it was met."""

    what: str
    value: float
    bar: str
    ok: bool
    part: str = ""
    """Of a benchmark that has parts, the one that measured it."""


class Result(Record):
    """What a benchmark printed, with everything needed to repeat it."""

    name: str
    commit: str
    hardware: dict[str, Any]
    command: str
    bars: list[Bar] = Field(default_factory=list)
    rows: list[dict[str, Any]] = Field(default_factory=list)


def at_least(what: str, value: float, bound: float, unit: str = "") -> Bar:
    """A bar that wants a large value."""
    return Bar(what=what, value=value, bar=f"≥ {bound:g}{unit}", ok=value >= bound)


def at_most(what: str, value: float, bound: float, unit: str = "") -> Bar:
    """A bar that wants a small value."""
    return Bar(what=what, value=value, bar=f"≤ {bound:g}{unit}", ok=value <= bound)


@functools.cache
def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPUs of this machine."""
    cpu = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text()
        cpu = re.search(r"model name\s*:\s*(.+)", info)[1]  # type: ignore[index]
        flags = sorted({f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {f} " in info})
    except (OSError, TypeError):
        flags = []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30), "flags": flags}
    gpus = _gpus()
    return {**facts, "gpus": gpus} if gpus else facts


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs, as their driver gives them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return [] if done.returncode else [line.strip() for line in done.stdout.splitlines() if line.strip()]


def hardware_slug(facts: dict[str, Any]) -> str:
    """The hardware as a part of a file name, e.g. `intel-xeon-2c-24g`: its GPU's name where it has one."""
    named = facts["gpus"][0] if facts.get("gpus") else facts["cpu"]
    words = re.sub(r"\(r\)|\(tm\)|processor|cpu|@.*", " ", named.lower())
    name = "-".join(re.findall(r"[a-z0-9]+", words)[:3])
    return f"{name}-{facts['cores']}c-{facts['memory_gib']}g"


def head() -> str:
    """The commit that is measured; a tree that travelled without its history has it in STILLHOUSE_COMMIT."""
    if told := os.environ.get("STILLHOUSE_COMMIT"):
        return told
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def result_file(name: str) -> Path:
    """`results/<name>.<hardware>.json`, of this machine."""
    return RESULTS / f"{name}.{hardware_slug(hardware())}.json"


def write(name: str, command: str, bars: list[Bar], rows: list[dict[str, Any]]) -> Path:
    """Write the result of this machine and return its path."""
    result = Result(name=name, commit=head(), hardware=hardware(), command=command, bars=bars, rows=rows)
    path = result_file(name)
    write_atomic(path, json.dumps(result.model_dump(), indent=2, ensure_ascii=False) + "\n")
    return path
