"""What a job left on disk about a student, gathered for its model card.

Everything that a stage may or may not have measured is optional here. Knows nothing about how a card reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contracts.dataset import Manifest
from contracts.gates import GateReport
from contracts.model import ModelRecord
from distill_jobs.config import DistillConfig

MODELS = ("teacher", "student", "quantized", "champion")


@dataclass(frozen=True)
class Facts:
    """All that a card is made of."""

    record: ModelRecord
    """As it is published; its version is not known yet."""
    config: DistillConfig
    manifests: Mapping[str, Manifest]
    gates: GateReport
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metric → interval over the evaluation requests."""
    classes: tuple[Mapping[str, Any], ...] = ()
    """By class of the published artifact: class, precision, recall, f1, support."""

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """What was measured."""
        return self.record.evaluation.metrics if self.record.evaluation else {}

    @property
    def samples(self) -> int:
        """Evaluation requests."""
        return self.record.evaluation.samples if self.record.evaluation else 0

    def value(self, name: str) -> float | None:
        """A metric; None when it was not measured."""
        return self.metrics.get(name)

    def count(self, stage: str, name: str) -> int:
        """A stage's count; 0 when it did not count that."""
        manifest = self.manifests.get(stage)
        return 0 if manifest is None else manifest.counts.get(name, 0)

    def dataset_digest(self) -> str | None:
        """Digest of the training samples."""
        collected = self.manifests.get("collect")
        train = collected.outputs.get("train") if collected else None
        return train.digest if train else None


def gather(
    record: ModelRecord, config: DistillConfig, manifests: Mapping[str, Manifest], gates: GateReport
) -> Facts:
    """The facts of a job whose evaluation has ended."""
    report = _report(manifests["evaluate"])
    intervals = {name: (float(pair[0]), float(pair[1])) for name, pair in report.get("intervals", {}).items()}
    details = report.get("details", {}).get("quantized", {})
    return Facts(record, config, manifests, gates, intervals, tuple(details.get("classes", ())))


def _report(evaluated: Manifest) -> dict[str, Any]:
    """The evaluation's report; plain metrics, or an empty one, have no intervals."""
    if "report" not in evaluated.outputs:
        return {}
    try:
        found = json.loads(Path(evaluated.outputs["report"].path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a card without intervals is better than no student
        return {}
    return found if isinstance(found, dict) and "metrics" in found else {}
