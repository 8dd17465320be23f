"""Dataset nouns: what a stage of the distillation pipeline hands to the next one.

Made by distill_jobs stages, read by the next stage and by lineage. Knows nothing about how rows are stored.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from contracts.config import Record


class OutputFile(Record):
    """A file or folder a stage wrote. The digest is sha256 over the sorted (name, content) pairs."""

    path: str
    digest: str
    bytes: int = Field(ge=0)
    rows: int | None = None


class Manifest(Record):
    """What a stage did: its key, its parents, its outputs and its counts. Written last, atomically.

    `key` is the sha256 of (stage, resolved stage config, parents' digests): the same key means the same
    work, so a stage whose manifest exists is skipped.
    """

    stage: str
    key: str
    parents: dict[str, str] = Field(default_factory=dict)
    """Parent stage name → its key."""
    config: dict[str, object] = Field(default_factory=dict)
    outputs: dict[str, OutputFile] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    """Rows in, rows dropped by each rule, rows out."""
    metrics: dict[str, float | None] = Field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Bootstrap intervals of those metrics that have one."""
    notes: dict[str, str] = Field(default_factory=dict)
    git_revision: str | None = None
    started_at: float = 0.0
    seconds: float = 0.0

    def output(self, name: str) -> Path:
        """Path of a named output; KeyError names what there is."""
        if name not in self.outputs:
            raise KeyError(f"stage {self.stage!r} has no output {name!r}; it has {sorted(self.outputs)}")
        return Path(self.outputs[name].path)
