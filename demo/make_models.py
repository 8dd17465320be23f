"""Makes the demo's models from nothing but the demo's world: tokenizer, teacher, student base, a broken
student.

Everything is trained by the project's own loop. Each model ships with MODEL.json: the command, seed and
digest that reproduce it. Long stages checkpoint and continue when they are started again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from contracts.errors import DataError
from demo import base_text
from demo.base_text import base_pair
from demo.make_tokenizer import save_tokenizer
from demo.world import TOOLS, canonical, case
from distill_jobs.training.attention import register
from distill_jobs.training.config import LossConfig, OptimizerConfig, ShapeConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer, writing
from distill_jobs.training.models import from_shape, save_model

MODELS = Path(__file__).parent / "models"
TOKENIZER = MODELS / "tokenizer"
SEED = 20261120
TEACHER_LAYERS, SHALLOW_LAYERS = 16, 4

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def answered_cases(split: str, first: int = 0) -> Callable[[int], tuple[str, str]]:
    """The world's requests with their right answers."""

    def pair(number: int) -> tuple[str, str]:
        one = case(split, first + number)
        return one.text, canonical(one.answer)

    return pair


def write_rows(
    folder: Path, tokenizer: PreTrainedTokenizerBase, pair: Callable[[int], tuple[str, str]], count: int
) -> None:
    """Training rows in the format of `distill_jobs.training.data.Rows` (no teacher logits), unless they are
    there."""
    if (folder / "part-00000.parquet").exists():
        return
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
    with writing(folder) as temporary:
        for part, start in enumerate(
            tqdm(range(0, count, 20_000), desc=f"rows of {folder.name}", unit="part")
        ):
            pairs = [pair(number) for number in range(start, min(start + 20_000, count))]
            asked = tokenizer([text for text, _ in pairs])["input_ids"]
            answered = tokenizer([answer for _, answer in pairs])["input_ids"]
            ids = [[user, *q, assistant, *a, end] for q, a in zip(asked, answered, strict=True)]
            table = pa.table(
                {
                    "input_ids": pa.array(ids, pa.list_(pa.int32())),
                    "prompt_len": pa.array([len(q) + 2 for q in asked], pa.int32()),
                }
            )
            pq.write_table(table, temporary / f"part-{part:05d}.parquet")


def forced_accuracy(model: Any, rows: Rows, batch: int = 256) -> float:
    """Share of rows whose every answer token is the model's first choice: what greedy decoding would get
    right."""
    right = 0
    model.eval()
    order = np.argsort(rows.lengths)
    with torch.no_grad():
        for start in range(0, len(order), batch):
            one = rows.micro_batch(order[start : start + batch], with_prompt=False)
            hidden = model.get_decoder()(input_ids=one.input_ids, use_cache=False).last_hidden_state
            guess = (hidden[one.rows, one.columns] @ model.get_output_embeddings().weight.T).argmax(-1)
            wrong = set(one.rows[guess != one.labels].tolist())
            right += len(one.input_ids) - len(wrong)
    model.train()
    return right / len(order)


def grow(shallow: Any, layers: int) -> Any:
    """A deeper model that computes the same function: every block is followed by copies whose outputs start
    at zero."""
    config = copy.deepcopy(shallow.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * layers
    deep = type(shallow)(config).to(next(shallow.parameters()).dtype)
    state = {name: tensor for name, tensor in shallow.state_dict().items() if ".layers." not in name}
    deep.load_state_dict(state, strict=False)
    old = shallow.model.layers
    each = layers // len(old)
    for place, block in enumerate(deep.model.layers):
        block.load_state_dict(old[min(place // each, len(old) - 1)].state_dict())
        if place % each:
            nn.init.zeros_(block.self_attn.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)
    return deep


def train_stage(
    model: Any,
    config: TrainConfig,
    rows: Rows,
    state: Path,
    on_step: Callable[[Trainer, dict[str, float]], None],
) -> Trainer:
    """Run the loop with checkpoints in `state`; continues where an earlier run of the stage ended."""
    model.set_attn_implementation(register())
    trainer = Trainer(model, rows, config)
    if config.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)
    if (state / "state.pt").exists():
        trainer.load(state)
    bar = tqdm(
        total=trainer.steps, initial=trainer.position.step, desc=config.name, unit="step", mininterval=5
    )
    for metrics in trainer.run():
        bar.update(1)
        if metrics["step"] % 20 == 0:
            bar.set_postfix_str(
                f"ce {metrics['ce']:.4f}, {metrics['tokens'] / metrics['seconds']:.0f} tokens/s",
                refresh=False,
            )
        if metrics["step"] % config.checkpoint_steps == 0 or metrics["step"] == metrics["steps"]:
            trainer.save(state)
        on_step(trainer, metrics)
    bar.close()
    return trainer


def digest(folder: Path) -> str:
    """sha256 over the names and contents of a model folder's files, MODEL.json apart."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name != "MODEL.json":
            total.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    (folder / "MODEL.json").write_text(
        json.dumps({**card, "digest": digest(folder)}, indent=2) + "\n", encoding="utf-8"
    )


def _stage_config(
    name: str, shape: ShapeConfig, lr: float, decay: float, seed: int, prompt_weight: float = 0.0
) -> TrainConfig:
    return TrainConfig(
        name=name,
        seed=seed,
        epochs=1,
        batch_rows=64,
        micro_tokens=16384,
        bucket_window=4,
        shape=shape,
        loss=LossConfig(kd_weight=0, hard_weight=1, prompt_weight=prompt_weight),
        compile=True,
        checkpoint_steps=50,
        optimizer=OptimizerConfig(kind="muon", lr=lr, decay=decay, warmup=0.02),
    )


@app.command()
def tokenizer() -> None:
    """Train the tokenizer."""
    save_tokenizer(TOKENIZER)


Export = Callable[[Trainer, dict[str, float]], None]


def _teacher_exports(out: Path, held_out: Rows, rows: dict[str, int]) -> Callable[[str, int, int], Export]:
    """What a stage of the teacher writes every `steps` steps: the model so far at its full depth, and its
    card."""

    def stage(name: str, steps: int, tokens_before: int) -> Export:
        def export(trainer: Trainer, metrics: dict[str, float]) -> None:
            if metrics["step"] % steps and metrics["step"] != metrics["steps"]:
                return
            accuracy = forced_accuracy(trainer.model, held_out)
            deep = grow(trainer.model, TEACHER_LAYERS)
            save_model(deep, str(TOKENIZER), out)
            card = {
                "name": "teacher",
                "command": "python -m demo.make_models teacher",
                "seed": SEED,
                "stage": name,
                "step": metrics["step"],
                "params": sum(p.numel() for p in deep.parameters()),
                "tokens_seen": tokens_before + metrics["tokens"],
                "rows": rows,
                "evaluation_accuracy_forced": accuracy,
            }
            _write_card(out, card)
            tqdm.write(f"{name} step {metrics['step']}: evaluation accuracy {accuracy:.4f}")

        return export

    return stage


@app.command()
def teacher(
    shallow_rows: int = 96_000,
    deep_rows: int = 19_200,
    work: Path = Path("runs/make-models"),
    threads: int = 1,
    lr: float = 3e-3,
    deep_lr: float = 1.5e-3,
    out: Path = MODELS / "teacher",
) -> None:
    """Train the teacher: four blocks first, then grown to sixteen without changing what it computes, then
    all of it."""
    torch.set_num_threads(threads)
    tok = AutoTokenizer.from_pretrained(TOKENIZER)
    write_rows(work / "teacher-rows-a", tok, answered_cases("teacher"), shallow_rows)
    write_rows(work / "teacher-rows-b", tok, answered_cases("teacher", shallow_rows), deep_rows)
    write_rows(work / "evaluation-rows", tok, answered_cases("evaluation"), 1024)
    shape = ShapeConfig(
        tokenizer=str(TOKENIZER),
        hidden_size=320,
        layers=SHALLOW_LAYERS,
        heads=6,
        kv_heads=2,
        intermediate_size=960,
    )
    held_out = Rows(work / "evaluation-rows", 1024, with_teacher=False)
    exports = _teacher_exports(out, held_out, {"shallow": shallow_rows, "deep": deep_rows})
    first = _stage_config("teacher, 4 blocks", shape, lr, 0.4, SEED)
    done = train_stage(
        from_shape(shape, SEED),
        first,
        Rows(work / "teacher-rows-a", 1024, False),
        work / "state-a",
        exports("shallow", 250, 0),
    )
    second = _stage_config("teacher, 16 blocks", shape, deep_lr, 0.8, SEED + 1)
    train_stage(
        grow(done.model, TEACHER_LAYERS).float(),
        second,
        Rows(work / "teacher-rows-b", 1024, False),
        work / "state-b",
        exports("deep", 100, done.position.tokens),
    )


@app.command()
def student_base(
    rows: int = 128_000,
    work: Path = Path("runs/make-models"),
    threads: int = 1,
    lr: float = 3e-3,
    out: Path = MODELS / "student-base",
) -> None:
    """Pre-train the student's base on requests without answers (see `base_text`): it can copy, it knows no
    tool."""
    torch.set_num_threads(threads)
    tok = AutoTokenizer.from_pretrained(TOKENIZER)
    write_rows(work / "base-rows", tok, base_pair, rows)
    write_rows(work / "evaluation-rows", tok, answered_cases("evaluation"), 1024)
    shape = ShapeConfig(tokenizer=str(TOKENIZER))
    config = _stage_config("student base", shape, lr, 0.6, SEED, prompt_weight=0.2)

    def export(trainer: Trainer, metrics: dict[str, float]) -> None:
        if metrics["step"] % 250 and metrics["step"] != metrics["steps"]:
            return
        save_model(trainer.model, str(TOKENIZER), out)
        accuracy = forced_accuracy(trainer.model, Rows(work / "evaluation-rows", 1024, False))
        _write_card(
            out,
            {
                "name": "student-base",
                "command": "python -m demo.make_models student-base",
                "seed": SEED,
                "params": sum(p.numel() for p in trainer.model.parameters()),
                "rows": rows,
                "step": metrics["step"],
                "steps": metrics["steps"],
                "tokens_seen": metrics["tokens"],
                "seconds": round(metrics["seconds"]),
                "has_seen": base_text.__doc__,
                "evaluation_accuracy_forced": accuracy,
            },
        )
        tqdm.write(f"step {metrics['step']}: ce {metrics['ce']:.4f}, task accuracy {accuracy:.4f}")

    train_stage(
        from_shape(shape, SEED), config, Rows(work / "base-rows", 1024, False), work / "state-base", export
    )


@app.command()
def broken(
    source: Annotated[Path, typer.Option(help="A student's folder, bf16 or quantized.")],
    out: Annotated[Path, typer.Option(help="Folder to write the damaged copy to.")],
) -> None:
    """Damage a student so that it answers fluently and wrongly: the rows of its tool names change places.

    The answers stay valid JSON, end as before and carry the right values, for the wrong tool.
    """
    tok = AutoTokenizer.from_pretrained(source)
    pieces = [tok(name, add_special_tokens=False)["input_ids"] for name in TOOLS]
    names = [one[0] for one in pieces if len(one) == 1]
    if len(names) < len(TOOLS) / 2:
        raise DataError(
            f"{source}: its tokenizer splits most tool names; broken works with the demo's tokenizer."
        )
    with writing(out) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        for file in temporary.glob("*.safetensors"):
            tensors = load_file(file)
            for key in ("model.embed_tokens.weight", "lm_head.weight"):
                if key in tensors:
                    tensors[key][names] = tensors[key][names[1:] + names[:1]]
            save_file(tensors, file, metadata={"format": "pt"})


if __name__ == "__main__":
    app()
