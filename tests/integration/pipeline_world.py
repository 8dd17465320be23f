"""A world small enough to distil in seconds: a byte tokenizer, random Qwen3 checkpoints and request logs.

The teacher's answers in the logs are real text of a fixed rule (not of the random teacher), which is all that
the pipeline's mechanics need. Knows nothing about the demo's world.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "refund",
    "order",
    "parcel",
    "invoice",
    "address",
    "broken",
    "late",
    "cancel",
    "upgrade",
    "plan",
    "password",
    "reset",
    "coupon",
    "card",
    "charge",
    "delivery",
    "courier",
    "receipt",
    "balance",
    "ticket",
    "manual",
    "battery",
    "screen",
    "cable",
    "account",
    "region",
    "store",
    "pickup",
]

VOCABULARY = 320


def grade(request: dict[str, Any], text: str) -> bool | None:
    """The grader of this world: an answer is right when it names the first word of the request."""
    return json.loads(json.dumps(request))["messages"][-1]["content"].split()[0] in text


def evaluation(size: int, seed: int = 7) -> list[dict[str, Any]]:
    """Evaluation rows, drawn apart from the logs by their seed."""
    rng = random.Random(f"evaluation-{seed}")
    return [{"request": body(rng)} for _ in range(size)]


def body(rng: random.Random) -> dict[str, Any]:
    """One OpenAI chat request."""
    return {"model": "support", "messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=8))}]}


def log_row(number: int, request: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A request-log row as the router writes it."""
    answer = json.dumps({"about": str(request["messages"][-1]["content"]).split()[0]})
    row = {
        "request_id": f"r{number:05d}",
        "ts": 1_000.0 + number,
        "route": "support",
        "endpoint": "/v1/chat/completions",
        "arm": "stable",
        "served_arm": "stable",
        "reason": "only_arm",
        "unit_kind": "request",
        "unit_hash": "0" * 16,
        "split_version": 1,
        "upstream": "teacher",
        "model": "teacher",
        "stream": False,
        "status": 200,
        "outcome": "ok",
        "finish_reason": "stop",
        "e2e_s": 0.1,
        "overhead_s": 0.001,
        "request": request,
        "response_text": answer,
    }
    return row | changes


def write_logs(folder: Path, rows: int, per_segment: int = 100, seed: int = 1) -> None:
    """Closed segments of rows, and an open one that ends in the middle of a line."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    lines = [json.dumps(log_row(n, body(rng))) for n in range(rows)]
    for start in range(0, rows, per_segment):
        text = "\n".join(lines[start : start + per_segment]) + "\n"
        (folder / f"requests-{start:05d}.jsonl").write_text(text)
    (folder / "requests-99999.open.jsonl").write_text(lines[0] + "\n" + lines[1][:40])


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(special + alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)


def write_model(folder: Path, hidden: int, layers: int, seed: int) -> None:
    """A random Qwen3 checkpoint in bf16 with its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.05,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)


def config_of(root: Path, **changes: Any) -> dict[str, Any]:
    """A job's configuration over this world, as a YAML file would hold it."""
    config: dict[str, Any] = {
        "workdir": str(root / "job"),
        "cache_dir": str(root / "cache"),
        "ray": "local",
        "teacher": str(root / "teacher"),
        "student": str(root / "student"),
        "collect": {"log_dir": str(root / "logs"), "upstreams": ["teacher"], "near_duplicates": 0.9},
        "teach": {"k": 8, "max_tokens": 192, "shard_rows": 64},
        "train": {
            "epochs": 1,
            "batch_rows": 32,
            "micro_tokens": 4096,
            "max_length": 192,
            "checkpoint_steps": 3,
            "log_steps": 1,
        },
        "quantize": {"samples": 16, "max_tokens": 128},
        "evaluate": {
            "dataset": "tests.integration.pipeline_world:evaluation",
            "dataset_args": {"size": 24},
            "grader": "tests.integration.pipeline_world:grade",
            "score_samples": 16,
            "topk": 8,
            "answer_tokens": 24,
            "speed_batch": 8,
            "speed_tokens": 8,
            "engine": {"max_model_len": 256, "kv_cache_bytes": 64 << 20},
        },
        "gates": [
            {"metric": "quantized.perplexity", "relative_to": "student.perplexity", "at_most": 1.5},
        ],
        "publish": {"name": "support-student", "tracking_uri": f"sqlite:///{root / 'registry.db'}"},
        "tracking": {"enabled": False},
    }
    return config | changes


def write_world(root: Path, rows: int = 300) -> Path:
    """Logs, teacher, student and the job's configuration file; returns the file."""
    write_logs(root / "logs", rows)
    write_model(root / "teacher", hidden=256, layers=2, seed=0)
    write_model(root / "student", hidden=128, layers=1, seed=1)
    file = root / "distill.yaml"
    file.write_text(json.dumps(config_of(root)))
    return file
