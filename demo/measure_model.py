"""Measures a model of the demo through vLLM and notes the result in its MODEL.json: `python -m
demo.measure_model FOLDER`.

Greedy decoding on evaluation requests, judged by the world's exact match. It knows nothing of training.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from contracts.config import write_atomic
from demo.world import canonical, case, exact_match

#: Evaluation cases from here on; lower ones are used while training, to watch it.
FIRST_CASE = 100_000
MAX_TOKENS = 96


def measure(folder: Path, count: int) -> dict[str, object]:
    """Accuracy and offline tokens per second of one model."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams  # reads the environment when it is imported

    cases = [case("evaluation", FIRST_CASE + number) for number in range(count)]
    asked: list[Any] = [[{"role": "user", "content": one.text}] for one in cases]
    engine = LLM(str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=64)
    started = time.monotonic()
    answers = engine.chat(asked, SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
    seconds = time.monotonic() - started
    texts = [one.outputs[0].text for one in answers]
    right = [exact_match(text, one.answer) for text, one in zip(texts, cases, strict=True)]
    for text, one, ok in zip(texts, cases, right, strict=True):
        if not ok:
            typer.echo(f"{one.id}  {one.text}\n  wanted {canonical(one.answer)}\n  got    {text}", err=True)
    return {
        "accuracy": sum(right) / count,
        "requests": count,
        "first_case": cases[0].id,
        "tokens_per_s": round(sum(len(one.outputs[0].token_ids) for one in answers) / seconds),
        "how": f"vLLM, bf16, greedy, max_tokens {MAX_TOKENS}, 64 sequences at a time",
    }


def main(
    folder: Annotated[Path, typer.Argument(help="A model's folder.")],
    count: Annotated[int, typer.Option(min=1, help="Evaluation requests to ask.")] = 1024,
) -> None:
    """Ask the model evaluation requests through vLLM; write the result into its MODEL.json when it has
    one."""
    result = measure(folder, count)
    typer.echo(json.dumps(result, indent=2))
    card = folder / "MODEL.json"
    if card.exists():
        known = json.loads(card.read_text(encoding="utf-8"))
        write_atomic(card, json.dumps({**known, "evaluation_vllm": result}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
