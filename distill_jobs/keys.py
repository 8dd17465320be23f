"""Keys and pinned inputs: what makes two runs of a stage the same work.

A stage's key is the sha256 of its name, its resolved configuration and its parents' output digests. Knows
nothing about what a stage does.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel

from contracts.config import canonical_json
from contracts.dataset import Manifest, OutputFile
from contracts.errors import ConfigError, NotFoundError
from registry.digest import bytes_of, digest_folder

KEY_CHARS = 12
"""Characters of a key in a folder's name."""


def sha256_of(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_of_each(values: Iterable[object]) -> str:
    """`sha256_of` of a list, its values taken one at a time."""
    digest, before = hashlib.sha256(b"["), ""
    for value in values:
        digest.update((before + canonical_json(value)).encode())
        before = ","
    digest.update(b"]")
    return digest.hexdigest()


def key_config(section: BaseModel) -> dict[str, object]:
    """The fields of a section (and of sections within it) that decide its result, as JSON values."""
    left_out: frozenset[str] = getattr(type(section), "OPERATIONAL", frozenset())
    data: dict[str, object] = section.model_dump(mode="json")
    return {n: _key_value(getattr(section, n), value) for n, value in data.items() if n not in left_out}


def _key_value(field: object, value: object) -> object:
    """A dumped value without the operational fields of the sections that it holds."""
    if isinstance(field, BaseModel):
        return key_config(field)
    if isinstance(field, tuple) and isinstance(value, list):
        return [_key_value(f, v) for f, v in zip(field, value, strict=True)]
    return value


def stage_key(stage: str, config: dict[str, object], parents: dict[str, Manifest]) -> str:
    """The key of a stage: sha256 of (stage, configuration, what its parents wrote)."""
    digests = {name: {out: file.digest for out, file in m.outputs.items()} for name, m in parents.items()}
    return sha256_of({"stage": stage, "config": config, "parents": digests})


def output_file(path: Path, rows: int | None = None) -> OutputFile:
    """Describe a file or folder that a stage has just finished writing."""
    return OutputFile(path=str(path.resolve()), digest=digest_folder(path), bytes=bytes_of(path), rows=rows)


def model_folder(model: str) -> Path:
    """The local folder of a checkpoint: the folder itself, or an HF id's snapshot (fetched when online).

    Raises: ConfigError when the id is neither.
    """
    folder = Path(model)
    if (folder / "config.json").is_file():
        return folder.resolve()
    if folder.exists() or model.startswith((".", "/")) or model.count("/") > 1:
        raise ConfigError(
            f"{model!r} is not a checkpoint: there is no {folder / 'config.json'}. Check the path."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model))
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"{model!r} is neither a checkpoint folder nor a model the Hugging Face hub could give ({err})."
        ) from err


def model_digest(model: str) -> str:
    """Digest of a checkpoint's folder."""
    try:
        return digest_folder(model_folder(model))
    except NotFoundError as err:
        raise ConfigError(str(err)) from err


def git_revision() -> str | None:
    """The commit this code runs from, with '-dirty' when files differ; None outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
