"""What of a workdir was sent already: `<workdir>/tracking/state.json`, written after every send.

The workdir itself is the spool: all that is tracked lies in it as files, so a server that is down, or a job
that is killed, loses nothing. Knows nothing about MLflow.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from contracts.config import write_atomic

FOLDER = "tracking"


class Curve(BaseModel):
    """How far a progress file was sent."""

    bytes: int = 0
    step: int = -1
    """Steps up to this one are known: a trainer that went back to a checkpoint repeats some."""


class Sent(BaseModel):
    """Cursors of one job."""

    job: str = Field(default_factory=lambda: uuid.uuid4().hex)
    """Made with the workdir; finds the run when the job died between making it and writing it down."""
    run_id: str | None = None
    params: dict[str, str] = Field(default_factory=dict)
    stages: dict[str, str] = Field(default_factory=dict)
    """Stage → key of the manifest that was sent."""
    curves: dict[str, Curve] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    """Artifact → sha256 that was sent."""
    status: str = ""


def read_sent(workdir: Path) -> Sent:
    """The cursors; new ones, stored, when there are none or they cannot be read."""
    file = _file(workdir)
    try:
        return Sent.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        made = Sent()
        write_sent(workdir, made)
        return made


def write_sent(workdir: Path, sent: Sent) -> None:
    """Store the cursors atomically."""
    write_atomic(_file(workdir), sent.model_dump_json(indent=1) + "\n")


def tracking_run(workdir: Path) -> str | None:
    """The MLflow run of a job; None when it is not tracked, or the server was never reached."""
    return read_sent(workdir).run_id if _file(workdir).is_file() else None


def _file(workdir: Path) -> Path:
    return workdir / FOLDER / "state.json"
