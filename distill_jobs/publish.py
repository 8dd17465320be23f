"""publish: the evaluated artifact and its lineage into the registry, as `challenger`.

Idempotent by the artifact's digest: a killed publish, run again, finds or finishes its version. Knows nothing
about MLflow beyond the registry's protocol.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from contracts.config import write_atomic
from contracts.dataset import Manifest
from contracts.errors import GateError
from contracts.gates import GateReport
from contracts.model import Artifact, EvalReport, Lineage, ModelRecord
from distill_jobs.config import DistillConfig, PublishConfig
from distill_jobs.keys import git_revision, output_file
from distill_jobs.publishing.card import render
from distill_jobs.publishing.facts import gather
from distill_jobs.stage import Result
from distill_jobs.tracking.state import tracking_run
from registry.adapter import is_adapter, read_adapter
from registry.store import Registry

CARD = "MODEL_CARD.md"


def open_registry(config: PublishConfig) -> Registry:
    """The MLflow registry of the configuration (MLflow is imported when it is first used)."""
    from registry.mlflow_store import MlflowRegistry

    return MlflowRegistry(config.tracking_uri, config.artifact_root)


def run(
    job: DistillConfig,
    teacher_digest: str,
    manifests: dict[str, Manifest],
    gates: GateReport | None,
    registry: Registry,
    folder: Path,
) -> Result:
    """Publish the quantized artifact and point the alias at it. Raises: GateError when no gate was asked."""
    if gates is None:
        raise GateError("A student cannot be published without the gates' report. Run the whole pipeline.")
    config = job.publish
    record = make_record(job, teacher_digest, manifests, gates)
    card = render(gather(record, job, manifests, gates))
    write_atomic(folder / CARD, card)
    published = registry.publish(record, manifests["quantize"].output("artifact"), card)
    if config.alias is not None and published.version is not None:
        registry.set_alias(
            config.name, config.alias, published.version, by="distill", reason="published by distill"
        )
    write_atomic(folder / "record.json", published.model_dump_json(indent=1) + "\n")
    outputs = {"record": output_file(folder / "record.json"), "card": output_file(folder / CARD)}
    return Result(outputs, notes={"ref": published.ref})


def make_record(
    job: DistillConfig, teacher_digest: str, manifests: dict[str, Manifest], gates: GateReport
) -> ModelRecord:
    """The record of the quantized artifact, with everything it came from."""
    quantized, evaluated, collected = manifests["quantize"], manifests["evaluate"], manifests["collect"]
    artifact, folder = quantized.outputs["artifact"], quantized.output("artifact")
    return ModelRecord(
        name=job.publish.name,
        artifact=Artifact(
            uri=artifact.path,
            digest=artifact.digest,
            precision=quantized.notes["format"],
            bytes=artifact.bytes,
            params=int(evaluated.metrics["quantized.params"] or 0),
            adapter=read_adapter(folder) if is_adapter(folder) else None,
        ),
        evaluation=EvalReport(
            metrics=evaluated.metrics,
            intervals=evaluated.intervals,
            samples=evaluated.counts["samples"],
            dataset_digest=evaluated.notes["dataset_digest"],
            engine=evaluated.notes["engine"],
            gates=gates,
        ),
        lineage=Lineage(
            log_segments=[
                f"{name}@{digest}" for name, digest in json.loads(collected.notes["segments"]).items()
            ],
            log_from=collected.metrics["log_from"],
            log_to=collected.metrics["log_to"],
            manifests={stage: manifest.key for stage, manifest in manifests.items()},
            teacher=job.teacher,
            teacher_digest=teacher_digest,
            base_model=job.student,
            git_revision=git_revision(),
            tracking_run=tracking_run(job.workdir),
        ),
        created_at=time.time(),
        description=job.publish.description,
    )
