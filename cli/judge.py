"""`stillhouse judge …`: language models that grade, held against people's judgements.

Asks the judge with the very words and client that the routers use. Parses and prints; the arithmetic is in
serve.grading.agreement. Knows nothing about rollouts.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cli.options import Config, Json
from contracts.errors import ConfigError, DataError, EngineError, NotFoundError

if TYPE_CHECKING:
    from contracts.grading import JudgeCheck, JudgeGrader
    from serve.config import ServeConfig
    from serve.grading.agreement import Anchor
    from serve.router.judge_client import JudgeClient

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Judges and their checks.",
)
_AT_ONCE = 4


@app.callback()
def _judge() -> None:
    """Language models that grade answers."""


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A grader of kind 'judge'.")],
    anchors: Annotated[Path, typer.Option(help="JSON lines: people's judgements; see docs/graders.md.")],
    by: Annotated[str | None, typer.Option(help="Who checks; default: you.")] = None,
    json_out: Json = False,
    config: Config = None,
) -> None:
    """Ask judge NAME about answers that people have judged, and store how often they agree.

    A guardrail or objective may rest on a judge only after a check that passed. Exit status 1 when it did
    not.
    """
    from serve.config import load_serve_config
    from serve.state.judges import JudgeState
    from serve.state.tables import open_state

    settings = load_serve_config(config)
    judges = settings.judges()
    if name not in judges:
        raise NotFoundError(f"no judge {name!r}; there are: {', '.join(sorted(judges)) or 'none'}.")
    judge = judges[name]
    rows = read_anchors(anchors, judge.pairwise)
    found = asyncio.run(_check(settings, name, judge, rows, by or getpass.getuser()))
    JudgeState(open_state(settings.state_url)).add(found)
    passed = found.agreement >= judge.min_agreement and found.anchors >= judge.min_anchors
    if json_out:
        typer.echo(json.dumps({**found.model_dump(mode="json"), "passed": passed}, indent=2))
    else:
        _print(found, judge, passed)
    if not passed:
        raise typer.Exit(1)


def read_anchors(path: Path, pairwise: bool) -> list[Anchor]:
    """The anchors of a file. Raises: ConfigError, DataError naming the line."""
    from pydantic import ValidationError

    from serve.grading.agreement import Anchor

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--anchors: {path} cannot be read ({err}).") from err
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            anchor = Anchor.model_validate_json(line)
        except ValidationError as err:
            first = err.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise DataError(
                f"{path}:{number}: {where}: {first['msg'].removeprefix('Value error, ')}."
            ) from err
        if anchor.pairwise != pairwise:
            needed = "'answer_a', 'answer_b', 'human'" if pairwise else "'answer', 'human_score'"
            raise DataError(f"{path}:{number}: this judge needs anchors with {needed}.")
        found.append(anchor)
    if not found:
        raise DataError(f"{path}: holds no anchors.")
    return found


async def _check(
    settings: ServeConfig, name: str, judge: JudgeGrader, rows: Sequence[Anchor], by: str
) -> JudgeCheck:
    """Ask about every anchor, a pair in both orders; the order that production would draw is what counts."""
    from contracts.grading import JudgeCheck
    from serve.grading.agreement import agrees, kappa, position_bias, wilson
    from serve.grading.judge import evidence_name
    from serve.grading.sampling import canary_first

    version = evidence_name(name, judge, settings.upstream(judge.upstream))
    asked = await _ask_all(settings, judge, rows)
    straight = [pair[0] for pair in asked]
    said = [pair[0 if canary_first(version, str(i)) else 1] for i, pair in enumerate(asked)]
    truth = [row.truth for row in rows]
    agreed = sum(agrees(s, t, judge.pairwise) for s, t in zip(said, truth, strict=True))
    low, high = wilson(agreed, len(rows))
    first, flipped = (None, None)
    if judge.pairwise:
        first, flipped = position_bias(straight, [pair[1] for pair in asked])
    return JudgeCheck(
        name=name, grader=version, at=time.time(), by=by, anchors=len(rows), agreed=agreed,
        agreement=agreed / len(rows), low=low, high=high, kappa=kappa(said, truth, judge.pairwise),
        first_share=first, flipped=flipped, abstained=sum(s is None for s in said),
    )  # fmt: skip


async def _ask_all(
    settings: ServeConfig, judge: JudgeGrader, rows: Sequence[Anchor]
) -> list[tuple[float | None, float | None]]:
    """(a first, b first) of every pair as the value for a; a score twice the same."""
    from serve.router.client import HttpClient
    from serve.router.judge_client import JudgeClient
    from serve.router.pool import Pools
    from serve.state.tables import open_state
    from serve.state.traffic import TrafficState

    router = settings.router_config()
    pools = Pools(router)
    pools.apply(TrafficState(open_state(settings.state_url)).endpoints())
    http = HttpClient(router.timeouts.connect_s)
    client = JudgeClient(http, pools, {judge.upstream: settings.upstream(judge.upstream)})
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(row: Anchor) -> tuple[float | None, float | None]:
        async with places:
            if not judge.pairwise:
                score = await _score(client, judge, row)
                return score, score
            return await _verdict(client, judge, row, True), await _verdict(client, judge, row, False)

    try:
        return await asyncio.gather(*map(one, rows))
    except EngineError as err:
        raise EngineError(f"{err} Nothing was stored; check again when the judge answers.") from err
    finally:
        http.close()


async def _verdict(client: JudgeClient, judge: JudgeGrader, row: Anchor, a_first: bool) -> float | None:
    from serve.grading.judge import pair_prompt, parse_verdict

    assert row.answer_a is not None
    assert row.answer_b is not None
    first, second = (row.answer_a, row.answer_b) if a_first else (row.answer_b, row.answer_a)
    reply = await client.ask(judge, pair_prompt(judge, row.request, first, second))
    return parse_verdict(reply, a_first)


async def _score(client: JudgeClient, judge: JudgeGrader, row: Anchor) -> float | None:
    from serve.grading.judge import parse_score, score_prompt

    assert row.answer is not None
    reply = await client.ask(judge, score_prompt(judge, row.request, row.answer))
    return parse_score(reply)


def _print(found: JudgeCheck, judge: JudgeGrader, passed: bool) -> None:
    console = Console(highlight=False)
    console.print(f"Judge [bold]{found.grader}[/] on {found.anchors} anchors:")
    console.print(
        f"  agreement {100 * found.agreement:.1f} % ({found.agreed} of {found.anchors}; "
        f"95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %)"
    )
    console.print(f"  Cohen's kappa {'not defined' if found.kappa is None else f'{found.kappa:.2f}'}")
    if found.first_share is not None:
        console.print(
            f"  position bias: the answer shown first won {100 * found.first_share:.0f} % (50 % is none)"
        )
    if found.flipped is not None:
        console.print(f"  the order changed {100 * found.flipped:.0f} % of the verdicts")
    if found.abstained:
        console.print(f"  no readable verdict on {found.abstained} anchors (counted as disagreement)")
    if passed:
        console.print(
            f"Passed; good for {judge.check_max_age_days:g} days, as long as the judge stays as it is."
        )
    else:
        needed = f"{100 * judge.min_agreement:g} % on at least {judge.min_anchors} anchors"
        console.print(f"[red]Not passed[/]: needs {needed}.")
