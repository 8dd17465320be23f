"""teach: samples in, what the teacher writes out, one parquet part at a time.

The text is the logged answer when the teacher wrote it, else the teacher answers offline. What it thinks at
every position of the completion (top-k or sampled log-probabilities, hidden states) goes into part files,
whose columns are in teaching/parts.py; `manifest.json` beside them says scheme, k, teacher and vocabulary
size. Three phases, each over all samples with a window of them in memory: ask (one engine session a teacher),
tokenise (into sorted files), score. Knows nothing about students.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from contracts.config import write_atomic
from contracts.dataset import OutputFile
from contracts.errors import DataError
from distill_jobs.config import EngineConfig
from distill_jobs.engine import run_engine
from distill_jobs.keys import output_file, sha256_of, sha256_of_each
from distill_jobs.progress import Progress
from distill_jobs.stage import Result
from distill_jobs.teaching.answers import Texts, fill_answers, sampling_of
from distill_jobs.teaching.ask import Answerer, Answers, ApiVoice, EngineVoice, Voice
from distill_jobs.teaching.config import TeachConfig
from distill_jobs.teaching.rowfile import RowFile, sort_rows
from distill_jobs.teaching.rows import Row, carried_by, tokenise
from distill_jobs.teaching.scoring import Scoring, Teacher, check_vocabularies, teachers_of
from distill_jobs.teaching.size import cache_size
from distill_jobs.teaching.source import SPLITS, Source, of_teacher
from distill_jobs.tokens import ChatTokenizer


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
    source = Source(config, collected, tokenizer)
    texts = {one.name: Texts(_texts_folder(config, one, cache_dir)) for one in teachers}
    said: dict[str, Answers] = {}
    for one in teachers:
        voice = _voice(one, config, engine, tokenizer, answer, folder)
        questions = source.unknown(one.name, texts[one.name])
        said[one.name] = voice.ask(questions, sampling_of(config), folder / "answers" / one.name)
    counts: Counter[str] = Counter()
    reading = _Reading(config, source, tokenizer, texts, said, counts, progress)
    rows = {s: sort_rows(reading.windows(s), folder / "rows" / s, config.window) for s in SPLITS}
    if not rows["train"]:
        raise DataError(f"No training sample fits into teach.max_tokens = {config.max_tokens}. Raise it.")
    scored = sum(own.scored for own in rows.values())
    say(cache_size(config, sum(map(len, rows.values())), scored, vocabulary, hidden))
    steps = _Steps(progress)
    scoring = Scoring(config, teachers, folder, cache_dir, tokenizer.pad, counts, steps)
    steps.total = scoring.steps(rows)
    scoring.write(rows)
    about: dict[str, object] = {
        "k": _width(config, rows, hidden),
        "teacher_digest": teacher_digest if not config.teachers else sha256_of([t.digest for t in teachers]),
        "vocab_size": vocabulary,
        "scheme": config.scheme,
    }
    counts["positions"] = sum(own.positions for own in rows.values())
    counts.update({split: len(own) for split, own in rows.items()})
    outputs = {s: _finished(folder / s, rows[s], about, scoring) for s in SPLITS}
    shutil.rmtree(folder / "rows")
    return Result(outputs, dict(counts))


class _Reading:
    """The second phase: answers filled in, samples to rows."""

    def __init__(
        self,
        config: TeachConfig,
        source: Source,
        tokenizer: ChatTokenizer,
        texts: Mapping[str, Texts],
        said: Mapping[str, Answers],
        counts: Counter[str],
        progress: Progress,
    ) -> None:
        self._config, self._source, self._tokenizer = config, source, tokenizer
        self._texts, self._said, self._counts, self._progress = texts, said, counts, progress
        self._done, self._total = 0, source.count()

    def windows(self, split: str) -> Iterator[tuple[list[Row], set[str]]]:
        """Rows of each window, and the columns that its samples carry."""
        config, shown = self._config, self._config.demonstrations
        for window in self._source.windows(split, self._counts):
            for name, said in self._said.items():
                fill_answers(of_teacher(window, name), config, said, self._texts[name], self._counts)
            longest = shown.max_tokens if shown else None
            rows = tokenise(window, config.max_tokens, self._tokenizer, self._counts, longest)
            yield rows, carried_by(window)
            self._done = min(self._total, self._done + config.window)
            self._progress.update(self._done, self._total, "samples")


def _finished(folder: Path, rows: RowFile, about: dict[str, object], scoring: Scoring) -> OutputFile:
    """A split's manifest (and head) beside its parts."""
    if about["scheme"] == "hidden":
        _write_head(folder / "head.safetensors", scoring)
    own = {"rows": len(rows), "rows_digest": sha256_of_each((r.key, r.token_digest) for r in rows)}
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


def _width(config: TeachConfig, rows: Mapping[str, RowFile], hidden: int) -> int:
    """Values a completion position in the parts."""
    if config.scheme == "hidden":
        return hidden
    most = max(own.most_teachers for own in rows.values()) if config.scheme == "sampled" else 1
    return config.width * most


def _write_head(file: Path, scoring: Scoring) -> None:
    """The head of scheme hidden, once."""
    from safetensors.torch import save_file

    if file.is_file():
        return
    tmp = file.with_name(f".{file.name}.tmp")
    save_file({"weight": scoring.head()}, tmp)
    tmp.replace(file)
