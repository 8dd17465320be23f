"""The broken student of the demo: a good one's weights damaged, published past its gate on purpose.

Knows the registry and `demo.make_models`; nothing of rollouts.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from contracts.gates import Gate, GateReport, GateResult, Verdict
from contracts.model import Artifact, EvalReport, Lineage, ModelRecord
from demo.console import Console
from demo.make_models import broken as damage
from registry.digest import bytes_of, digest_folder

if TYPE_CHECKING:
    from demo.stack import Stack

WHY = "the demo shows that live tests catch what a gate was told to let through"


def publish_broken(stack: Stack, name: str, console: Console) -> str:
    """Damage the champion, publish it with its gate overridden, return its reference."""
    with console.step("a broken student is published with its gate overridden") as step:
        good = stack.record(f"{name}@champion")
        folder = stack.out / "broken"
        damage(source=stack.registry.download(good.ref), out=folder)
        record = ModelRecord(
            name=name,
            artifact=Artifact(
                uri=str(folder),
                digest=digest_folder(folder),
                precision=good.artifact.precision,
                bytes=bytes_of(folder),
                params=good.artifact.params,
            ),
            evaluation=_not_evaluated(),
            lineage=Lineage(base_model=good.ref),
            created_at=time.time(),
            description=f"{good.ref} with damaged weights",
        )
        published = stack.registry.publish(record, folder)
        step.note(published.ref)
    return published.ref


def _not_evaluated() -> EvalReport:
    gate = Gate(metric="quantized.accuracy", relative_to="teacher.accuracy", at_least=0.98)
    result = GateResult(gate=gate, value=None, verdict=Verdict.NO_DATA, reason="not evaluated")
    gates = GateReport(results=[result], overridden_by=f"demo: {WHY}")
    return EvalReport(metrics={}, samples=0, dataset_digest="none", engine="none", gates=gates)
