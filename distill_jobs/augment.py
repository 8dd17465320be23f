"""augment: training samples in, the same and what the teacher added to them out. Off unless configured.

Paraphrases, new requests, hard negatives, and rationales as rows of a second task. Every new sample names the
samples it came from, resembles none that is there already, and none of validation, calibration or held-out at
all. Knows nothing about tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_jobs.augmenting.config import AugmentConfig
from distill_jobs.augmenting.novelty import apart, unlike
from distill_jobs.augmenting.prompts import read_prompt
from distill_jobs.augmenting.rationales import questions as rationale_questions
from distill_jobs.augmenting.rationales import rows as rationale_rows
from distill_jobs.augmenting.variants import Ask, asks, is_plain, new_samples, picked
from distill_jobs.collect import held_out_texts
from distill_jobs.keys import output_file
from distill_jobs.progress import Progress
from distill_jobs.stage import Result
from distill_jobs.teaching.ask import Sampling, Voice

ADDED = (
    ("weight", pa.float32()),
    ("task", pa.string()),
    ("teacher_messages", pa.string()),
    ("origin", pa.list_(pa.string())),
    ("kind", pa.string()),
)
"""Columns beside those of collect. `origin`: digests of the samples it came from; `kind`: how (logged: null).
"""

Sample = dict[str, Any]


def run(
    config: AugmentConfig,
    voice: Voice,
    collected: dict[str, Path],
    held_out: Sequence[Path],
    folder: Path,
    progress: Progress,
) -> Result:
    """Write train.parquet with the new samples after the old ones. What the teacher said is kept in the
    folder, so an interrupted run asks for the rest only.
    """
    table = pq.read_table(collected["train"])
    samples = table.to_pylist()
    counts: Counter[str] = Counter(logged=len(samples))
    made: list[Sample] = []
    if config.paraphrase or config.expand or config.hard_negatives:
        names = [n for n in ("paraphrase", "expand", "hard_negatives") if getattr(config, n) is not None]
        wanted = asks(config, samples, {n: read_prompt(n, config.prompts) for n in names})
        drawn = Sampling(config.answer_tokens, config.temperature, config.top_p)
        texts = voice.ask([a.question for a in wanted], drawn, folder / "variants")
        made = _new(config, wanted, texts, samples, _others(collected, held_out), counts)
    progress.update(1, 2, "kinds of samples")
    rationales = _rationales(config, voice, samples, folder, counts)
    progress.update(2, 2, "kinds of samples")
    path = folder / "train.parquet"
    tasked = [s | {"task": s.get("task") or "answer"} for s in samples]
    _write(path, [*tasked, *made, *rationales], table.schema)
    counts["train"] = len(samples) + len(made) + len(rationales)
    return Result({"train": output_file(path, rows=counts["train"])}, dict(counts))


def _new(
    config: AugmentConfig,
    wanted: Sequence[Ask],
    texts: dict[str, list[str]],
    samples: Sequence[Sample],
    others: list[str],
    counts: Counter[str],
) -> list[Sample]:
    """New samples that resemble nothing that is there, nor each other; drops are counted by kind."""
    said = [s for a in wanted for s in new_samples(a, texts.get(a.question.id, []), config.weight)]
    counts["asked"], counts["written"] = len(wanted), len(said)
    counts["unanswered"] = sum(not texts.get(a.question.id) for a in wanted)
    clean = _kept(said, unlike([s["text"] for s in said], others, config.near_duplicates))
    counts["like_held_out"] = len(said) - len(clean)
    logged = (s["text"] for s in samples)
    new = _kept(clean, unlike([s["text"] for s in clean], logged, config.near_duplicates))
    counts["like_logged"] = len(clean) - len(new)
    new.sort(key=lambda s: str(s["sample_digest"]))
    different = _kept(new, apart([s["text"] for s in new], config.near_duplicates))
    counts["like_each_other"] = len(new) - len(different)
    kept = different if config.max_new is None else different[: config.max_new]
    counts["over_max_new"] = len(different) - len(kept)
    counts.update(s["kind"] for s in kept)
    return kept


def _kept(samples: Sequence[Sample], keep: Sequence[bool]) -> list[Sample]:
    return [s for s, one in zip(samples, keep, strict=True) if one]


def _others(collected: dict[str, Path], held_out: Sequence[Path]) -> list[str]:
    """Normalised texts of everything that training must not see."""
    sides = [collected[name] for name in ("validation", "calibration") if name in collected]
    kept_apart = [
        text for side in sides for text in pq.read_table(side, columns=["text"])["text"].to_pylist()
    ]
    return kept_apart + [text for path in held_out for text in held_out_texts(path)]


def _rationales(
    config: AugmentConfig, voice: Voice, samples: Sequence[Sample], folder: Path, counts: Counter[str]
) -> list[Sample]:
    own = config.rationale
    if own is None:
        return []
    plain = sorted((s for s in samples if is_plain(s)), key=lambda s: str(s["sample_digest"]))
    chosen = picked(plain, own.samples, f"rationale-{config.seed}")
    prompt = read_prompt("rationale", config.prompts)
    student = read_prompt("rationale_student", config.prompts)
    asked = rationale_questions(chosen, prompt, own.marker)
    said = voice.ask(asked, Sampling(config.answer_tokens), folder / "rationales")
    return rationale_rows(own, chosen, said, prompt, student, counts)


def _write(path: Path, rows: Sequence[Sample], schema: pa.Schema) -> None:
    added = [pa.field(name, kind) for name, kind in ADDED if name not in schema.names]
    tmp = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([*schema, *added])), tmp)
    tmp.replace(path)
