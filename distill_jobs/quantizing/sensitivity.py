"""How much a model changes when one unit of its layers alone is quantized. A process of its own (torch).

`python -m distill_jobs.quantizing.sensitivity JOB.json`: {"model", "rows", "samples", "gptq", "units":
[{"layers", "options"}], "out": JSON lines {"unit", "option", "kl"}, "result"}. Lines of an earlier run are
kept. KL(bf16 || quantized), mean over all positions, in nats. 4 bits are rounded as the artifact will be:
where its columns make up for each other (GPTQ), rounding to nearest would rank the options wrongly. Knows
nothing about budgets.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from contracts.config import write_atomic
from distill_jobs.lines import open_to_append, stream_lines
from distill_jobs.quantizing.mixed import OPTIONS, Option
from distill_jobs.quantizing.rounding import fake_quantize, round_tokens
from distill_jobs.shrink.surgeon import on_grid
from distill_jobs.training.rounding import Grid
from distill_jobs.worker_process import die_with_parent

Moments = dict[str, Tensor]
"""Layer's name → (in, in) second moments of its input."""
_CHUNK = 256
"""Positions whose full-vocabulary logits exist at a time."""


def main(job_file: str) -> None:
    """Measure what is not measured yet, the result file last."""
    die_with_parent()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval()
    rows = [
        torch.tensor([r["ids"]])
        for r, _ in zip(stream_lines(Path(job["rows"])), range(job["samples"]), strict=False)
    ]
    out = Path(job["out"])
    options = {option.name: option for option in OPTIONS}
    work = [(n, name) for n, unit in enumerate(job["units"]) for name in unit["options"]]
    with torch.inference_mode(), open_to_append(out) as sink:
        reference = [hidden_states(model, row) for row in rows]
        done = {(r["unit"], r["option"]) for r in stream_lines(out)}
        inputs: tuple[int, Moments] = (-1, {})
        for at, (unit, name) in enumerate(work):
            if (unit, name) not in done:
                layers = job["units"][unit]["layers"]
                if job["gptq"] and inputs[0] != unit:
                    inputs = unit, moments(model, layers, rows)
                with quantized(model, layers, options[name], inputs[1]):
                    kl = divergence(model, rows, reference)
                sink.write(json.dumps({"unit": unit, "option": name, "kl": kl}) + "\n")
                sink.flush()
            print(f"PROGRESS {at + 1} {len(work)} sensitivities", flush=True)
    write_atomic(Path(job["result"]), json.dumps({"measured": len(work)}) + "\n")


def moments(model: Any, layers: list[str], rows: list[Tensor]) -> Moments:
    """Of the layers' inputs, over all positions. Layers of a unit read the same, so it is kept once."""
    seen: list[Tensor] = []

    def watch(_: Any, inputs: tuple[Tensor, ...]) -> None:
        given = inputs[0].flatten(0, -2).float()
        seen[:] = [given.T @ given + (seen[0] if seen else 0.0)]

    hook = model.get_submodule(layers[0]).register_forward_pre_hook(watch)
    try:
        for row in rows:
            hidden_states(model, row)
    finally:
        hook.remove()
    return dict.fromkeys(layers, seen[0])


@contextmanager
def quantized(model: Any, layers: list[str], option: Option, inputs: Moments) -> Iterator[None]:
    """The model with these layers, and no others, at a precision; by GPTQ where the moments are known."""
    modules = {name: model.get_submodule(name) for name in layers}
    kept = {name: module.weight.data for name, module in modules.items()}
    hooks = []
    for name, module in modules.items():
        module.weight.data = _changed(kept[name], option, inputs.get(name))
        if option.scheme == "W8A8":
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: (round_tokens(inputs[0]),)))
    try:
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = kept[name]
        for hook in hooks:
            hook.remove()


def _changed(weight: Tensor, option: Option, inputs: Tensor | None) -> Tensor:
    """(out, in) weights as the option stores them."""
    if option.scheme == "W8A8" or inputs is None:
        return fake_quantize(weight, 8 if option.scheme == "W8A8" else 4, option.group_size or None)
    grid = Grid(4, option.group_size or weight.shape[1], True)
    return on_grid(weight, inputs, grid).to(weight.dtype)


def divergence(model: Any, rows: list[Tensor], reference: list[Tensor]) -> float:
    """Mean KL from the reference's last hidden states; logits are made a chunk of positions at a time."""
    total, positions, head = 0.0, 0, model.get_output_embeddings()
    for row, before in zip(rows, reference, strict=True):
        after = hidden_states(model, row)
        for one, other in zip(before[0].split(_CHUNK), after[0].split(_CHUNK), strict=True):
            p = head(one).float().log_softmax(-1)
            q = head(other).float().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
        positions += row.shape[1]
    return total / positions


def hidden_states(model: Any, row: Tensor) -> Tensor:
    """What the output embeddings read, [1, positions, hidden]."""
    found: Tensor = model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state
    return found


if __name__ == "__main__":
    main(sys.argv[1])
