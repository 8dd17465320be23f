"""`stillhouse shrink`: a smaller checkpoint out of a larger one, from the terminal.

Parses and prints; a distillation does the same by itself where `train.shrink` is set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from contracts.errors import StillhouseError

EPILOG = """The result is where a distillation starts from: it must be healed before it is of use. Weights set
to zero (--sparsify) are stored and served dense: the student gets neither smaller nor faster by them."""


def shrink(
    base: Annotated[str, typer.Argument(help="Checkpoint folder or HF id: the teacher.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; a finished one stays.")],
    rows: Annotated[
        Path, typer.Option(help="Folder of training rows (the teach stage's train) to measure importance on.")
    ],
    layers: Annotated[int | None, typer.Option(help="Blocks that stay, by block influence.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Channels of the residual stream that stay.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Neurons of each MLP that stay.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads of each block that stay.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads, by mean pooling (GQA).")] = None,
    sparsify: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD", help="magnitude, wanda or sparsegpt; served dense, so nothing gets faster."
        ),
    ] = None,
    share: Annotated[float | None, typer.Option(help="Share of the weights that become zero.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, e.g. 2:4, in the share's place.")] = None,
    count: Annotated[int, typer.Option("--samples", help="Rows that are read.")] = 128,
    max_length: Annotated[int, typer.Option(help="Longest row, in tokens.")] = 1024,
) -> None:
    """Cut a checkpoint to a smaller student: depth and width by importance, fewer key heads, zeros."""
    console = Console(stderr=True, highlight=False)
    sizes = {"layers": layers, "hidden": hidden, "intermediate": intermediate, "heads": heads}
    given: dict[str, object] = {**sizes, "kv_heads": kv_heads, "rows": count}
    zeroing = {"method": sparsify, "share": share, "pattern": pattern}
    if any(value is not None for value in zeroing.values()):
        given["sparsify"] = {name: value for name, value in zeroing.items() if value is not None}
    try:
        report = _build(base, {k: v for k, v in given.items() if v is not None}, rows, max_length, out)
    except StillhouseError as err:
        console.print(f"[red]{type(err).__name__}[/red]: ", end="")
        console.print(str(err), markup=False)
        raise typer.Exit(1) from None
    console.print(f"{out}: {report['params']:,} of {report['params_before']:,} parameters.", markup=False)
    if "zeros" in report:
        console.print(f"{report['zeros']:.1%} of the blocks' weights are zero; {report['serving']}.")


def _build(base: str, given: dict[str, object], rows: Path, max_length: int, out: Path) -> dict[str, Any]:
    from contracts.config import parse_config
    from distill_jobs.keys import model_folder
    from distill_jobs.shrink.config import ShrinkConfig
    from distill_jobs.shrink.student import build_folder

    config = parse_config(given, ShrinkConfig, source="stillhouse shrink")
    return build_folder(str(model_folder(base)), config, rows, max_length, out)
