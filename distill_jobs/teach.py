"""teach: samples in, the teacher's token ids and top-k log-probabilities out, one parquet part at a time.

The text is the logged answer when the teacher wrote it, else the teacher answers offline. Part files hold
sample_digest, input_ids (prompt + completion with its end), prompt_len, and row-major [completion, k] arrays
topk_ids and topk_logprobs: position j is the distribution that predicts input_ids[prompt_len + j], natural
log, untempered. `manifest.json` beside them says k, teacher digest and vocabulary size. Knows nothing about
students.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.config import write_atomic
from contracts.errors import ConfigError, DataError
from distill_jobs.config import EngineConfig, TeachConfig
from distill_jobs.engine import read_lines, run_engine, write_lines
from distill_jobs.keys import output_file
from distill_jobs.progress import Progress
from distill_jobs.stage import Result
from distill_jobs.tokens import ChatTokenizer

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "validation")

SCHEMA = pa.schema(
    [
        ("sample_digest", pa.string()),
        ("token_digest", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_len", pa.int32()),
        ("topk_ids", pa.list_(pa.int32())),
        ("topk_logprobs", pa.list_(pa.float16())),
    ]
)

Answerer = Callable[[dict[str, Any], EngineConfig], dict[str, Any]]


def run(
    config: TeachConfig,
    engine: EngineConfig,
    teacher: Path,
    teacher_digest: str,
    collected: dict[str, Path],
    folder: Path,
    progress: Progress,
    say: Callable[[str], None] = print,
    answer: Answerer = run_engine,
) -> Result:
    """Fill the cache for every split, going on after the parts that are there already."""
    tokenizer = ChatTokenizer(str(teacher))
    counts: Counter[str] = Counter()
    rows: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        samples = pq.read_table(collected[split]).to_pylist()
        _fill_answers(samples, config, engine, teacher, folder / "answers" / split, tokenizer, counts, answer)
        rows[split] = _tokenise(samples, config, tokenizer, counts)
    if not rows["train"]:
        raise DataError(f"No training sample fits into teach.max_tokens = {config.max_tokens}. Raise it.")
    positions = sum(len(r["input_ids"]) - r["prompt_len"] for split in rows.values() for r in split)
    say(cache_size(positions, config.k, sum(len(r) for r in rows.values())))
    scorer = TeacherScorer(teacher, config, tokenizer.pad)
    plan = [(split, i) for split in SPLITS for i in range(0, len(rows[split]), config.shard_rows)]
    for done, (split, start) in enumerate(plan, start=1):
        part = folder / split / f"part-{start // config.shard_rows:05d}.parquet"
        batch = rows[split][start : start + config.shard_rows]
        if not _is_complete(part, batch):
            _write_part(part, batch, scorer.score(batch))
        progress.update(done, len(plan), "shards")
    outputs = {}
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
        about = {
            "k": config.k,
            "teacher_digest": teacher_digest,
            "vocab_size": scorer.vocab_size,
            "rows": len(rows[split]),
        }
        write_atomic(folder / split / "manifest.json", json.dumps(about, indent=1) + "\n")
        outputs[split] = output_file(folder / split, rows=len(rows[split]))
        counts[split] = len(rows[split])
    counts["positions"] = positions
    return Result(outputs, dict(counts))


def cache_size(positions: int, k: int, rows: int) -> str:
    """One line about what the cache will take: 4 bytes an id, 2 a log-probability."""
    megabytes = positions * k * 6 / 1e6
    return f"teach: {rows} samples, {positions} positions x top {k}: the cache takes about {megabytes:.1f} MB"


def _fill_answers(
    samples: list[dict[str, Any]],
    config: TeachConfig,
    engine: EngineConfig,
    teacher: Path,
    out: Path,
    tokenizer: ChatTokenizer,
    counts: Counter[str],
    answer: Answerer,
) -> None:
    """The teacher answers offline what it did not answer in the logs; unfinished answers stay None."""
    prompts = [
        {"id": s["sample_digest"], "ids": tokenizer.prompt(s["request"], s["messages"])}
        for s in samples
        if s["answer"] is None
    ]
    room = engine.max_model_len - config.answer_tokens
    if prompts and room <= 0:
        raise ConfigError(
            f"teach.answer_tokens = {config.answer_tokens} leaves no room for a prompt in"
            f" evaluate.engine.max_model_len = {engine.max_model_len}. Lower the one or raise the other."
        )
    prompts = [p for p in prompts if len(p["ids"]) <= room]
    if not prompts:
        return
    write_lines(out / "prompts.jsonl", prompts)
    job = {"prompts": str(out / "prompts.jsonl"), "max_tokens": config.answer_tokens}
    answer({"model": str(teacher), "out": str(out), "answer": job}, engine)
    written = {r["id"]: r["text"] for r in read_lines(out / "answers.jsonl") if r["finish_reason"] == "stop"}
    for sample in samples:
        if sample["answer"] is None and sample["sample_digest"] in written:
            sample["answer"] = written[sample["sample_digest"]]
            counts["answered_offline"] += 1


def _tokenise(
    samples: list[dict[str, Any]], config: TeachConfig, tokenizer: ChatTokenizer, counts: Counter[str]
) -> list[dict[str, Any]]:
    """Rows of token ids, sorted by length so that a batch pads little; the same samples give the same
    order.
    """
    rows = []
    for sample in samples:
        if sample["answer"] is None:
            counts["no_teacher_answer"] += 1
            continue
        prompt = tokenizer.prompt(sample["request"], sample["messages"])
        ids = prompt + tokenizer.answer(sample["answer"])
        if len(ids) > config.max_tokens:
            counts["too_many_tokens"] += 1
            continue
        token_digest = hashlib.sha256(np.asarray(ids, dtype=np.int32).tobytes()).hexdigest()
        digest = sample["sample_digest"]
        rows.append(
            {
                "sample_digest": digest,
                "token_digest": token_digest,
                "input_ids": ids,
                "prompt_len": len(prompt),
            }
        )
    return sorted(rows, key=lambda r: (len(r["input_ids"]), r["sample_digest"]))


def _is_complete(part: Path, rows: list[dict[str, Any]]) -> bool:
    """True when a part of an earlier run holds exactly these samples and token ids (parts appear
    atomically).
    """
    if not part.is_file():
        return False
    table = pq.read_table(part, columns=["sample_digest", "token_digest"])
    have = list(zip(table["sample_digest"].to_pylist(), table["token_digest"].to_pylist(), strict=True))
    return have == [(r["sample_digest"], r["token_digest"]) for r in rows]


def _write_part(part: Path, rows: list[dict[str, Any]], scores: list[tuple[np.ndarray, np.ndarray]]) -> None:
    full = [
        row | {"topk_ids": ids.reshape(-1), "topk_logprobs": logprobs.reshape(-1)}
        for row, (ids, logprobs) in zip(rows, scores, strict=True)
    ]
    part.parent.mkdir(parents=True, exist_ok=True)
    tmp = part.with_name(f".{part.name}.tmp")
    pq.write_table(pa.Table.from_pylist(full, schema=SCHEMA), tmp)
    tmp.replace(part)


class TeacherScorer:
    """The teacher as a Hugging Face model; top-k log-softmax (fp32) at the completion positions."""

    def __init__(self, folder: Path, config: TeachConfig, pad: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(config.threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.dtype))
        self._model = model.to(self._device).eval()
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self._k = min(config.k, self.vocab_size)
        if self._k < config.k:
            raise DataError(
                f"teach.k = {config.k} is more than the teacher's vocabulary of {self.vocab_size}."
            )
        self._batch_tokens = config.batch_tokens
        self._pad = pad

    def score(self, rows: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, log-probabilities), each [completion, k], of every row; rows come sorted by length."""
        import torch

        scored: list[tuple[np.ndarray, np.ndarray]] = []
        with torch.inference_mode():
            start = 0
            while start < len(rows):
                stop = start + 1
                while (
                    stop < len(rows)
                    and len(rows[stop]["input_ids"]) * (stop - start + 1) <= self._batch_tokens
                ):
                    stop += 1
                scored += self._batch(rows[start:stop])
                start = stop
        return scored

    def _batch(self, rows: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
        import torch

        width = max(len(r["input_ids"]) for r in rows)
        ids = torch.full((len(rows), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[i, : len(row["input_ids"])] = 1
        # The prompt's logits are nobody's business: the head runs from the first completion's predecessor on.
        first = min(r["prompt_len"] for r in rows) - 1
        keep = torch.arange(first, width - 1, device=self._device)
        logits = self._model(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            logits_to_keep=keep,
            use_cache=False,
        ).logits
        return [
            self._top(logits[i], r["prompt_len"] - 1 - first, len(r["input_ids"]) - 1 - first)
            for i, r in enumerate(rows)
        ]

    def _top(self, logits: torch.Tensor, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        top = logits[start:stop].float().log_softmax(-1).topk(self._k, dim=-1)
        return top.indices.to("cpu").numpy().astype(np.int32), top.values.to("cpu").numpy().astype(np.float16)
