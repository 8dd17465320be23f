"""`stillhouse quantize`: candidates made, measured through vLLM and chosen, from the terminal.

Parses and prints; the work is in compare.py, imported only when it runs, so that --help is instant.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from distill_jobs.cli import as_interrupt, ending

if TYPE_CHECKING:
    from distill_jobs.quantizing.candidates import Choice, Measured
    from distill_jobs.quantizing.compare import Comparison
    from distill_jobs.quantizing.config import QuantizeConfig

_NONE_FITS = 3

EPILOG = """A candidate is ALGORITHM-SCHEME[-gN|-channel|-tensor][-as-FORMAT]:

\b
  rtn-w4a16-g128            round to nearest: what all else must beat
  awq-w4a16-g128            4-bit weights, scales searched on your traffic
  gptq-w4a16-g64            4-bit weights, errors made good column by column
  awq-w4a16-asym-as-awq     with zero points, in AutoAWQ's file format
  gptq-w4a16-as-gptq        in AutoGPTQ's file format
  smoothquant-w8a8-channel  8 bits, activations too: more requests a second
  smoothquant-w4a8-g32      4-bit weights, 8-bit activations
  gptq-mixed                a precision a layer, within --budget-bytes

--data is a folder that the collect stage wrote (WORKDIR/collect-KEY; it calibrates on the calibration split,
measures on the validation split), or a JSONL file of {"request": …, "answer": …} rows.

Every artifact is held against its own file and against bf16: one that is served otherwise than it was written
is refused. OUT gets report.json, front.png and a folder for each candidate; run the same command again to go
on after Ctrl-C.

Exit codes: 0 one was chosen, 1 an error, 3 none is good enough, 130 stopped. docs/guides/quantization.md says
which scheme when."""


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="bf16 checkpoint folder or Hugging Face id.")],
    out: Annotated[Path, typer.Option(help="Folder for artifacts, report and plot.")],
    data: Annotated[Path, typer.Option(help="Traffic to calibrate and measure on; see below.")],
    candidates: Annotated[
        str | None, typer.Option(help="Comma-separated; default: one of each kind that is served here.")
    ] = None,
    budget_bytes: Annotated[
        int | None, typer.Option(min=1, help="Largest size of the weights' files, embeddings included.")
    ] = None,
    max_loss: Annotated[
        float, typer.Option(min=0, help="Largest loss of perplexity against bf16 (0.02 is 2 %).")
    ] = 0.02,
    prefer: Annotated[
        Literal["bytes", "quality", "speed"], typer.Option(help="What the choice goes by, within the limits.")
    ] = "bytes",
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Requests to measure on.")] = 200,
    max_model_len: Annotated[
        int, typer.Option(min=16, help="Longest request with its answer, tokens.")
    ] = 1024,
    threads: Annotated[int, typer.Option(min=1, help="Threads of compression and engine.")] = 1,
) -> None:
    """Quantize MODEL in several ways, measure bytes, quality and speed of each as served, and choose one."""
    console = Console(stderr=True, highlight=False)
    signal.signal(signal.SIGTERM, as_interrupt)
    with ending(console):
        job = _job(model, out, data, candidates, budget_bytes, samples, rows, max_model_len, threads)
        choice = _run(console, job, prefer, max_loss, budget_bytes)
    if choice.picked is None:
        raise typer.Exit(_NONE_FITS)


def _job(
    model: str,
    out: Path,
    data: Path,
    candidates: str | None,
    budget_bytes: int | None,
    samples: int,
    rows: int,
    max_model_len: int,
    threads: int,
) -> Comparison:
    """Everything that may be wrong with the command line is said here, before any work."""
    from distill_jobs.config import EngineConfig
    from distill_jobs.engine import engine_name
    from distill_jobs.keys import model_folder
    from distill_jobs.quantizing.candidates import DEFAULT, parse_candidate
    from distill_jobs.quantizing.compare import Comparison, read_data
    from distill_jobs.quantizing.config import QuantizeConfig
    from distill_jobs.quantizing.traps import check_plain, check_served, check_shapes, largest_group

    folder = model_folder(model)
    check_plain(folder)
    base = QuantizeConfig(
        samples=samples, threads=threads, scheme="MIXED", budget_bytes=budget_bytes,
        group_size=largest_group(folder, QuantizeConfig().ignore),
    )  # fmt: skip
    names = DEFAULT if candidates is None else [n for n in candidates.split(",") if n.strip()]
    wanted: list[QuantizeConfig] = [parse_candidate(name, base) for name in names]
    for config in wanted:
        check_served(config, engine_name())
        check_shapes(folder, config)
    measured, calibration = read_data(data, folder, base, rows, max_model_len)
    engine = EngineConfig(max_model_len=max_model_len, threads=threads)
    return Comparison(folder, out, tuple(dict.fromkeys(wanted)), measured, calibration, engine)


def _run(
    console: Console,
    job: Comparison,
    prefer: Literal["bytes", "quality", "speed"],
    max_loss: float,
    budget_bytes: int | None,
) -> Choice:
    from contracts.config import write_atomic
    from distill_jobs.quantizing.candidates import choose, front
    from distill_jobs.quantizing.compare import compare
    from distill_jobs.quantizing.plots import draw_front
    from distill_jobs.stage import locked

    with locked(job.out):
        base, found = compare(job, lambda text: console.print(text, markup=False))
        choice = choose(found, prefer, max_loss, budget_bytes)
        kept = [one.name for one in front(found)]
        report = {
            "model": str(job.model),
            "rule": choice.rule,
            "chosen": None if choice.picked is None else choice.picked.artifact,
            "front": kept,
            "rows": [one.model_dump() for one in (base, *found)],
        }
        write_atomic(job.out / "report.json", json.dumps(report, indent=1) + "\n")
        draw_front(base, found, choice.picked, job.out / "front.png")
    _print(console, base, found, kept, choice, job.out)
    return choice


def _print(
    console: Console, base: Measured, found: list[Measured], kept: list[str], choice: Choice, out: Path
) -> None:
    table = Table("candidate", "MB", "perplexity", "loss", "KL to bf16", "tokens/s", "served/file", "")
    for one in (base, *found):
        note = "front" if one.name in kept else ""
        if choice.picked is not None and one.name == choice.picked.name:
            note = "chosen"
        if one.refused is not None:
            table.add_row(one.name, *["-"] * 6, "refused")
            continue
        gap = "" if one.served_gap is None else f"{one.served_gap:+.3%}"
        table.add_row(
            one.name, f"{(one.bytes or 0) / 1e6:,.2f}", f"{one.perplexity:.5g}", f"{one.loss:+.2%}",
            f"{one.kl:.2g}", f"{one.tokens_per_s:,.0f}", gap, note,
        )  # fmt: skip
    console.print(table)
    for one in found:
        if one.refused is not None:
            console.print(f"{one.name} was refused: {one.refused}", markup=False)
    console.print(f"The rule: {choice.rule}.", markup=False)
    if choice.picked is None:
        console.print("None qualifies: allow a larger --max-loss or --budget-bytes, or add candidates.")
    else:
        console.print(f"Chosen: {choice.picked.artifact}", markup=False)
    console.print(f"The report is {out / 'report.json'}, the plot {out / 'front.png'}", markup=False)
