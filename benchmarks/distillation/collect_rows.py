"""Rows a second, memory and exactness of collect, over a generated request log of any size.

The log is made of base requests, exact repeats (some asked by very many) and near-duplicates with one
character changed, so the number of samples that must be left is known without comparing anything. A small
log is compared with brute force over all pairs besides. Knows nothing about how collect works.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.results import Bar, at_most
from distill_jobs.collect import run as collect
from distill_jobs.collecting.rows import normalise, request_text, sha256_of
from distill_jobs.collecting.window import pin_window
from distill_jobs.config import CollectConfig
from distill_jobs.progress import Event, Progress

SEGMENT_ROWS = 150_000
"""About the 64 MB at which a router closes a segment."""
EXACT, POPULAR, NEAR = 0.18, 0.02, 0.10
"""Shares of rows that repeat an earlier request, that ask one of a hundred popular ones, and that differ
from an earlier one in one character."""
THRESHOLD = 0.8
_ORACLE_ROWS = 2000
_WORDS = 20_000
_WORDS_EACH = 13
_MEMORY_GB = 4.0
_POLL_S = 0.2

I64 = NDArray[np.int64]


def run(rows: int = 10_000_000, executor: str = "ray") -> tuple[list[dict[str, Any]], list[Bar]]:
    """Generate `rows` log rows, collect them (over Ray Data), and compare with what must come out."""
    with tempfile.TemporaryDirectory(prefix="collect-") as folder:
        unlike = _unlike_brute_force(Path(folder) / "oracle")
        work = Path(folder) / "scale"
        made = generate(work / "logs", rows)
        found = _collected(work, executor)
    result = {
        "what": "collect",
        "rows": rows,
        "log_gb": round(made["bytes"] / 1e9, 2),
        "generate_s": made["seconds"],
        **found,
        "expected": made["expected"],
    }
    wrong = sum(abs(found["counts"].get(n, 0) - made["expected"][n]) for n in made["expected"])
    scale = f"collect, {rows:,} log rows"
    bars = [
        at_most(f"{scale}: peak memory of all processes", found["peak_gb"], _MEMORY_GB, " GB"),
        at_most(f"{scale}: duplicates and samples not as generated", wrong, 0, " rows"),
        at_most(f"collect, {_ORACLE_ROWS:,} log rows: samples unlike brute force", unlike, 0),
    ]
    return [result], bars


# the log -------------------------------------------------------------------------------------------


def generate(folder: Path, rows: int) -> dict[str, Any]:
    """Write the log, a segment at a time on all cores; returns its bytes and what must be left of it."""
    started = time.monotonic()
    folder.mkdir(parents=True)
    base, variant = _plan(rows)
    tasks = [
        (folder, at, base[at : at + SEGMENT_ROWS], variant[at : at + SEGMENT_ROWS])
        for at in range(0, rows, SEGMENT_ROWS)
    ]
    with multiprocessing.get_context("spawn").Pool() as pool:
        size = sum(pool.imap_unordered(_write_segment, tasks))
    texts = len(np.unique(base * 4 + variant))
    bases = len(np.unique(base))
    expected = {"exact_duplicate": rows - texts, "near_duplicate": texts - bases, "samples": bases}
    return {"bytes": size, "seconds": round(time.monotonic() - started, 1), "expected": expected}


def _plan(rows: int) -> tuple[I64, I64]:
    """(base request, variant) of each row; variant 0 is the base itself."""
    rng = np.random.default_rng(7)
    kind = rng.choice(4, rows, p=[1 - EXACT - POPULAR - NEAR, EXACT, POPULAR, NEAR])
    kind[:100] = 0
    fresh = kind == 0
    known = np.cumsum(fresh)
    base = np.where(fresh, known - 1, (rng.random(rows) * known).astype(np.int64))
    base = np.where(kind == 2, rng.integers(0, 100, rows), base)
    return base, np.where(kind == 3, rng.integers(1, 4, rows), 0)


def _said(base: int, variant: int, spoken: list[str]) -> str:
    """The request of a base: half of them begin as one of forty templates does."""
    opener = f"please help me with case {base % 40}: " if base % 2 else ""
    if variant:
        spoken = [*spoken]
        at = 3 * variant
        spoken[at] = "#" + spoken[at][1:]
    return opener + " ".join(spoken)


def _vocabulary() -> list[str]:
    rng = np.random.default_rng(1)
    letters = np.array(list("aabcdeeefghiijklmnoopqrrssttuuvwyz"))
    lengths = rng.integers(3, 9, _WORDS)
    return ["".join(rng.choice(letters, n)) for n in lengths]


def _write_segment(task: tuple[Path, int, I64, I64]) -> int:
    folder, first, base, variant = task
    words = np.array(_vocabulary(), object)
    # A counter-based draw: the words of base b are the same wherever it is asked again.
    drawn = _mixed(base[:, None] * _WORDS_EACH + np.arange(_WORDS_EACH)) % _WORDS
    spoken = words[drawn].tolist()
    lines = [
        _line(first + n, _said(int(b), int(v), said), int(b))
        for n, (b, v, said) in enumerate(zip(base, variant, spoken, strict=True))
    ]
    data = "".join(lines).encode()
    (folder / f"requests-{first // SEGMENT_ROWS:05d}.jsonl").write_bytes(data)
    return len(data)


def _mixed(values: I64) -> I64:
    mixed = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return (mixed >> np.uint64(33)).astype(np.int64)


def _line(number: int, text: str, base: int) -> str:
    at = 1_760_000_000 + number * 0.01
    return (
        f'{{"request_id":"{number:x}","ts":{at:.2f},"route":"support","endpoint":"chat","arm":"stable",'
        '"served_arm":"stable","reason":"random","unit_kind":"request","unit_hash":"0","split_version":1,'
        '"upstream":"t","model":"t","stream":false,"status":200,"outcome":"ok","finish_reason":"stop",'
        '"e2e_s":0.1,"overhead_s":0,"request":{"messages":[{"role":"user","content":'
        f'"{text}"}}]}},"response_text":"topic {base % 97}"}}\n'
    )


# collecting ----------------------------------------------------------------------------------------


def _collected(work: Path, executor: str) -> dict[str, Any]:
    """Collect in a process of its own, so that its whole tree can be weighed."""
    command = [sys.executable, "-m", "benchmarks.distillation.collect_rows", "--collect", str(work)]
    command += ["--executor", executor]
    child = subprocess.Popen(command)
    seen, done = Seen(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(child.pid, seen, done), daemon=True)
    watcher.start()
    code = child.wait()
    done.set()
    watcher.join()
    if code:
        raise RuntimeError(f"collect ended with {code}")
    found: dict[str, Any] = json.loads((work / "found.json").read_text())
    return found | {
        "cpu_s": round(sum(seen.cpu_s.values()), 1),
        "peak_gb": round(seen.peak / 1e9, 2),
        "at_peak": seen.at_peak,
    }


@dataclass
class Seen:
    """What was seen of a process and all its descendants."""

    peak: int = 0
    """Largest sum of resident memory, bytes; shared pages count once a process, so it is an upper bound."""
    at_peak: list[tuple[str, float]] = field(default_factory=list)
    """(name, GB) of the processes then, largest first."""
    cpu_s: dict[int, float] = field(default_factory=dict)
    """Processor seconds by process: what the work costs on a machine that others use too."""


def _watch(pid: int, seen: Seen, done: threading.Event) -> None:
    root = psutil.Process(pid)
    while not done.wait(_POLL_S):
        held: list[tuple[str, int]] = []
        try:
            for process in [root, *root.children(recursive=True)]:
                times = process.cpu_times()
                seen.cpu_s[process.pid] = times.user + times.system
                held.append((process.name()[:24], process.memory_info().rss))
        except psutil.Error:
            continue
        total = sum(size for _, size in held)
        if total > seen.peak:
            seen.peak = total
            seen.at_peak = sorted(((n, round(s / 1e9, 2)) for n, s in held), key=lambda h: -h[1])


def _collect(work: Path, executor: Any) -> None:
    started, steps = time.monotonic(), _Steps()
    config = CollectConfig(log_dir=work / "logs", executor=executor, near_duplicates=THRESHOLD)
    window = pin_window(config.log_dir, work / "window.json")
    folder = work / "collect"
    folder.mkdir()
    result = collect(config, window, [], folder, Progress(work / "progress.json", steps), "local")
    seconds = time.monotonic() - started
    found = {
        "seconds": round(seconds, 1),
        "rows_per_s": round(result.counts["read"] / seconds, 1),
        "steps_s": steps.seconds(),
        "counts": result.counts,
        "out_gb": round(sum(o.bytes for o in result.outputs.values()) / 1e9, 2),
    }
    (work / "found.json").write_text(json.dumps(found))


class _Steps:
    """When each step of collect ended, as its progress tells."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._ended: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if event.done == event.total:
            self._ended[event.unit] = time.monotonic()
            print(f"collect: {event.note} after {time.monotonic() - self._started:.0f} s", flush=True)

    def seconds(self) -> dict[str, float]:
        """Seconds of each step."""
        before, made = self._started, {}
        for unit, ended in self._ended.items():
            made[unit], before = round(ended - before, 1), ended
        return made


# the oracle ----------------------------------------------------------------------------------------


def _unlike_brute_force(work: Path) -> int:
    """How many digests are in one and not the other: what collect leaves of a small log, and what comparing
    all pairs leaves.
    """
    generate(work / "logs", _ORACLE_ROWS)
    config = CollectConfig(log_dir=work / "logs", executor="local", near_duplicates=THRESHOLD)
    (work / "collect").mkdir()
    window = pin_window(config.log_dir, work / "window.json")
    result = collect(config, window, [], work / "collect", Progress(work / "progress.json"))
    left = {
        digest
        for output in result.outputs.values()
        for digest in pq.read_table(output.path, columns=["sample_digest"])["sample_digest"].to_pylist()
    }
    return len(left ^ _brute_force(work / "logs"))


def _brute_force(logs: Path) -> set[str]:
    """The first digest of each connected group of requests whose 5-grams have Jaccard ≥ THRESHOLD."""
    texts: dict[str, str] = {}
    for file in logs.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            messages = json.loads(line)["request"]["messages"]
            identity = [[m["role"], normalise(m["content"])] for m in messages]
            texts[sha256_of([identity, None])] = request_text(messages)
    digests = sorted(texts)
    grams = [{t[i : i + 5] for i in range(max(1, len(t) - 4))} for t in (texts[d] for d in digests)]
    group = list(range(len(digests)))
    for i, mine in enumerate(grams):
        for j in range(i):
            shared = len(mine & grams[j])
            if group[i] != group[j] and shared / (len(mine) + len(grams[j]) - shared) >= THRESHOLD:
                low, high = sorted((group[i], group[j]))
                group = [low if g == high else g for g in group]
    return {digests[g] for g in group}


def main() -> None:
    """Run alone: `python -m benchmarks.distillation.collect_rows --rows 1000000`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--executor", choices=("ray", "local"), default="ray")
    parser.add_argument("--collect", type=Path, help="what a run starts as a process of its own")
    told = parser.parse_args()
    if told.collect is not None:
        _collect(told.collect, told.executor)
        return
    rows, bars = run(told.rows, told.executor)
    print(json.dumps(rows, indent=1))
    for bar in bars:
        print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:g} ({bar.bar})")


if __name__ == "__main__":
    main()
