"""A few steps of TRL's GKDTrainer or DistillationTrainer on given rows. Runs in the peers' environment.

`python peer_trainer.py SPEC.json` prints tokens, seconds and peak memory as JSON. Imports nothing of
Stillhouse. DistillationTrainer always writes the answers itself; with `"own_answers": false` its generation
is replaced by the rows' answers, so that only its training step is measured.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak() -> int:
    """Most bytes held at once: of the device where there is one, else of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")


class Clock(TrainerCallback):
    """The time and the tokens seen at the end of every step."""

    def __init__(self) -> None:
        self.tokens = 0
        self.ends: list[tuple[float, int]] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), self.tokens))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class Gkd(GKDTrainer):
    """GKDTrainer that counts the tokens it is given."""

    clock: Clock

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.clock.tokens += int(inputs["attention_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


class Distillation(DistillationTrainer):
    """DistillationTrainer that counts the tokens, and may take its completions from the rows."""

    clock: Clock
    given: dict[str, dict[str, Any]] | None

    def _generate(self, prompts: list[Any]) -> Any:
        if self.given is None:
            return super()._generate(prompts)
        rows = [self.given[prompt[-1]["content"]] for prompt in prompts]
        prompt_ids = [row["input_ids"][: row["prompt_len"]] for row in rows]
        answers = [row["input_ids"][row["prompt_len"] :] for row in rows]
        return prompt_ids, answers, None, None, None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.clock.tokens += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


def trainer(spec: dict[str, Any], rows: list[dict[str, Any]], folder: str, clock: Clock) -> Any:
    """The trainer that the specification names."""
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": spec["batch"],
        "max_steps": spec["steps"],
        "learning_rate": spec["lr"],
        "beta": spec["beta"],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": spec["dtype"] == "bfloat16",
        "gradient_checkpointing": spec["checkpointing"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(spec[k], dtype=torch.float32) for k in ("student", "teacher")
    )
    if spec["dtype"] == "bfloat16":
        teacher = teacher.to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(spec["student"], padding_side="left")
    made: Any
    if spec["trainer"] == "gkd":
        data = [
            {
                "prompt": tokenizer.decode(row["input_ids"][: row["prompt_len"]]),
                "input_ids": row["input_ids"],
                "completion_mask": [int(i >= row["prompt_len"]) for i in range(len(row["input_ids"]))],
            }
            for row in rows
        ]
        config = GKDConfig(**common, lmbda=0.0, max_length=spec["max_length"])
        made = Gkd(
            student, teacher, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
    else:
        data = [{"prompt": row["messages"]} for row in rows]
        config = DistillationConfig(
            **common, max_completion_length=spec["max_new_tokens"], temperature=1.0, log_completions=False
        )
        made = Distillation(
            student, teacher, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
        given = {row["messages"][-1]["content"]: row for row in rows}
        made.given = None if spec["own_answers"] else given
    made.clock = clock
    made.add_callback(clock)
    return made


def main() -> None:
    """Train and print the figures."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    clock = Clock()
    for name in spec["imports"]:  # libraries are no part of what is counted
        importlib.import_module(name)
    Path("/proc/self/clear_refs").write_text("5")
    held = 0 if torch.cuda.is_available() else resident("VmRSS")
    with tempfile.TemporaryDirectory(prefix="stillhouse-trl-") as folder:
        trainer(spec, rows, folder, clock).train()
    (start, before), (end, after) = clock.ends[spec["skip"] - 1], clock.ends[-1]
    print(
        json.dumps(
            {
                "tokens": after - before,
                "seconds": end - start,
                "peak_bytes": peak() - held,
                "losses": clock.losses,
            }
        )
    )


if __name__ == "__main__":
    main()
