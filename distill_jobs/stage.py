"""How a stage runs: its folder, its manifest written last, skipped when finished, one job a workdir.

Knows nothing about what the stages do; pipeline.py puts them in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from contracts.config import write_atomic
from contracts.dataset import Manifest, OutputFile
from contracts.errors import ConflictError, DataError
from distill_jobs.keys import KEY_CHARS, git_revision, stage_key
from distill_jobs.locks import held
from distill_jobs.progress import Progress
from registry.digest import bytes_of

ORDER = ("collect", "teach", "train", "quantize", "evaluate", "publish")


@dataclass
class Result:
    """What a stage's work hands back; the manifest is made of it."""

    outputs: dict[str, OutputFile]
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


Work = Callable[[Path], Result]
"""Does a stage's work in its folder, going on from whatever an interrupted run left there."""


@dataclass(frozen=True)
class Job:
    """One run over one workdir."""

    workdir: Path
    progress: Progress
    only: str | None = None
    """Run this stage alone; the ones before it must be finished."""

    def stage(
        self, name: str, config: dict[str, object], parents: dict[str, Manifest], work: Work
    ) -> Manifest:
        """Run a stage, or read the manifest of the run that finished it."""
        folder = self.folder(name, config, parents)
        finished = read_manifest(folder)
        if finished is not None:
            self.progress.end("skipped", name)
            return finished
        if self.only is not None and name != self.only:
            raise ConflictError(
                f"Stage {self.only!r} needs {name!r}, which is not finished in {self.workdir}. Run it first."
            )
        folder.mkdir(parents=True, exist_ok=True)
        started = time.time()
        self.progress.begin(name)
        result = work(folder)
        manifest = Manifest(
            stage=name,
            key=stage_key(name, config, parents),
            parents={p: m.key for p, m in parents.items()},
            config=config,
            outputs=result.outputs,
            counts=result.counts,
            metrics=result.metrics,
            notes=result.notes,
            intervals=result.intervals,
            git_revision=git_revision(),
            started_at=started,
            seconds=round(time.time() - started, 3),
        )
        write_atomic(folder / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
        self.progress.end("done")
        return manifest

    def folder(self, name: str, config: dict[str, object], parents: dict[str, Manifest]) -> Path:
        """`<workdir>/<stage>-<key12>`."""
        return self.workdir / f"{name}-{stage_key(name, config, parents)[:KEY_CHARS]}"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished stage, its outputs checked by size (a digest of everything would cost
    minutes).

    Raises: DataError when an output is gone or has another size.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    try:
        manifest = Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as err:
        raise DataError(
            f"{file} is not a manifest of this version: {err}. Remove {folder} to redo the stage."
        ) from err
    for name, output in manifest.outputs.items():
        path = Path(output.path)
        if not path.exists() or bytes_of(path) != output.bytes:
            raise DataError(
                f"Output {name!r} of {folder.name} was changed or removed ({path}). "
                f"Remove {folder} to redo it."
            )
    return manifest


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold the workdir for this process; the lock dies with the process, so SIGKILL leaves nothing behind.

    Raises: ConflictError naming the process that holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with held(
        workdir / ".lock",
        lambda holder: (
            f"Another distill job (process {holder}) is running in {workdir}."
            " Wait for it, or use another workdir."
        ),
    ):
        yield
