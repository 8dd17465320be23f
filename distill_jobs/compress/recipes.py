"""The job's words as llm-compressor's modifiers. Runs inside the compression environment.

Imports nothing of this repository. Knows nothing about data, files or which scheme is good.
"""

from __future__ import annotations

from typing import Any

PRESETS = {"W8A8_ASYM": "W8A8", "W8A8_STATIC": "W8A8"}
# pack-quantized is what vLLM's weight-only kernels read; its W4A8 and W8A8 kernels want one int8 a weight.
FORMATS = {"W4A8": "int-quantized", "FP8_DYNAMIC": "float-quantized"}


def modifiers(job: dict[str, Any]) -> list[Any]:
    """The job's algorithm over its layers."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    settings = {"config_groups": config_groups(job), "ignore": job["ignore"]}
    if job["algorithm"] == "gptq":
        return [GPTQModifier(**settings)]
    return [*_before(job), QuantizationModifier(**settings)]


def _before(job: dict[str, Any]) -> list[Any]:
    """What changes the model, not its function, so that it rounds better."""
    if job["algorithm"] == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier()]
    if job["algorithm"] == "smoothquant":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        return [SmoothQuantModifier(smoothing_strength=0.5, ignore=job["ignore"])]
    return []


def needs_data(job: dict[str, Any]) -> bool:
    """Whether anything is calibrated: rounding weights to nearest needs no data."""
    return job["algorithm"] != "rtn" or job["scheme"] == "W8A8_STATIC"


def config_groups(job: dict[str, Any]) -> dict[str, Any]:
    """One scheme for all linear layers, or a group of layers for each of a plan's choices."""
    if job["scheme"] != "MIXED":
        return {"group_0": _scheme(job["scheme"], ["Linear"], job["shares"], job["group_size"])}
    groups = {}
    for number, part in enumerate(p for p in job["plan"] if p["scheme"] != "BF16"):
        groups[f"group_{number}"] = _scheme(
            part["scheme"], part["layers"], part["shares"], part["group_size"]
        )
    return groups


def _scheme(name: str, layers: list[str], shares: str, group_size: int) -> Any:
    from compressed_tensors.quantization import QuantizationStrategy, preset_name_to_scheme

    scheme = preset_name_to_scheme(PRESETS.get(name, name), layers)
    weights = scheme.weights
    weights.strategy = QuantizationStrategy(shares)
    weights.group_size = group_size if shares == "group" else None
    scheme.format = FORMATS.get(
        name, "pack-quantized" if scheme.input_activations is None else "int-quantized"
    )
    if name == "W8A8_ASYM":
        scheme.input_activations.symmetric = False
    elif name == "W8A8_STATIC":
        inputs = scheme.input_activations
        inputs.strategy, inputs.dynamic, inputs.observer = QuantizationStrategy.TENSOR, False, "static_minmax"
    return scheme
