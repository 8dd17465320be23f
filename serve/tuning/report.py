"""What a search writes: the settings file, everything measured as JSON, and the plot; and its default target.

Knows nothing about how settings are searched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from contracts.config import write_atomic
from serve.engine.config import EngineOptions
from serve.engine.settings import write_settings
from serve.svg import new_figure, text_of
from serve.tuning.load import Turn
from serve.tuning.search import Ask, Run, Target, Trial
from serve.tuning.traffic import Traffic

_AT_ONCE = 8
"""Concurrency of the default target where the log shows none."""


def target_of(
    base: EngineOptions,
    traffic: Traffic,
    at: Path,
    of: Literal["e2e", "ttft", "tpot"],
    p95_ms: float | None,
    run: Run,
    ask: Ask,
    say: Callable[[str], None],
) -> Target:
    """The target that was given, or the default settings' own p95 at the log's concurrency; the latter is
    kept, so that a search that goes on has the same one."""
    if p95_ms is not None:
        return Target(of=of, p95_s=p95_ms / 1000)
    file = at / f"target-{of}.json"
    if not file.exists():
        at_once = max(1, round(traffic.concurrency or _AT_ONCE))
        say(f"target: the default settings' p95 of {of} with {at_once} requests at once …")
        with run(base, at / "default.log") as url:
            ask(url, traffic.work[:8], 4)
            work = (list(traffic.work) * (1 + 4 * at_once // len(traffic.work)))[: max(64, 4 * at_once)]
            seen = ask(url, work, at_once)
        write_atomic(file, Target(of=of, p95_s=seen.p95[of]).model_dump_json() + "\n")
    target = Target.model_validate_json(file.read_text(encoding="utf-8"))
    say(f"target: p95 of {of} at most {1000 * target.p95_s:.0f} ms")
    return target


def write(at: Path, target: Target, final: Trial, trials: Sequence[Trial]) -> list[Path]:
    """`settings.yaml`, `tune.json` and `tune.svg` in a folder; their paths."""
    files = [at / "settings.yaml", at / "tune.json", at / "tune.svg"]
    why = (
        f"stillhouse tune: {final.gain:.2f} x the default's req/s "
        f"({final.rate:.2f} against {final.base_rate:.2f})\n"
        f"while the p95 of {target.of} is at most {1000 * target.p95_s:.0f} ms."
    )
    files[0].unlink(missing_ok=True)
    write_settings(files[0], final.changes, why)
    told = {"target": target.model_dump(), "final": final.model_dump()}
    write_atomic(files[1], json.dumps({**told, "trials": [t.model_dump() for t in trials]}, indent=1) + "\n")
    write_atomic(files[2], plot(target, final))
    return files


def plot(target: Target, final: Trial) -> str:
    """p95 against requests a second, default and chosen, with the target, as SVG."""
    figure, axes = new_figure()
    for name, colour, turns in (("default", "#9ca3af", final.base), ("chosen", "#2563eb", final.turns)):
        if turns:
            axes.plot(*_curve(turns, target.of), "o", color=colour, label=name)
    axes.axhline(1000 * target.p95_s, color="#6b7280", linestyle="--", linewidth=1, label="target")
    axes.set_xlabel("requests a second")
    axes.set_ylabel(f"p95 of {target.of}, ms")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return text_of(figure)


def _curve(turns: Sequence[Turn], of: str) -> tuple[list[float], list[float]]:
    return [t.requests_per_s for t in turns], [1000 * t.p95[of] for t in turns]
