"""An adapter's folder: the base that it is for, and whether its files are whole.

peft's folder says its base by a name that anybody may reuse, so ours also holds `adapter_base.json` with the
base's digest. Its files are checked by their headers, in milliseconds; only `folders_of` reads a base. Knows
nothing about torch or vLLM.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from contracts.config import write_atomic
from contracts.errors import DataError
from contracts.model import AdapterBase
from registry.digest import digest_folder

BASE_FILE = "adapter_base.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
"""The bound of the safetensors format."""
_HEADS = {"lm_head", "embed_tokens"}
"""Layers over the vocabulary: vLLM's head with adapters ends the engine at one prompt_logprobs, see
serve.engine.lora."""


def is_adapter(folder: Path) -> bool:
    """True for the folder of an adapter: it has an adapter's configuration and no model's."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def write_base(folder: Path, base: AdapterBase) -> None:
    """Say in an adapter's folder which base it is for."""
    write_atomic(folder / BASE_FILE, base.model_dump_json(indent=1) + "\n")


def read_adapter(folder: Path) -> AdapterBase:
    """The base of an adapter whose files are whole.

    Raises: DataError naming the file and what is wrong with it: missing, truncated, not LoRA, another rank.
    """
    said = _json(folder / BASE_FILE, "train the adapter again with train.lora.export: adapter")
    try:
        base = AdapterBase.model_validate(said)
    except ValidationError as err:
        raise DataError(f"{folder / BASE_FILE} does not say the adapter's base: {err}") from err
    config = _json(folder / CONFIG_FILE, "copy the adapter's folder again")
    if config.get("peft_type") != "LORA":
        raise DataError(
            f"{folder / CONFIG_FILE}: peft_type is {config.get('peft_type')!r}; only LORA is served."
        )
    if config.get("r") != base.rank:
        raise DataError(f"{folder}: {CONFIG_FILE} says rank {config.get('r')!r} and {BASE_FILE} {base.rank}.")
    if heads := sorted(_HEADS & layers_of(folder)):
        raise DataError(f"{folder / WEIGHTS_FILE} changes {heads}, which is not served: adapt other layers.")
    return base


def folders_of(folder: Path) -> tuple[Path, ...]:
    """What an engine needs of a model: its checkpoint, and for an adapter the base's and then its own.

    Raises: DataError when the files are not whole, or the base is not the one that the adapter names.
    """
    if not is_adapter(folder):
        return (folder,)
    said = read_adapter(folder)
    base = Path(said.ref)
    if not base.is_dir():
        raise DataError(f"{folder} is an adapter of {base}, which is no folder here; put its base there.")
    if (found := digest_folder(base)) != said.digest:
        raise DataError(
            f"{folder} is an adapter of {base} with digest {said.digest[:12]}, and {base} has {found[:12]}."
        )
    return base, folder


def _json(file: Path, fix: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise DataError(f"{file} is missing; {fix}.") from err
    except (OSError, ValueError) as err:
        raise DataError(f"{file} cannot be read ({err}); {fix}.") from err
    if not isinstance(found, dict):
        raise DataError(f"{file} is not a JSON object; {fix}.")
    return found


def layers_of(folder: Path) -> set[str]:
    """The layers that an adapter changes, by the last part of their names.

    Raises: DataError when the weights' file is not whole; its header names the bytes that must follow.
    """
    file = folder / WEIGHTS_FILE
    try:
        size = file.stat().st_size
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(source.read(length))
        ends = [int(t["data_offsets"][1]) for name, t in header.items() if name != "__metadata__"]
    except FileNotFoundError as err:
        raise DataError(f"{file} is missing; copy the adapter's folder again.") from err
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as err:
        raise DataError(f"{file} is damaged ({err}); copy the adapter's folder again.") from err
    if not ends:
        raise DataError(f"{file} holds no weights; train the adapter again.")
    whole = 8 + length + max(ends)
    if size != whole:
        raise DataError(f"{file} has {size} bytes, not its {whole}; copy the adapter's folder again.")
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in header if ".lora_" in name}
