"""`make bench BENCH=recipes`: every recipe of configs/recipes on the demo task, as a table with intervals.

All recipes get the same student, rows and optimizer steps; each is run with several seeds, two processes at a
time. Labels alone and rationales beside fewer labels, the student's own answers with and without replay are
trained longer, too, and so is, on more rows, the best recipe with a cached teacher, against the teacher. A
stopped run goes on in its folder. Knows nothing of how a recipe trains.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.recipes import data, table
from benchmarks.recipes.job import (
    Job,
    configure,
    end_with_parent,
    explains,
    result_file,
    run,
    teacher_result,
    trainer_of,
)
from benchmarks.recipes.table import EXPLAINED, LABEL_ONLY, ON_POLICY, REPLAY
from benchmarks.results import write
from contracts.errors import StillhouseError
from distill_jobs.training.recipes import recipe_names

ROWS, STEPS, HELD_OUT = 2400, 120, 400
BEST_ROWS, BEST_STEPS = 12_000, 3000
RATIONALE_SHARE = 0.8
OWN_SEEDS = 4
"""Of the student's own answers in the table: after so few steps seeds differ most there."""
LONG_ROWS, LONG_STEPS = 4000, 800
"""Labels alone and rationales, own answers with and without replay are compared where all have converged."""
ANSWERING = 0.03  # seconds a held-out request, of a student
LIVE, INSIDE, OWN, ANEW = 1.7, 2.5, 4.0, 6.0
"""Costs of a step against the plain one: a live teacher, its inside, the student's answers, the teacher's."""
DEAR = 1.0  # the recipe that is trained longer is the best of those whose step costs at most so much


def main() -> int:
    """0 when every bar is met, 1 when one is missed, 2 when it could not be measured."""
    args = _arguments()
    try:
        return _run(args)
    except StillhouseError as err:
        print(f"benchmarks.recipes: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the next start goes on from what is finished", file=sys.stderr)
        return 130


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("--only", help="recipes, separated by commas; writes no result")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1.0, help="scales steps, rows and held-out requests")
    parser.add_argument("--folder", type=Path, help="where it keeps what is finished")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


def _run(args: argparse.Namespace) -> int:
    names = args.only.split(",") if args.only else recipe_names()
    rows, steps, held_out = (max(32, round(args.budget * one)) for one in (ROWS, STEPS, HELD_OUT))
    best_rows, best_steps = round(args.budget * BEST_ROWS), round(args.budget * BEST_STEPS)
    folder = args.folder or Path("runs") / f"bench-recipes-{rows}x{steps}"
    fewer = round(RATIONALE_SHARE * rows)
    # This reads every recipe: a wrong one is seen before anything is trained.
    of = {name: fewer if explains(name) else rows for name in names}
    jobs = [Job(name, seed, steps, of[name], held_out) for seed in range(args.seeds) for name in names]
    long_rows, long_steps = (round(args.budget * one) for one in (LONG_ROWS, LONG_STEPS))
    of_long = dict.fromkeys((LABEL_ONLY, EXPLAINED, ON_POLICY, REPLAY), long_rows)
    of_long[EXPLAINED] = round(RATIONALE_SHARE * long_rows)
    data.make(folder, max(best_rows, rows), held_out, [fewer, of_long[EXPLAINED]])
    longer_seeds = [] if args.only else list(range(args.seeds))
    if not args.only:
        more = range(args.seeds, max(args.seeds, OWN_SEEDS))
        jobs += [Job(name, seed, steps, of[name], held_out) for seed in more for name in (ON_POLICY, REPLAY)]
    long = [Job(name, seed, long_steps, n, held_out) for seed in longer_seeds for name, n in of_long.items()]
    print(_estimate([*jobs, *long], folder, args.processes, best_steps * len(longer_seeds)), flush=True)
    teacher = teacher_result(folder, held_out)
    results = _all([*jobs, *long], folder, args.processes)
    lines = table.lines(results[: len(jobs)], teacher)
    print(table.shown(lines, teacher))
    if args.only:
        return 0
    affordable = next(one["recipe"] for one in lines if _cost(Job(one["recipe"], 0, 1, 1, 1)) <= DEAR)
    best = [Job(affordable, seed, best_steps, best_rows, held_out) for seed in longer_seeds]
    longer = [
        *table.lines(_all(best, folder, args.processes), teacher),
        *table.lines(results[len(jobs) :], teacher),
    ]
    bars = table.bars(longer[0], {line["recipe"]: line for line in longer[1:]})
    for line in longer:
        line["recipe"] += ", trained longer"
    print(table.shown(longer, teacher))
    for bar in bars:
        print(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.value:.4g} (bar {bar.bar})")
    if args.budget == 1.0:
        print(f"written: {write('recipes', 'make bench BENCH=recipes', bars, [*longer, *lines])}")
    return 0 if all(bar.ok for bar in bars) else 1


def _estimate(jobs: list[Job], folder: Path, processes: int, best_steps: int) -> str:
    """How long the unfinished jobs take, from some steps of the plain recipe timed now."""
    left = [job for job in jobs if not result_file(job, folder).exists()]
    if not left:
        return "all recipes are finished; reading their results"
    probe = trainer_of(Job("forward_kl", 0, 8, left[0].rows, 0), folder)
    seconds = [metrics["seconds"] for metrics in probe.run()]
    step = (seconds[-1] - seconds[2]) / (len(seconds) - 3)
    total = sum(step * job.steps * _cost(job) + ANSWERING * job.held_out + 8 for job in left)
    minutes = (total + step * best_steps) / processes / 60
    return (
        f"{len(left)} of {len(jobs)} runs are left, {processes} at a time: about"
        f" {minutes:.0f} minutes on this machine ({step:.2f} s a plain step)"
    )


def _cost(job: Job) -> float:
    """A recipe's step against the plain one."""
    config = configure(job)
    cost = 1.0 if config.teacher is None else INSIDE if config.terms.intermediate else LIVE
    if config.teacher is not None and len(config.teacher.models) > 1:
        cost += (LIVE - 1) * (len(config.teacher.models) - 1)
    fresh = 1 - config.prefix.replay
    cost += OWN * fresh * _mean(config.prefix.student) + ANEW * _mean(config.prefix.teacher)
    return cost * config.batch_rows / 32


def _mean(points: Any) -> float:
    from distill_jobs.training.method_config import share_at

    return sum(share_at(points, at / 20) for at in range(21)) / 21


def _all(jobs: list[Job], folder: Path, processes: int) -> list[dict[str, Any]]:
    """Results of all jobs, from their files or run now, in the order of the jobs."""
    found: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    bar = tqdm(total=len(jobs), desc="recipes", unit="run", mininterval=1)
    with ProcessPoolExecutor(processes, context, end_with_parent) as pool:
        futures = {pool.submit(run, job, folder): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                found[job.name] = result = future.result()
                accuracy = sum(result["right"]) / len(result["right"])
                bar.update(1)
                bar.write(
                    f"{time.monotonic() - started:6.0f} s  {job.name}: {result['seconds']:.0f} s of training,"
                    f" accuracy {accuracy:.3f}, KL {result['kl']:.4f},"
                    f" {result['generation_share']:.0%} of the time generating"
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    bar.close()
    return [found[job.name] for job in jobs]


if __name__ == "__main__":
    sys.exit(main())
