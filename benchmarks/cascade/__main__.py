"""`make bench BENCH=cascade`: a student first, the teacher when it is unsure, at a calibrated threshold.

A student is distilled briefly, served beside its teacher by vLLM, and calibrated by `stillhouse cascade
calibrate` on requests that the teacher answered through the router. Other requests are then asked of the
teacher's route and of the cascade's: what the cascade keeps of the teacher's quality, and how often it needs
it. Knows nothing about how thresholds are found.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cascade import student
from benchmarks.cascade.ask import Reply, answers, first_text_ms
from benchmarks.cascade.stack import GRADER, SMART, STUDENT, TEACHER, Stack
from benchmarks.gateway.processes import ROOT, Failed
from benchmarks.recipes.data import FIRST_EVALUATION, requests
from benchmarks.results import RESULTS, Bar, at_least, at_most, hardware, hardware_slug, write
from contracts.errors import StillhouseError
from serve.cascade.calibrate import Calibration

ROWS, STEPS = 4000, 600
CALIBRATION, TEST, TIMED = 4000, 2000, 60
FIRST_CALIBRATION = 500_000
"""Other cases than the test's, of the same split: the promise is about requests like the logged ones. The
student has seen none of this split's names and ids, and is surer than right on those of its training."""
TARGET, CONFIDENCE = 0.995, 0.95
KEPT, CALLS = 0.995, 0.25


def main() -> int:
    """0 when both bars are met, 1 when one is missed, 2 when it could not be measured."""
    args = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up like Ctrl-C
    try:
        with ExitStack() as ends:
            return _run(args, ends)
    except (Failed, StillhouseError) as err:
        print(f"benchmarks.cascade: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; everything it started has been ended", file=sys.stderr)
        return 130


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cascade", description=__doc__)
    parser.add_argument(
        "--budget", type=float, default=1.0, help="scales rows, steps and requests; not 1: no result"
    )
    parser.add_argument("--steps", type=int, help="training steps of the student")
    parser.add_argument("--target", type=float, default=TARGET, help="share of the teacher's quality to keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench-cascade"), help="keeps rows and student"
    )
    return parser.parse_args()


def _run(args: argparse.Namespace, ends: ExitStack) -> int:
    rows, steps, calibration, test, timed = (
        max(16, round(args.budget * one)) for one in (ROWS, args.steps or STEPS, CALIBRATION, TEST, TIMED)
    )
    trained = student.make(args.folder, rows, steps, args.seed)
    folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="sh-bench-")))
    stack = Stack(folder, ROOT / "demo" / "models" / "teacher", trained.resolve(), ends)
    asyncio.run(answers(stack.url, TEACHER, requests("evaluation", FIRST_CALIBRATION, calibration)))
    found = _calibrate(stack, folder, args.target, calibration)
    stack.set_threshold(found.signal, found.best.threshold)
    cases = requests("evaluation", FIRST_EVALUATION, test)
    replies = {name: asyncio.run(answers(stack.url, name, cases)) for name in (TEACHER, STUDENT, SMART)}
    waits = {name: asyncio.run(first_text_ms(stack.url, name, cases[:timed])) for name in replies}
    return _report(args, found, replies, waits, folder)


def _calibrate(stack: Stack, folder: Path, target: float, rows: int) -> Calibration:
    """`stillhouse cascade calibrate`, as a person runs it. Raises: Failed with its words."""
    command = [
        sys.executable, "-m", "cli.main", "cascade", "calibrate", TEACHER, SMART, "--config", str(stack.file),
        "--target", str(target), "--confidence", str(CONFIDENCE), "--grader", GRADER, "--rows", str(rows),
        "--out", str(folder), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"calibration: {done.stderr.strip()[-1000:]}")
    return Calibration.model_validate_json(done.stdout)


def _report(
    args: argparse.Namespace,
    found: Calibration,
    replies: dict[str, list[Reply]],
    waits: dict[str, float],
    folder: Path,
) -> int:
    lines = [_row(name, replies[name], waits[name]) for name in replies]
    quality = {line["what"]: line["accuracy"] for line in lines}
    kept = quality[SMART] / quality[TEACHER]
    calls = next(line["teacher_calls"] for line in lines if line["what"] == SMART)
    for line in lines:
        calls_of, first_ms = 100 * line["teacher_calls"], line["first_text_ms"]
        print(
            f"{line['what']:8} accuracy {line['accuracy']:.4f}, teacher calls {calls_of:.1f} %, "
            f"first text after {first_ms:.1f} ms"
        )
    best = found.best
    print(
        f"{found.signal} >= {best.threshold:.6g}: on {found.tested} calibration requests "
        f"{100 * best.kept:.2f} % kept (at least {100 * (best.kept_low or 0):.2f} %) "
        f"at {100 * best.calls:.1f} % calls"
    )
    bars = [
        at_least("cascade: share of the teacher's quality kept", kept, KEPT),
        at_most("cascade: share of requests that the teacher answers", calls, CALLS),
    ]
    for bar in bars:
        print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4f} (bar {bar.bar})")
    if args.budget == 1.0:
        _write(bars, [*lines, *_frontier(found)], folder)
    return 0 if all(bar.ok for bar in bars) else 1


def _row(name: str, replies: list[Reply], first_ms: float) -> dict[str, Any]:
    count = len(replies)
    calls = sum(r.passed_on for r in replies) / count if name == SMART else float(name == TEACHER)
    return {
        "what": name,
        "requests": count,
        "accuracy": sum(r.right for r in replies) / count,
        "teacher_calls": calls,
        "first_text_ms": first_ms,
        "answer_tokens": sum(r.completion_tokens for r in replies) / count,
    }


def _frontier(found: Calibration) -> list[dict[str, Any]]:
    """Every calibrated threshold, for the plot to be drawn again."""
    return [
        {"what": f"frontier {frontier.signal}", **point.model_dump()}
        for frontier in found.frontiers
        for point in frontier.points
    ]


def _write(bars: list[Bar], rows: list[dict[str, Any]], folder: Path) -> None:
    picture = RESULTS / f"cascade.{hardware_slug(hardware())}.svg"
    shutil.copyfile(folder / f"{TEACHER}-{SMART}.svg", picture)
    print(f"written: {write('cascade', 'make bench BENCH=cascade', bars, rows)} and {picture.name}")


if __name__ == "__main__":
    sys.exit(main())
