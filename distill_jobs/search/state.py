"""What a search has found so far, in one file that is replaced whole after every student of every rung.

Knows nothing about how anything was found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from contracts.config import Record, parse_config, write_atomic
from contracts.errors import ConfigError

FILE = "search.json"


class RungState(Record):
    """One rung."""

    tokens: int
    candidates: list[str]
    losses: dict[str, float] = Field(default_factory=dict)
    """Held-out loss of those that are measured by now."""
    trained: dict[str, int] = Field(default_factory=dict)
    """Tokens that each was trained on (whole steps, so a few more than wanted)."""


class State(Record):
    """A search in progress, or finished."""

    inputs: dict[str, Any]
    """What it searches: another search must not go on in its folder."""
    rungs: list[RungState] = Field(default_factory=list)
    speeds: dict[str, float] = Field(default_factory=dict)
    """Measured tokens/s by candidate."""
    finished: bool = False


def open_state(folder: Path, inputs: dict[str, Any]) -> State:
    """What is known in the folder, or an empty state. Raises: ConfigError when it is of another search, or no
    state at all."""
    file = folder / FILE
    if not file.is_file():
        return State(inputs=inputs)
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ConfigError(f"{file} is no search's state ({err}). Remove {folder} to search anew.") from err
    found = parse_config(told, State, source=str(file))
    changed = [name for name in inputs if found.inputs.get(name) != inputs[name]]
    if changed:
        raise ConfigError(
            f"folder: {folder} holds a search with another {' and another '.join(changed)}. Take another"
            " folder, or remove it."
        )
    return found


def save(state: State, folder: Path) -> None:
    """Replace the file."""
    write_atomic(folder / FILE, state.model_dump_json(indent=1) + "\n")
