"""Adapters as students of their own: what their folder must say, and what is published of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from contracts.errors import DataError
from contracts.model import AdapterBase
from distill_jobs import adapters
from distill_jobs.training.method_config import LoraConfig
from registry.adapter import (
    BASE_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    folders_of,
    is_adapter,
    read_adapter,
    write_base,
)
from registry.digest import digest_folder


def adapter_folder(folder: Path, digest: str, rank: int = 2) -> Path:
    """A whole adapter: one layer's A and B, 2 · 3 + 4 · 2 = 14 parameters at rank 2."""
    folder.mkdir(parents=True)
    a, b = np.ones((rank, 3), np.float32), np.ones((4, rank), np.float32)
    save_file({"q.lora_A.weight": a, "q.lora_B.weight": b}, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    write_base(folder, AdapterBase(ref="base", digest=digest, rank=rank))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that stands for a base model."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_an_adapter_needs_the_base_that_it_names(tmp_path: Path, base: Path) -> None:
    """An engine loads the base for it, once its digest is the adapter's; a model needs itself alone."""
    folder = adapter_folder(tmp_path / "a", digest_folder(base))
    write_base(folder, AdapterBase(ref=str(base), digest=digest_folder(base), rank=2))
    assert folders_of(folder) == (base, folder)
    assert folders_of(base) == (base,)
    (base / "config.json").write_text('{"x": 1}')
    with pytest.raises(DataError, match=rf"with digest .*, and {base} has {digest_folder(base)[:12]}"):
        folders_of(folder)
    (base / "config.json").unlink()
    base.rmdir()
    with pytest.raises(DataError, match="which is no folder here"):
        folders_of(folder)


def test_an_adapter_of_the_head_is_refused(tmp_path: Path) -> None:
    """vLLM's head with adapters would end the engine for everybody."""
    folder = adapter_folder(tmp_path / "a", "0" * 64)
    ones = np.ones((2, 3), np.float32)
    save_file({"model.lm_head.lora_A.weight": ones}, folder / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(DataError, match=r"changes \['lm_head'\]"):
        read_adapter(folder)


def test_the_artifact_of_an_adapter_says_the_base_that_serves_it(tmp_path: Path, base: Path) -> None:
    """The adapter's files go unchanged; a quantized base takes the place of the one trained on, by digest."""
    student = adapter_folder(tmp_path / "student", digest_folder(base))
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "config.json").write_text('{"quantization_config": {}}')
    kept = adapters.run(LoraConfig(export="adapter"), student, tmp_path / "kept")
    assert read_adapter(tmp_path / "kept" / "artifact") == read_adapter(student)
    assert kept.notes["format"] == "lora-bf16"
    moved = LoraConfig(export="adapter", served_base=str(packed))
    adapters.run(moved, student, tmp_path / "moved")
    artifact = tmp_path / "moved" / "artifact"
    assert read_adapter(artifact) == AdapterBase(ref=str(packed), digest=digest_folder(packed), rank=2)
    assert (artifact / WEIGHTS_FILE).read_bytes() == (student / WEIGHTS_FILE).read_bytes()
    with pytest.raises(ValueError, match="served_base is for an adapter"):
        LoraConfig(served_base=str(packed))


@pytest.mark.parametrize("name", [BASE_FILE, CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "noise"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    """Missing, truncated and wrong files are named before any engine is asked."""
    folder = adapter_folder(tmp_path / "a", "0" * 64)
    file = folder / name
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes({"empty": b"", "short": content[:-3], "noise": b"\xff" * len(content)}[damage])
    with pytest.raises(DataError, match=name):
        read_adapter(folder)


def test_ranks_and_kinds_must_agree(tmp_path: Path) -> None:
    """A folder put together from two adapters, or of another method, is refused."""
    folder = adapter_folder(tmp_path / "a", "0" * 64)
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 16}))
    with pytest.raises(DataError, match=r"says rank 16 and adapter_base\.json 2"):
        read_adapter(folder)
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "PREFIX_TUNING", "r": 2}))
    with pytest.raises(DataError, match="only LORA"):
        read_adapter(folder)


def test_merged_models_are_no_adapters(tmp_path: Path, base: Path) -> None:
    """What decides between an engine of its own and a place on the base's."""
    assert is_adapter(adapter_folder(tmp_path / "a", "0" * 64))
    assert not is_adapter(base)
    assert not is_adapter(tmp_path / "nothing")
