"""Where a model's files are. Knows nothing about what is in them."""

from __future__ import annotations

from pathlib import Path


def local_model(model: str) -> Path | None:
    """The folder of a local model (a path or a file:// URI), or None for a Hugging Face id."""
    path = Path(model.removeprefix("file://")).expanduser()
    return path.resolve() if path.is_dir() else None
