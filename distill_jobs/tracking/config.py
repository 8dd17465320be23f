"""What tracking may be told. Importable without MLflow."""

from __future__ import annotations

from pydantic import Field

from contracts.config import StrictConfig


class TrackingConfig(StrictConfig):
    """One MLflow run a job, the same when the job is resumed. It never delays or fails a job."""

    enabled: bool = True
    uri: str | None = None
    """MLflow tracking URI; None is the registry's (publish.tracking_uri)."""
    every_s: float = Field(default=10.0, gt=0)
    """Seconds between two looks at the workdir."""
    flush_s: float = Field(default=20.0, ge=0)
    """Seconds that an ending job waits for what is left to be sent; the rest is sent by
    `stillhouse models track WORKDIR`, or when the job is resumed."""
    samples: int = Field(default=50, ge=0)
    """Evaluation requests whose answers are logged side by side."""
    max_artifact_mb: float = Field(default=20.0, gt=0)
    """Larger files of a report are left in the workdir."""
