"""Recipes: fragments of a training configuration, one file a method, laid over a configuration of one's own.

`configs/recipes/<method>.yaml` says what makes the method; everything else stays as the base has it.
Importable without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from contracts.config import parse_config
from contracts.errors import ConfigError
from distill_jobs.training.config import TrainConfig

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "recipes"


def recipe_names() -> list[str]:
    """The methods that there is a recipe for."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's fragment. Raises: ConfigError for an unknown name, or a file that holds no mapping."""
    file = FOLDER / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(recipe_names())}.")
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must hold a mapping, a fragment of `train`.")
    return data


def with_recipe(base: TrainConfig, name: str) -> TrainConfig:
    """The base configuration with the recipe's fields in it. Raises: ConfigError naming the field."""
    merged = _over(base.model_dump(exclude_unset=True), read_recipe(name))
    return parse_config(merged, TrainConfig, source=f"recipe {name}")


def _over(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged key by key; what is no mapping is replaced."""
    result = dict(base)
    for key, value in more.items():
        mine = result.get(key)
        result[key] = _over(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return result
