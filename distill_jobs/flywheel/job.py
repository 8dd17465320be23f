"""A run's distillation configuration: the route's file, its overrides, and what the flywheel sets itself.

Knows the distillation's configuration and results on disk; nothing about processes or triggers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from contracts.config import dump_resolved, load_config
from contracts.dataset import Manifest
from distill_jobs.config import DistillConfig
from distill_jobs.flywheel.config import RouteConfig
from distill_jobs.flywheel.processes import folder_of

RESOLVED = "distill.json"


def resolve(
    route: str, config: RouteConfig, workdir: str | None = None, since: float | None = None
) -> DistillConfig:
    """The configuration of one run. Raises: ConfigError naming the field of the route's file."""
    values: dict[str, Any] = dict(config.overrides)
    if workdir is not None:
        values["workdir"] = workdir
    if since is not None:
        values["collect.since"] = since
    found = load_config(config.distill, DistillConfig, values)
    if found.collect.route is None:
        found = found.model_copy(update={"collect": found.collect.model_copy(update={"route": route})})
    if "ray" not in found.model_fields_set:
        # The running cluster's processors are serving's; a Ray of its own can also be stopped with the run.
        found = found.model_copy(update={"ray": "local"})
    return found


def write_resolved(route: str, config: RouteConfig, workdir: str, since: float | None) -> DistillConfig:
    """Resolve a run's configuration once; a run that is gone on with reads what its first attempt wrote."""
    file = folder_of(workdir) / RESOLVED
    if file.is_file():
        return load_config(file, DistillConfig)
    found = resolve(route, config, workdir, since)
    dump_resolved(found, file)
    return found


def command(route: str, config: RouteConfig, workdir: str, run: str) -> list[str]:
    """What is run: this installation's pipeline, or the route's own command with its places filled in."""
    file = str((folder_of(workdir) / RESOLVED).resolve())
    if not config.command:
        return [sys.executable, "-m", "distill_jobs.cli", file]
    return filled(config.command, config=file, workdir=workdir, route=route, run=run)


def filled(words: tuple[str, ...], **values: str) -> list[str]:
    """Words of a command with {name} replaced; other braces stay as they are (JSON, for one)."""
    out = []
    for word in words:
        for name, value in values.items():
            word = word.replace(f"{{{name}}}", value)
        out.append(word)
    return out


def on_own_ray(workdir: str) -> bool:
    """True when all of the run's work is among its own processes, so that they can be stopped."""
    try:
        found = json.loads((folder_of(workdir) / RESOLVED).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not resolved yet
        return True
    return bool(found.get("ray") == "local")


def teacher_tokens(workdir: str) -> int:
    """Tokens that the teacher was asked for: counted by the teach stage, or the positions that it scored."""
    total = 0
    for manifest in _manifests(workdir, "teach"):
        total += manifest.counts.get("teacher_tokens", manifest.counts.get("positions", 0))
    return total


def published_ref(workdir: str) -> str | None:
    """The reference of the student that a run published."""
    return next((m.notes["ref"] for m in _manifests(workdir, "publish") if "ref" in m.notes), None)


def stage_of(workdir: str) -> str:
    """Where a run is, for people; empty before it says so."""
    try:
        found = json.loads((Path(workdir) / "progress.json").read_text(encoding="utf-8"))
        return f"{found['stage']} {found['note']}".strip()
    except (OSError, ValueError, KeyError):  # not begun, or not this pipeline
        return ""


def _manifests(workdir: str, stage: str) -> list[Manifest]:
    found = []
    for file in sorted(Path(workdir).glob(f"{stage}-*/manifest.json")):
        try:
            found.append(Manifest.model_validate_json(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # somebody else's file
            continue
    return found
