"""The champion a student must not be worse than: looked up once when a job starts, and how it is measured.

Its stored metrics serve where they are of the same requests, teacher and engine; else its artifact is
measured beside the student. Knows nothing about bounds (contracts/gates.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contracts.config import Record, write_atomic
from contracts.errors import NotFoundError
from contracts.gates import CHAMPION, Gate
from contracts.model import ModelRecord
from distill_jobs.engine import engine_name
from registry.store import Registry

_OF_THE_MOMENT = frozenset({"tokens_per_s", "ttft_s", "peak_rss_bytes", "gpu_bytes"})
"""Figures of a machine at a time: yesterday's are no reference for today's."""


class Champion(Record):
    """What `WORKDIR/champion.json` holds: the champion when the job started, if there was one."""

    record: ModelRecord | None = None
    folder: str | None = None
    """Where its artifact lies on this machine."""

    @property
    def ref(self) -> str | None:
        """name:version."""
        return self.record.ref if self.record is not None else None


def pin_champion(gates: Sequence[Gate], name: str, workdir: Path, registry: Registry) -> Champion | None:
    """The champion of `name`, fixed at the job's first start; None when no gate compares with one.

    A job that goes on after its student became champion would otherwise be held against itself.
    """
    if not any(g.needs_champion for g in gates):
        return None
    file = workdir / "champion.json"
    if file.is_file():
        return Champion.model_validate_json(file.read_text(encoding="utf-8"))
    found = Champion()
    ref = f"{name}@{CHAMPION.rstrip('.')}"
    try:
        record = registry.get(ref)
    except NotFoundError:
        record = None
    if record is not None:
        found = Champion(record=record, folder=str(registry.download(record.ref)))
    write_atomic(file, found.model_dump_json(indent=1) + "\n")
    return found


def stored_metrics(
    champion: Champion, gates: Sequence[Gate], dataset_digest: str, samples: int, teacher_digest: str
) -> dict[str, float | None] | None:
    """The metrics its record holds, without "quantized."; None when it must be measured: other requests,
    teacher or engine, a figure of the moment, a metric that was not taken, or a gate on an interval's bound
    (which pairs the two models' answers by request).
    """
    record = champion.record
    if record is None or record.evaluation is None:
        return None
    there = record.evaluation
    same = (
        there.dataset_digest == dataset_digest
        and there.samples == samples
        and there.engine == engine_name()
        and record.lineage.teacher_digest == teacher_digest
    )
    stored = {k.removeprefix("quantized."): v for k, v in there.metrics.items() if k.startswith("quantized.")}
    for gate in gates:
        if gate.needs_champion and gate.relative_to is not None:
            wanted = gate.relative_to.removeprefix(CHAMPION)
            if gate.bound != "value" or wanted in _OF_THE_MOMENT or stored.get(wanted) is None:
                return None
    return stored if same else None
