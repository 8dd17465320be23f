"""The whole loop on one machine, as a user would run it: `make demo`.

Traffic to a teacher is logged, distilled into a quantized student and handed over by a rollout; then a broken
student is offered and thrown back. This file is the flow; it drives public commands and the public URL, and
knows nothing of how they work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from contracts.errors import StillhouseError
from demo import broken, load, summary
from demo.console import Console
from demo.stack import Stack
from demo.traffic import Traffic
from demo.world.cases import case

ROUTE = "support"
MODEL = "support-student"
LOAD_PROMPTS = 256
BURST = (3.0, 27.0)
"""Seconds on, seconds off of the traffic while the student is made."""


@dataclass(frozen=True)
class Size:
    """How much of everything: `full` is what `make demo` shows, `small` is what CI can afford."""

    logged: int
    """Requests to the teacher before distillation starts."""
    ramp_rate: float
    """Requests a second while rollouts run."""
    background_rate: float
    """Requests a second within a burst while the student is made."""
    load_turns: int
    load_seconds: float
    policy: str
    """Rollout policy of configs/demo.yaml."""
    overrides: tuple[str, ...] = ()
    """Overrides of configs/distill-support.yaml."""


#: What 2,500 rows can teach is less than the full size's gate asks for; the loop is the same.
SMALL_GATES = (
    "gates=[{metric: quantized.accuracy, relative_to: teacher.accuracy, at_least: 0.85},"
    " {metric: quantized.perplexity, relative_to: student.perplexity, at_most: 1.02}]"
)
SIZES = {
    "full": Size(7000, 30.0, 8.0, 3, 6.0, "demo"),
    "small": Size(
        2500, 30.0, 8.0, 1, 4.0, "small", (SMALL_GATES, "evaluate.samples=200", "evaluate.score_samples=100")
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when the student was promoted, the broken one rolled back and no request failed."""
    args = _arguments(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, _interrupt)
    console = Console()
    out = Path(args.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.monotonic()
    try:
        with Stack(out, console) as stack:
            facts = _loop(stack, SIZES[args.size], console)
    except StillhouseError as err:
        console.failed(str(err))
        return 1
    except KeyboardInterrupt:
        console.failed("interrupted; everything it started was stopped")
        return 130
    facts |= {"size": args.size, "seconds": round(time.monotonic() - started, 1)}
    (out / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
    _report(out)
    problems = summary.problems(facts)
    console.finished(facts, out, problems)
    return 1 if problems else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C and a polite kill both end the demo through its clean-up."""
    raise KeyboardInterrupt


def _report(out: Path) -> None:
    from demo import report  # matplotlib takes a second to import

    report.write(out)


def _loop(stack: Stack, size: Size, console: Console) -> dict[str, Any]:
    traffic = Traffic(stack.base_url, ROUTE).start()
    try:
        _talk_to_teacher(traffic, size, console)
        traffic.set_rate(size.background_rate, BURST)
        stack.distill(overrides=list(size.overrides))
        traffic.set_rate(size.ramp_rate)
        first = stack.rollout(ROUTE, f"{MODEL}@challenger", size.policy, traffic)
        traffic.set_rate(0)
        served = _served(stack, size, console)
        bad = broken.publish_broken(stack, MODEL, console)
        traffic.set_rate(size.ramp_rate)
        second = stack.rollout(ROUTE, bad, size.policy, traffic)
    finally:
        stats = traffic.stop()
    return summary.facts(stack, served, [first, second], stats)


def _talk_to_teacher(traffic: Traffic, size: Size, console: Console) -> None:
    """Let users talk to the teacher until enough of it is logged."""
    traffic.set_rate(None)
    with console.progress("users talk to the teacher", size.logged) as bar:
        while traffic.stats.requests < size.logged:
            time.sleep(0.25)
            bar.to(traffic.stats.requests, f"{traffic.stats.failed} failed")
            if traffic.stats.failed > 20:
                raise StillhouseError("the teacher does not answer: " + "; ".join(traffic.stats.errors[:2]))


def _served(stack: Stack, size: Size, console: Console) -> dict[str, load.Served]:
    """Tokens a second of teacher and student under the same load, users being quiet."""
    prompts = [case("evaluation", i).text for i in range(LOAD_PROMPTS)]
    with console.step("tokens/s of teacher and student under the same load") as step:
        with stack.bf16_student() as unquantized:
            targets = [*stack.load_targets(ROUTE), unquantized]
            served = load.measure(targets, prompts, size.load_turns, size.load_seconds)
        step.note(", ".join(f"{n} {s.tokens_per_s:,.0f}" for n, s in served.items()))
    return served


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="how much of everything")
    parser.add_argument("--out", default="runs/demo", help="folder that is emptied and written")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
