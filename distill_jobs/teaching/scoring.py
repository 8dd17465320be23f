"""Teachers and their part files: what is cached or finished is not computed again, one model in memory at a
time.

Knows nothing about samples or about how their answers came to be.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from contracts.config import canonical_json
from contracts.errors import ConfigError, DataError
from distill_jobs.keys import key_config, model_digest, model_folder, sha256_of
from distill_jobs.lines import chunks
from distill_jobs.teaching.config import EndpointConfig, TeachConfig
from distill_jobs.teaching.local import LocalScorer, Scored
from distill_jobs.teaching.merge import JOIN, average_sampled, average_topk, pad_to
from distill_jobs.teaching.parts import is_complete, part_name, write_part
from distill_jobs.teaching.rowfile import RowFile
from distill_jobs.teaching.rows import Row
from distill_jobs.teaching.served import ServedScorer
from distill_jobs.teaching.store import Store

if TYPE_CHECKING:
    import torch


class Scorer(Protocol):
    """A teacher that can be asked what it thinks of rows."""

    def score(self, rows: Sequence[Row]) -> Iterator[Scored]: ...


@dataclass(frozen=True)
class Teacher:
    """One teacher and where it is asked."""

    name: str
    folder: Path
    digest: str
    source: str
    endpoint: EndpointConfig | None
    weight: float


def teachers_of(config: TeachConfig, folder: Path, digest: str) -> list[Teacher]:
    """The configured teachers; without any, the job's own under the name ''."""
    if not config.teachers:
        return [Teacher("", folder, digest, config.source, config.endpoint, 1.0)]
    made = []
    for t in config.teachers:
        own = (model_folder(t.model), model_digest(t.model)) if t.model else (folder, digest)
        made.append(Teacher(t.name, *own, t.source, t.endpoint, t.weight))
    return made


def check_vocabularies(teachers: Sequence[Teacher]) -> None:
    """Raises: ConfigError when two teachers number their tokens differently."""
    from transformers import AutoTokenizer

    folders = dict.fromkeys(t.folder for t in teachers)
    seen = {
        f: canonical_json(AutoTokenizer.from_pretrained(f).get_vocab()) for f in folders if len(folders) > 1
    }
    for teacher in teachers:
        if seen and seen[teacher.folder] != seen[teachers[0].folder]:
            raise ConfigError(
                f"teach.teachers: {teacher.name!r} has another vocabulary than {teachers[0].name!r}, so their"
                " distributions are not over the same tokens. Use teachers of one tokenizer."
            )


class Scoring:
    """One run's scoring: `write` makes the parts of every split; what is there already is believed by its
    keys.
    """

    def __init__(
        self,
        config: TeachConfig,
        teachers: Sequence[Teacher],
        folder: Path,
        cache_dir: Path | None,
        pad: int,
        counts: Counter[str],
        step: Callable[[], None],
    ) -> None:
        self._config, self._teachers, self._folder, self._pad = config, teachers, folder, pad
        self._cache_dir = cache_dir if config.cache else None
        self._counts, self._step = counts, step
        self._scorer: Scorer | None = None

    def steps(self, rows: dict[str, RowFile]) -> int:
        """How many part files there are to write or to believe."""
        single = sum(_shards(r, self._config) for r in rows.values())
        if not self._config.teachers:
            return single
        each = [_shards(r.of(t.name), self._config) for t in self._teachers for r in rows.values()]
        return single + sum(each)

    def write(self, rows: dict[str, RowFile]) -> None:
        """Part files of every split in `<folder>/<split>`."""
        if not self._config.teachers:
            self._by(self._teachers[0], rows, self._folder)
            return
        if all(
            is_complete(self._folder / split / part_name(start, self._config.shard_rows), batch)
            for split, own in rows.items()
            for start, batch in _batches(own, self._config)
        ):
            return
        for teacher in self._teachers:
            own = {split: r.of(teacher.name) for split, r in rows.items()}
            self._by(teacher, own, self._folder / "by" / teacher.name)
        self._merge(rows)
        shutil.rmtree(self._folder / "by")

    def head(self) -> torch.Tensor:
        """(V, d) head of the teacher of scheme hidden."""
        scorer = self._load(self._teachers[0])
        assert isinstance(scorer, LocalScorer)
        return scorer.head()

    def _by(self, teacher: Teacher, rows: dict[str, RowFile], folder: Path) -> None:
        """Parts of one teacher's rows."""
        store = self._store(teacher)
        self._scorer = None
        for split, own in rows.items():
            (folder / split).mkdir(parents=True, exist_ok=True)
            for start, batch in _batches(own, self._config):
                part = folder / split / part_name(start, self._config.shard_rows)
                if not is_complete(part, batch):
                    write_part(part, batch, self._scores(teacher, batch, store), self._config.scheme)
                    if store is not None:
                        store.adopt(part)
                self._step()
            _drop_others(folder / split, _shards(own, self._config))

    def _scores(self, teacher: Teacher, rows: Sequence[Row], store: Store | None) -> list[Scored]:
        if self._config.scheme == "text":
            return [{} for _ in rows]
        found = [store.find(row) if store is not None else None for row in rows]
        missing = [row for row, scored in zip(rows, found, strict=True) if scored is None]
        self._counts["cached"] += len(rows) - len(missing)
        fresh = iter(self._load(teacher).score(missing) if missing else ())
        return [next(fresh) if scored is None else scored for scored in found]

    def _load(self, teacher: Teacher) -> Scorer:
        """The teacher's scorer; loaded only when something is left to score, the one before it let go."""
        if self._scorer is None:
            if teacher.endpoint is not None:
                spent = self._folder / f"spent-{teacher.name or 'teacher'}.json"
                self._scorer = ServedScorer(teacher.endpoint, self._config, spent)
            else:
                self._scorer = LocalScorer(teacher.folder, self._config, self._pad, teacher.digest)
        return self._scorer

    def _store(self, teacher: Teacher) -> Store | None:
        if self._cache_dir is None or self._config.scheme == "text":
            return None
        config = self._config
        about: dict[str, object] = {
            "teacher": teacher.digest,
            "scheme": config.scheme,
            "source": teacher.source,
        }
        if teacher.endpoint is not None:
            about["served"] = key_config(teacher.endpoint)
        else:
            about["dtype"] = config.dtype
        if config.scheme == "topk":
            about["k"] = config.k
        if config.scheme == "sampled":
            about |= {"draws": config.draws, "proposal": config.proposal, "seed": config.seed}
        return Store(self._cache_dir / "teacher-outputs" / sha256_of(about)[:16], config.scheme, about)

    def _merge(self, rows: dict[str, RowFile]) -> None:
        """Parts of all rows, each the average of what its teachers wrote (of one alone: what it wrote)."""
        weights = {t.name: t.weight for t in self._teachers}
        width = self._config.width * max(own.most_teachers for own in rows.values())
        for split, own in rows.items():
            stores = {
                t.name: Store(self._folder / "by" / t.name / split, self._config.scheme)
                for t in self._teachers
            }
            for start, batch in _batches(own, self._config):
                scored = [self._combined(row, stores, weights, width) for row in batch]
                write_part(
                    self._folder / split / part_name(start, self._config.shard_rows),
                    batch,
                    scored,
                    self._config.scheme,
                )
                self._step()
            _drop_others(self._folder / split, _shards(own, self._config))

    def _combined(self, row: Row, stores: dict[str, Store], weights: dict[str, float], width: int) -> Scored:
        names = row.teacher.split(JOIN)
        found = [stores[name].find(row) for name in names]
        whole = [s for s in found if s is not None]
        if len(whole) < len(names):
            raise DataError(f"A part under {self._folder / 'by'} was removed while it was merged. Run again.")
        shares = [weights[name] for name in names]
        if self._config.scheme == "topk":
            return whole[0] if len(whole) == 1 else average_topk(whole, shares, self._config.k)
        return pad_to(average_sampled(whole, shares), width)


def _batches(rows: RowFile, config: TeachConfig) -> Iterator[tuple[int, list[Row]]]:
    """(number of the first, rows) of each part, one part's in memory at a time."""
    for number, batch in enumerate(chunks(rows, config.shard_rows)):
        yield number * config.shard_rows, batch


def _shards(rows: RowFile, config: TeachConfig) -> int:
    return -(-len(rows) // config.shard_rows)


def _drop_others(folder: Path, parts: int) -> None:
    """Parts beyond the last, of an earlier run with more rows in this folder, and what a killed one left
    torn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".part-*.tmp"):
        torn.unlink()
    for extra in sorted(folder.glob("part-*.parquet"))[parts:]:
        extra.unlink()
