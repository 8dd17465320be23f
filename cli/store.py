"""Which state store a command works on: the stack's by its configuration, or any by its URL.

Knows nothing about what is in it.
"""

from __future__ import annotations

from typing import Annotated

import typer
from sqlalchemy import Engine

from serve.config import load_serve_config
from serve.state.tables import open_state

State = Annotated[
    str | None,
    typer.Option("--state-url", help="State store of routers that no stack runs."),
]


def open_store(config: str | None, state_url: str | None) -> Engine:
    """Open it; a URL wins over a configuration. Raises: ConfigError, StateError."""
    return open_state(state_url or load_serve_config(config).state_url)
