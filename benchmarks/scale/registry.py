"""What the registry's calls take when a model has 10, 1,000 and 10,000 versions: real MLflow on SQLite.

The first versions are published; the others are copies of the last one's rows in MLflow's own tables, each a
version with a record of its own, because publishing ten thousand takes hours. Every call goes through
`MlflowRegistry`.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import Engine, MetaData, create_engine, insert, select

from benchmarks.results import Bar
from contracts.model import Artifact, ModelRecord
from registry.digest import bytes_of, digest_folder
from registry.mlflow_store import MlflowRegistry, sqlite_uri

SIZES, NAME = (10, 1000, 10_000), "support"
_CHUNK = 2000
_DIGEST, _RECORD, _CHECKSUM = "stillhouse.digest", "stillhouse.record", "stillhouse.record_sha256"


def run() -> tuple[list[dict[str, Any]], list[Bar]]:
    """A row for each size."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="sh-registry-") as name:
        folder = Path(name)
        registry = MlflowRegistry(sqlite_uri(folder / "registry.db"), cache_dir=folder / "cache")
        engine = create_engine(f"sqlite:///{folder / 'registry.db'}")
        made = 0
        for size in SIZES:
            if made == 0:
                for n in range(3):
                    publish(registry, folder, f"seed-{n}")
                made = 3
            copy_versions(engine, made, size)
            rows.append({"part": "registry", "versions": size, **_measure(registry, folder, size)})
            made = size + 1  # the measurement publishes one
        engine.dispose()
    return rows, []


def publish(registry: MlflowRegistry, folder: Path, content: str) -> ModelRecord:
    """A small artifact as the next version."""
    artifact = folder / content
    artifact.mkdir()
    (artifact / "model.safetensors").write_text(content)
    noun = Artifact(
        uri=str(artifact),
        digest=digest_folder(artifact),
        precision="bf16",
        bytes=bytes_of(artifact),
        params=7,
    )
    return registry.publish(ModelRecord(name=NAME, artifact=noun, created_at=12.0), artifact)


def copy_versions(engine: Engine, have: int, want: int) -> None:
    """Versions `have + 1` … `want` as copies of the newest, each with a digest and a checked record."""
    metadata = MetaData()
    metadata.reflect(engine, only=("model_versions", "model_version_tags"))
    versions, tags = metadata.tables["model_versions"], metadata.tables["model_version_tags"]
    with engine.begin() as db:
        like = dict(db.execute(select(versions).where(versions.c.version == have)).mappings().one())
        kept = {row["key"]: row["value"] for row in db.execute(
            select(tags).where(tags.c.version == have)).mappings()}  # fmt: skip
        record = ModelRecord.model_validate_json(kept[_RECORD])
        for first in range(have + 1, want + 1, _CHUNK):
            numbers = range(first, min(first + _CHUNK, want + 1))
            db.execute(insert(versions), [{**like, "version": n} for n in numbers])
            lines = [
                {"name": NAME, "version": n, "key": key, "value": value}
                for n in numbers
                for key, value in {**kept, **_tags(record, n)}.items()
            ]
            db.execute(insert(tags), lines)


def _tags(record: ModelRecord, number: int) -> dict[str, str]:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    artifact = record.artifact.model_copy(update={"digest": digest})
    text = record.model_copy(update={"artifact": artifact}).model_dump_json()
    return {_DIGEST: digest, _RECORD: text, _CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}


def _measure(registry: MlflowRegistry, folder: Path, size: int) -> dict[str, float]:
    moves = iter(range(1, size + 1))
    return {
        "get_s": _seconds(lambda: registry.get(f"{NAME}:{size}")),
        "history_s": _seconds(lambda: registry.history(NAME), times=1),
        "set_alias_s": _seconds(
            lambda: registry.set_alias(NAME, "champion", next(moves), by="bench", reason="scale")
        ),
        "get_alias_s": _seconds(lambda: registry.get(f"{NAME}@champion")),
        "publish_s": _seconds(lambda: publish(registry, folder, f"at-{size}"), times=1),
    }


def _seconds(call: Callable[[], object], times: int = 3) -> float:
    """Median seconds of processor time: MLflow, SQLite and we are one process, and the machine is shared."""
    took = []
    for _ in range(times):
        began = time.process_time()
        call()
        took.append(time.process_time() - began)
    return round(median(took), 4)
