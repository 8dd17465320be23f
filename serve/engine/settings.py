"""Files of engine settings: what `stillhouse tune` and `stillhouse speculate` write and engine sections read.

YAML with one section, `engine:`, of EngineOptions' fields. Knows nothing about which fields there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from contracts.config import write_atomic


def read_settings(file: str | Path) -> dict[str, Any]:
    """The fields a file sets. Raises: ValueError, which pydantic shows with the field's name."""
    path = Path(file).expanduser()
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ValueError(f"{path} cannot be read ({err}); give a file that stillhouse tune wrote") from err
    section = found.get("engine") if isinstance(found, dict) else None
    if not isinstance(section, dict) or "settings" in section:
        raise ValueError(f"{path} has no section 'engine' of engine options")
    return {str(name): value for name, value in section.items()}


def write_settings(file: Path, options: dict[str, Any], why: str) -> None:
    """Write a settings file; `why` becomes its comment. Fields that a former run set are kept."""
    known = read_settings(file) if file.exists() else {}
    comment = "".join(f"# {line}\n" for line in why.splitlines())
    write_atomic(file, comment + yaml.safe_dump({"engine": {**known, **options}}, sort_keys=True))
