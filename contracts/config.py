"""The base of every configuration class, and the one way to load and dump one.

Strict on purpose: frozen, keyword-only, unknown keys refused. Knows nothing about what is configured.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from contracts.errors import ConfigError


class StrictConfig(BaseModel):
    """Frozen pydantic model that refuses unknown keys; every field documents its unit and bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class Record(BaseModel):
    """Frozen record that crosses a boundary; refuses unknown keys so that drift is seen at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


C = TypeVar("C", bound=BaseModel)

# Made once: json.dumps makes one at every call, a third of the digest of a short request.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
_ENV = re.compile(r"\$\{([A-Z][A-Z0-9_]*)(?::-([^}]*))?\}")


def load_config(path: str | Path, model: type[C], overrides: dict[str, Any] | None = None) -> C:
    """Read a YAML (or JSON) file into `model`.

    `${NAME}` and `${NAME:-default}` are replaced from the environment. `overrides` maps dotted paths
    ("train.epochs") to values and wins over the file.

    Raises: ConfigError naming the file, the field and what is wrong with it.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{file}: cannot be read ({err}). Give the path of a YAML file.") from err
    try:
        data = yaml.safe_load(_expand_env(text, file))
    except yaml.YAMLError as err:
        raise ConfigError(f"{file}: is not valid YAML: {err}") from err
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: must hold a mapping at its top level, not {type(data).__name__}.")
    for dotted, value in (overrides or {}).items():
        _set_dotted(data, dotted, value)
    return parse_config(data, model, source=str(file))


def parse_config(data: Any, model: type[C], source: str = "configuration") -> C:
    """Validate `data` into `model`; a failure names every wrong field with its dotted path."""
    try:
        return model.model_validate(data)
    except ValidationError as err:
        lines = [
            f"  {'.'.join(str(p) for p in e['loc']) or '(top level)'}: {_explain(e, model)}"
            for e in err.errors()
        ]
        raise ConfigError(f"{source} is not valid:\n" + "\n".join(lines)) from err


def dump_resolved(config: BaseModel, path: str | Path) -> None:
    """Write the resolved configuration as JSON (machine-written files are JSON, hand-written ones YAML)."""
    write_atomic(Path(path), config.model_dump_json(indent=2) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Write text so that a reader (or a crash) sees the old file or the new one, never a torn one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with tmp.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    tmp.replace(path)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the form that digests are taken of."""
    return _CANONICAL.encode(value)


def _expand_env(text: str, file: Path) -> str:
    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        value = os.environ.get(name, default)
        if value is None:
            raise ConfigError(f"{file}: ${{{name}}} is not set in the environment and has no default.")
        return value

    return _ENV.sub(replace, text)


def _set_dotted(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for part in parents:
        nxt = data.setdefault(part, {})
        if not isinstance(nxt, dict):
            raise ConfigError(f"override {dotted!r}: {part!r} is not a section.")
        data = nxt
    data[leaf] = value


def _explain(error: Any, model: type[BaseModel]) -> str:
    if error["type"] == "extra_forbidden":
        known = ", ".join(sorted(model.model_fields)) if len(error["loc"]) == 1 else ""
        return "unknown key" + (f"; known keys: {known}" if known else "")
    return f"{error['msg']} (got {error.get('input')!r:.80})"
