"""teach: samples in, what the teacher writes out, one parquet part at a time.

The text is the logged answer when the teacher wrote it, else the teacher answers offline. What it thinks at
every position of the completion (top-k or sampled log-probabilities, hidden states) goes into part files,
whose columns are in teaching/parts.py; `manifest.json` beside them says scheme, k, teacher and vocabulary
size. Knows nothing about students.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from contracts.config import write_atomic
from contracts.dataset import OutputFile
from contracts.errors import DataError
from contracts.plugins import load_function
from distill_jobs.config import EngineConfig
from distill_jobs.engine import run_engine
from distill_jobs.keys import output_file, sha256_of
from distill_jobs.progress import Progress
from distill_jobs.stage import Result
from distill_jobs.teaching.answers import Texts, fill_answers, sampling_of
from distill_jobs.teaching.ask import Answerer, ApiVoice, EngineVoice, Voice
from distill_jobs.teaching.config import TeachConfig
from distill_jobs.teaching.demonstrations import choose, fitting
from distill_jobs.teaching.merge import JOIN, assign
from distill_jobs.teaching.rows import Row, tokenise
from distill_jobs.teaching.scoring import Scoring, Teacher, check_vocabularies, teachers_of
from distill_jobs.teaching.size import cache_size
from distill_jobs.tokens import ChatTokenizer

SPLITS = ("train", "validation")

Sample = dict[str, Any]


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
    cache_dir: Path | None = None,
) -> Result:
    """Write the outputs of every split, going on after the parts that are there already.

    Raises: ConfigError, DataError; EngineError when a server or a budget refuses (what is done is kept).
    """
    tokenizer = ChatTokenizer(str(teacher))
    teachers = teachers_of(config, teacher, teacher_digest)
    vocabulary, hidden = _checked(config, teachers)
    counts: Counter[str] = Counter()
    samples = {split: pq.read_table(collected[split]).to_pylist() for split in SPLITS}
    _show_demonstrations(config, samples, tokenizer)
    for split in SPLITS:
        samples[split] = _assigned(config, samples[split], counts)
        for one in teachers:
            voice = _voice(one, config, engine, tokenizer, answer, folder)
            own = [s for s in samples[split] if s["teacher"].split(JOIN)[0] == one.name]
            texts = Texts(_texts_folder(config, one, cache_dir))
            fill_answers(own, config, voice, texts, folder / "answers" / one.name / split, counts)
    longest = config.demonstrations.max_tokens if config.demonstrations else None
    rows = {s: tokenise(samples[s], config.max_tokens, tokenizer, counts, longest) for s in SPLITS}
    samples.clear()
    if not rows["train"]:
        raise DataError(f"No training sample fits into teach.max_tokens = {config.max_tokens}. Raise it.")
    every = [r for own in rows.values() for r in own]
    scored = sum(r.completion * len(r.teacher.split(JOIN)) for r in every)
    say(cache_size(config, len(every), scored, vocabulary, hidden))
    steps = _Steps(progress)
    scoring = Scoring(config, teachers, folder, cache_dir, tokenizer.pad, counts, steps)
    steps.total = scoring.steps(rows)
    scoring.write(rows)
    about: dict[str, object] = {
        "k": _width(config, every, hidden),
        "teacher_digest": teacher_digest if not config.teachers else sha256_of([t.digest for t in teachers]),
        "vocab_size": vocabulary,
        "scheme": config.scheme,
    }
    counts["positions"] = sum(r.completion for r in every)
    counts.update({split: len(own) for split, own in rows.items()})
    return Result({s: _finished(folder / s, rows[s], about, scoring) for s in SPLITS}, dict(counts))


def _finished(folder: Path, rows: Sequence[Row], about: dict[str, object], scoring: Scoring) -> OutputFile:
    """A split's manifest (and head) beside its parts."""
    if about["scheme"] == "hidden":
        _write_head(folder / "head.safetensors", scoring)
    own = {"rows": len(rows), "rows_digest": sha256_of([(r.key, r.token_digest) for r in rows])}
    write_atomic(folder / "manifest.json", json.dumps(about | own, indent=1) + "\n")
    return output_file(folder, rows=len(rows))


def _checked(config: TeachConfig, teachers: Sequence[Teacher]) -> tuple[int, int]:
    """(vocabulary, width of the last hidden state) of the teachers. Raises: ConfigError, DataError."""
    check_vocabularies(teachers)
    sizes = [sizes_of(t.folder) for t in teachers]
    least = min(vocabulary for vocabulary, _ in sizes)
    if config.scheme == "topk" and config.k > least:
        raise DataError(f"teach.k = {config.k} is more than the teacher's vocabulary of {least}.")
    return max(vocabulary for vocabulary, _ in sizes), sizes[0][1]


class _Steps:
    """Progress in part files."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self.total = progress, 0, 0

    def __call__(self) -> None:
        self._done += 1
        self._progress.update(self._done, self.total, "shards")


def sizes_of(teacher: Path) -> tuple[int, int]:
    """(vocabulary, width of the last hidden state) of a checkpoint, from its configuration alone."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(teacher).get_text_config()
    return int(text.vocab_size), int(text.hidden_size)


def _show_demonstrations(
    config: TeachConfig, samples: dict[str, list[Sample]], tokenizer: ChatTokenizer
) -> None:
    """Give every sample the conversation that its teacher sees; demonstrations are training samples only."""
    if config.demonstrations is None:
        return
    for own in samples.values():
        plain = [s for s in own if s.get("task") in (None, "answer")]
        chosen = choose(plain, samples["train"], config.demonstrations.k, config.demonstrations.pool)
        for sample, shown in zip(plain, chosen, strict=True):
            room = config.demonstrations.max_tokens - _answer_tokens(config, sample, tokenizer)
            length = partial(_prompt_tokens, tokenizer, sample["request"])
            sample["teacher_messages"] = json.dumps(fitting(sample, shown, length, room))


def _prompt_tokens(tokenizer: ChatTokenizer, request: str, messages: list[Sample]) -> int:
    return len(tokenizer.prompt(request, messages))


def _answer_tokens(config: TeachConfig, sample: Sample, tokenizer: ChatTokenizer) -> int:
    """Tokens of a sample's answer, or what one may take that the teacher has yet to write."""
    return config.answer_tokens if sample["answer"] is None else len(tokenizer.answer(sample["answer"]))


def _assigned(config: TeachConfig, samples: Sequence[Sample], counts: Counter[str]) -> list[Sample]:
    """Samples with the names of their teachers; those that no teacher wants are dropped and counted."""
    label = load_function(config.label, "teach.label") if config.label else None
    wanted = []
    for sample in samples:
        sample["teacher"] = assign(config, sample, label) if config.teachers else ""
        if config.teachers and not sample["teacher"]:
            counts["no_teacher"] += 1
            continue
        for name in filter(None, sample["teacher"].split(JOIN)):
            counts[f"teacher_{name}"] += 1
        wanted.append(sample)
    return wanted


def _voice(
    teacher: Teacher,
    config: TeachConfig,
    engine: EngineConfig,
    tokenizer: ChatTokenizer,
    answer: Answerer,
    folder: Path,
) -> Voice:
    if teacher.endpoint is not None:
        spent = folder / f"spent-{teacher.name or 'teacher'}.json"
        return ApiVoice(teacher.endpoint, "teach.endpoint", spent)
    return EngineVoice(teacher.folder, engine, tokenizer, "teach", answer)


def _texts_folder(config: TeachConfig, teacher: Teacher, cache_dir: Path | None) -> Path | None:
    """Where jobs share this teacher's texts of this sampling."""
    if cache_dir is None or not config.cache:
        return None
    served = teacher.endpoint.model if teacher.endpoint else ""
    sampling = sampling_of(config)
    key = sha256_of([teacher.digest, teacher.source, served, repr(sampling)])
    return cache_dir / f"teacher-texts-{key[:16]}"


def _width(config: TeachConfig, rows: Sequence[Row], hidden: int) -> int:
    """Values a completion position in the parts."""
    if config.scheme == "hidden":
        return hidden
    most = max(len(r.teacher.split(JOIN)) for r in rows) if config.scheme == "sampled" else 1
    return config.width * most


def _write_head(file: Path, scoring: Scoring) -> None:
    """The head of scheme hidden, once."""
    from safetensors.torch import save_file

    if file.is_file():
        return
    tmp = file.with_name(f".{file.name}.tmp")
    save_file({"weight": scoring.head()}, tmp)
    tmp.replace(file)
