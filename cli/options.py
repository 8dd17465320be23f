"""Options that several commands have. Knows nothing about commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    str | None, typer.Option("--config", envvar="STILLHOUSE_CONFIG", help="The stack's configuration file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Log = Annotated[Path | None, typer.Option(help="Folder of the request log. Default: the stack's.")]
