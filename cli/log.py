"""`stillhouse log`: what people do to the request log by hand.

Parses and prints; the work is in serve.request_log.erase. Knows nothing about rows.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.options import Config
from contracts.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="The request log."
)


@app.callback()
def _log() -> None:
    """The request log."""


@app.command()
def erase(
    conversation: Annotated[
        str | None, typer.Option(metavar="ID", help="Id of a conversation (header or metadata).")
    ] = None,
    user: Annotated[str | None, typer.Option(metavar="ID", help="Id of a user, as clients send it.")] = None,
    request: Annotated[str | None, typer.Option(metavar="ID", help="An x-request-id.")] = None,
    config: Config = None,
) -> None:
    """Remove every row of a conversation, a user or a request: log, uploads, feedback. Safe while it runs.

    Hosts that have a log folder of their own need it run on each of them.
    """
    from serve.config import load_serve_config
    from serve.request_log.erase import erase as erase_rows
    from serve.request_log.remote import Remote
    from serve.request_log.segments import recover
    from serve.request_log.subjects import TargetKind, make_target
    from serve.router.names import host_name
    from serve.state.feedback import FeedbackState
    from serve.state.tables import open_state

    given = {TargetKind.CONVERSATION: conversation, TargetKind.USER: user, TargetKind.REQUEST: request}
    named = [(kind, name) for kind, name in given.items() if name]
    if len(named) != 1:
        raise ConfigError("give exactly one of --conversation, --user and --request.")
    settings = load_serve_config(config).router_config()
    target = make_target(*named[0], at=time.time())
    by_request = target.kind is TargetKind.REQUEST
    judgements = FeedbackState(open_state(settings.state_url)).erase(
        request_id=target.key if by_request else None, subject=None if by_request else target.subject
    )
    console = Console(highlight=False)
    log = settings.log
    if log is not None:
        folder = Path(log.dir)
        recover(folder, host_name())
        done = erase_rows(folder, Remote(log.upload) if log.upload else None, target)
        places = f"{done.local} from {folder}" + (f", {done.remote} from {log.upload}" if log.upload else "")
        console.print(f"Rows erased: {places}.", markup=False)
        if done.waiting:
            console.print(
                f"{done.waiting} more are in open segments; the routers drop them when they close those, "
                f"at most {log.rotate_s:g} s after they were begun."
            )
    console.print(f"Feedback erased from the state store: {judgements}.")
