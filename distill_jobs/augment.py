"""augment: training samples in, the same and what the teacher added to them out. Off unless configured.

Paraphrases, new requests, hard negatives, and rationales as rows of a second task. Every new sample names the
samples it came from, resembles none that is there already, and none of validation, calibration or held-out at
all. A window of samples is in memory: what is there passes by each window of new ones. Knows nothing about
tokens.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_jobs import samples
from distill_jobs.augmenting.config import AugmentConfig, RationaleConfig
from distill_jobs.augmenting.novelty import apart, unlike
from distill_jobs.augmenting.prompts import read_prompt
from distill_jobs.augmenting.rationales import TASK
from distill_jobs.augmenting.rationales import questions as rationale_questions
from distill_jobs.augmenting.rationales import rows as rationale_rows
from distill_jobs.augmenting.variants import Asks, chosen, is_plain, new_samples
from distill_jobs.collect import held_out_texts
from distill_jobs.keys import output_file
from distill_jobs.lines import chunks
from distill_jobs.progress import Progress
from distill_jobs.sorting import DictForm, Spilled, sort_windows, spill
from distill_jobs.stage import Result
from distill_jobs.teaching.ask import Answers, Sampling, Voice

ADDED = (
    ("weight", pa.float32()),
    ("task", pa.string()),
    ("teacher_messages", pa.string()),
    ("origin", pa.list_(pa.string())),
    ("kind", pa.string()),
)
"""Columns beside those of collect. `origin`: digests of the samples it came from; `kind`: how (logged: null).
"""

KINDS = ("paraphrase", "expand", "hard_negatives")
_COMPARED = 4096
"""New samples compared with all others at a time, at most: an index takes some hundred bytes a character."""
_BATCH, _GROUP = 256, 16
"""Samples made columns at a time, and batches of them in a row group: the file is the same for every window.
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
    schema = samples.schema_of(collected["train"])
    counts: Counter[str] = Counter(logged=samples.count(collected["train"]))
    plain = (
        [s for s in window if is_plain(s)] for window in samples.windows(collected["train"], config.window)
    )
    work = folder / "work"
    solved = sort_windows(plain, _digest, DictForm(schema), work / "solved", config.window)
    added = [pa.field(name, kind) for name, kind in ADDED if name not in schema.names]
    form = DictForm(pa.schema([*schema, *added]))
    made: Iterable[Sample] = ()
    if any(getattr(config, name) is not None for name in KINDS):
        others = [text for path in held_out for text in held_out_texts(path)]
        variants = _Variants(config, form, _Known(collected, others), work, counts)
        made = variants.made(voice, solved, folder / "variants")
    progress.update(1, 2, "kinds of samples")
    rationales: Iterable[Sample] = ()
    if config.rationale is not None:
        rationales = _rationales(config, config.rationale, voice, solved, folder / "rationales", counts)
    progress.update(2, 2, "kinds of samples")
    path = folder / "train.parquet"
    counts["train"] = _write(path, (_logged(collected["train"]), made, rationales), form)
    shutil.rmtree(work, ignore_errors=True)
    return Result({"train": output_file(path, rows=counts["train"])}, dict(counts))


@dataclass(frozen=True)
class _Known:
    """Normalised texts that are there already."""

    collected: dict[str, Path]
    held_out: list[str]

    def logged(self) -> Iterator[str]:
        """The training samples'."""
        return self._texts("train")

    def kept_apart(self) -> Iterator[str]:
        """Those of everything that training must not see."""
        for name in ("validation", "calibration"):
            yield from self._texts(name)
        yield from self.held_out

    def _texts(self, name: str) -> Iterator[str]:
        if name in self.collected:
            yield from (s["text"] for s in samples.each(self.collected[name], ("text",)))


@dataclass(frozen=True)
class _Variants:
    """New samples that resemble nothing that is there, nor each other; drops are counted by kind."""

    config: AugmentConfig
    form: DictForm
    known: _Known
    work: Path
    counts: Counter[str]

    def made(self, voice: Voice, solved: Spilled[Sample], folder: Path) -> Iterator[Sample]:
        """Ask for all of them; those that stay, in order of their digests."""
        config = self.config
        names = [name for name in KINDS if getattr(config, name) is not None]
        wanted = Asks(config, solved, {name: read_prompt(name, config.prompts) for name in names})
        drawn = Sampling(config.answer_tokens, config.temperature, config.top_p)
        said = voice.ask((a.question for a in wanted), drawn, folder)
        new = sort_windows(self._new(wanted, said), _digest, self.form, self.work / "new", config.window)
        kept = self._different(new)
        self.counts["over_max_new"] = max(0, len(kept) - (config.max_new or len(kept)))
        return self._counted(islice(kept, config.max_new))

    def _new(self, wanted: Asks, said: Answers) -> Iterator[list[Sample]]:
        """Windows of new samples that resemble nothing that is there."""
        counts, limit = self.counts, self.config.near_duplicates
        counts.update(dict.fromkeys(("asked", "written", "unanswered", "like_held_out", "like_logged"), 0))
        for window in self._windows(self._said(wanted, said)):
            counts["written"] += len(window)
            clean = _kept(window, unlike(_texts(window), self.known.kept_apart(), limit))
            counts["like_held_out"] += len(window) - len(clean)
            new = _kept(clean, unlike(_texts(clean), self.known.logged(), limit))
            counts["like_logged"] += len(clean) - len(new)
            yield new

    def _said(self, wanted: Asks, said: Answers) -> Iterator[Sample]:
        for ask in wanted:
            texts = said.get(ask.question.id, [])
            self.counts["asked"] += 1
            self.counts["unanswered"] += not texts
            yield from new_samples(ask, texts, self.config.weight)

    def _different(self, new: Spilled[Sample]) -> Spilled[Sample]:
        """Those that resemble none before them that stayed."""
        limit, kept = self.config.near_duplicates, Spilled[Sample]((), self.form, 0)
        for number, window in enumerate(self._windows(new)):
            fresh = _kept(window, unlike(_texts(window), (s["text"] for s in kept), limit))
            different = _kept(fresh, apart(_texts(fresh), limit))
            part = spill(self.work / "kept" / f"{number:06d}.arrow", different, self.form)
            kept = Spilled((*kept.files, *part.files), self.form, len(kept) + len(part))
        self.counts["like_each_other"] = len(new) - len(kept)
        return kept

    def _windows(self, new: Iterable[Sample]) -> Iterator[list[Sample]]:
        return chunks(new, min(self.config.window, _COMPARED))

    def _counted(self, kept: Iterable[Sample]) -> Iterator[Sample]:
        for sample in kept:
            self.counts[sample["kind"]] += 1
            yield sample


def _digest(sample: Sample) -> str:
    return str(sample["sample_digest"])


def _texts(window: Sequence[Sample]) -> list[str]:
    return [s["text"] for s in window]


def _kept(window: Sequence[Sample], keep: Sequence[bool]) -> list[Sample]:
    return [s for s, one in zip(window, keep, strict=True) if one]


def _logged(path: Path) -> Iterator[Sample]:
    return (s | {"task": s.get("task") or "answer"} for s in samples.each(path))


def _rationales(
    config: AugmentConfig,
    own: RationaleConfig,
    voice: Voice,
    solved: Spilled[Sample],
    folder: Path,
    counts: Counter[str],
) -> Iterator[Sample]:
    """Ask for all steps; the rows of those that lead to the logged answer."""
    prompt = read_prompt("rationale", config.prompts)
    student = read_prompt("rationale_student", config.prompts)

    def picks() -> Iterator[list[Sample]]:
        return chunks(chosen(solved, own.samples, f"rationale-{config.seed}"), config.window)

    asked = (q for window in picks() for q in rationale_questions(window, prompt, own.marker))
    said = voice.ask(asked, Sampling(config.answer_tokens), folder)
    counts[TASK] += 0
    return (s for window in picks() for s in rationale_rows(own, window, said, prompt, student, counts))


def _write(path: Path, rows: Iterable[Iterable[Sample]], form: DictForm) -> int:
    """The samples one after the other; returns how many."""
    tmp = path.with_name(f".{path.name}.tmp")
    count = 0
    batches = (form.pack(piece) for piece in chunks(chain.from_iterable(rows), _BATCH))
    with pq.ParquetWriter(tmp, form.schema) as out:
        for group in chunks(batches, _GROUP):
            out.write_table(table := pa.Table.from_batches(group))
            count += len(table)
    tmp.replace(path)
    return count
