"""collect: request-log segments, users' feedback and other files in, disjoint folders of samples out (train,
calibration, validation), with a card that a person can read.

Five steps over Ray Data (or in this process), each leaving files: segments to samples partitioned by digest;
each partition without its duplicates; near-duplicates over all; the choice; the parts. Rows are never all in
memory, some 50 bytes of each are. Knows nothing about tokens or the teacher's weights.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contracts.config import write_atomic
from contracts.errors import ConfigError, DataError
from distill_jobs.collecting import near
from distill_jobs.collecting.card import write_card
from distill_jobs.collecting.choose import Choice, balance, best_share, bin_edges, choose
from distill_jobs.collecting.difficulty import measure, rarity_of
from distill_jobs.collecting.executor import Mapper, Task, Work, executor
from distill_jobs.collecting.judgements import read_judgements, write_judged
from distill_jobs.collecting.parts import partition_count, save_array
from distill_jobs.collecting.pruning import constant_texts
from distill_jobs.collecting.rows import conversation, normalise, parse_segment, request_text
from distill_jobs.collecting.split import SPLITS
from distill_jobs.collecting.unique import make_unique
from distill_jobs.collecting.window import Segment
from distill_jobs.collecting.write import write_partition
from distill_jobs.config import CollectConfig
from distill_jobs.keys import output_file
from distill_jobs.progress import Progress
from distill_jobs.stage import Result

_SUMMARY = "summary.json"
_ALWAYS = ("exact_duplicate", "held_out", "near_duplicate", "over_max_rows")
"""Counted even when nothing was dropped."""


def run(
    config: CollectConfig,
    window: list[Segment],
    held_out: list[Path],
    folder: Path,
    progress: Progress,
    ray_address: str = "auto",
) -> Result:
    """Collect the window's samples into `folder`. Raises: DataError when too few are left."""
    started = time.monotonic()
    with executor(config.executor, ray_address) as mapper:
        job = _Job(config, window, folder, progress, mapper)
        job.parse()
        summary = job.summary([*config.holdout, *held_out])
    counts = dict(job.counts) | summary["counts"]
    if counts["train"] < config.min_rows:
        raise DataError(
            f"Only {counts['train']} samples are left to train on; collect.min_rows is {config.min_rows}."
            f" Counts: {counts}. Log more traffic, or relax the filters."
        )
    outputs = {name: output_file(folder / name, rows=counts[name]) for name in SPLITS}
    notes = job.notes | summary["notes"]
    write_card(folder / "CARD.md", config, window, counts, notes, summary, outputs)
    first, last = summary["times"] or (None, None)
    speed = round(counts["read"] / (time.monotonic() - started), 1)
    return Result(outputs, counts, {"log_from": first, "log_to": last, "rows_per_s": speed}, notes)


@dataclass
class _Decided:
    """What the choice settled, for those who write the parts."""

    constant: dict[str, dict[str, str]] | None
    hard: int
    edges: list[float]
    notes: dict[str, str]


class _Job:
    """The steps of one collect, each going on from the files that an interrupted run left."""

    def __init__(
        self, config: CollectConfig, window: list[Segment], folder: Path, progress: Progress, mapper: Mapper
    ) -> None:
        self._config, self._window, self._folder = config, window, folder
        self._progress, self._mapper = progress, mapper
        self._settings = config.model_dump(mode="json")
        self._segments = [s for s in window if not s.is_feedback]
        self._partitions = partition_count(sum(s.bytes for s in self._segments))
        self._unique = folder / "unique"
        self._parts = [
            self._path("segments", f"{s.digest[:24]}-{n}.arrow") for n, s in enumerate(self._segments)
        ]
        self.counts: Counter[str] = Counter(
            segments=len(self._segments), torn_tail=sum(s.torn for s in self._segments)
        )
        self.notes: dict[str, str] = {}
        for left in folder.rglob("*.tmp"):  # of a run that was killed; one job holds a workdir
            left.unlink()

    def parse(self) -> None:
        """Segments to samples; `counts` and `notes` then hold what was read and refused."""
        config, judged = self._config, self._path("judged.json")
        log_dir = "" if config.log_dir is None else config.log_dir
        feedback = (s for s in self._window if s.is_feedback)
        write_judged(Path(judged), read_judgements(log_dir, feedback, self.counts))
        tasks = [
            {
                "segment": segment.model_dump(),
                "log_dir": str(log_dir.resolve()) if isinstance(log_dir, Path) else log_dir,
                "judged": judged,
                "out": out,
                "report": str(Path(out).with_suffix(".json")),
                "partitions": self._partitions,
                "config": self._settings,
            }
            for segment, out in zip(self._segments, self._parts, strict=True)
        ]
        malformed: dict[str, list[int]] = {}
        for report in self._each(parse_segment, tasks, "segments"):
            self.counts.update(report["counts"])
            if report["malformed_lines"]:
                malformed[report["name"]] = report["malformed_lines"]
        self.notes = {
            "segments": json.dumps({s.name: s.digest for s in self._window}),
            "malformed_lines": json.dumps(malformed),
            "seed": str(config.seed),
        }

    def summary(self, held_out: list[Path]) -> dict[str, Any]:
        """Everything after parsing, done once: counts, notes, and what the card tells of the samples."""
        file = self._folder / _SUMMARY
        if not file.is_file():
            write_atomic(file, json.dumps(self._summarise(held_out)))
        shutil.rmtree(self._unique, ignore_errors=True)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _summarise(self, held_out: list[Path]) -> dict[str, Any]:
        self._unique.mkdir(exist_ok=True)
        counts = Counter(dict.fromkeys((*_ALWAYS, *SPLITS), 0))
        reports = self._make_unique(held_out)
        sizes = [report["rows"] for report in reports]
        for report in reports:
            counts.update(report["counts"])
        for part in self._parts:
            Path(part).unlink(missing_ok=True)
        roots = self._clusters(sizes, counts)
        decided = self._decide(reports, roots, counts)
        told = self._write(decided)
        for report in told:
            counts.update(report["counts"])
        counts["samples"] = sum(counts[name] for name in SPLITS)
        by: dict[str, Counter[str]] = {}
        for report in told:
            for name, found in report["by"].items():
                by.setdefault(name, Counter()).update(found)
        times = [t for report in told if report["times"] for t in report["times"]]
        return {
            "counts": counts,
            "notes": decided.notes,
            "by": by,
            "times": [min(times), max(times)] if times else None,
            "examples": [e for report in told for e in report["examples"]][:3],
        }

    def _make_unique(self, held_out: list[Path]) -> list[Task]:
        texts = sorted({text for path in held_out for text in held_out_texts(path)})
        file = self._path("held_out.json")
        write_atomic(Path(file), json.dumps(texts))
        tasks = [
            {
                "parts": self._parts,
                "partition": number,
                "partitions": self._partitions,
                "folder": str(self._unique.resolve()),
                "report": self._path("unique", f"{number:04d}.json"),
                "held_out": file,
                "threshold": self._config.near_duplicates,
                "config": self._settings,
            }
            for number in range(self._partitions)
        ]
        list(self._each(make_unique, tasks, "partitions"))
        return [json.loads(Path(task["report"]).read_text(encoding="utf-8")) for task in tasks]

    def _clusters(self, sizes: list[int], counts: Counter[str]) -> Any:
        threshold = self._config.near_duplicates
        if threshold is None or not sum(sizes):
            return np.arange(sum(sizes), dtype=np.int32)
        roots, unchecked = near.clusters(
            self._unique, sizes, threshold, self._mapper, lambda n, of: self._progress.update(n, of, "rounds")
        )
        counts["near_unchecked_pairs"] = unchecked
        return roots

    def _decide(self, reports: list[Task], roots: Any, counts: Counter[str]) -> _Decided:
        config, notes = self._config, {}
        alive = np.ones(len(roots), bool)
        if config.rank is not None:
            alive = best_share(self._column("score"), config.rank.keep, config.rank.unscored)
            counts["low_score"] = int((~alive).sum())
        sides = self._column("side")
        choice = choose(roots, sides, alive, config.keep_per_cluster, config.max_rows, counts)
        if config.balance is not None:
            notes["classes_before"] = self._balance(choice, reports, counts)
        hard, edges = self._difficulty(choice, notes)
        constant = None
        if config.prune is not None:
            files = (self._unique / f"{n:04d}.heads.json" for n in range(self._partitions))
            heads = (head for file in files for head in json.loads(file.read_text(encoding="utf-8")))
            constant = constant_texts(heads, self._settings["prune"])
            notes["constant_prompts"] = json.dumps(constant, ensure_ascii=False)
        at = 0
        for number, report in enumerate(reports):
            rows = slice(at, at := at + report["rows"])
            self._save(number, "copies", choice.copies[rows])
            self._save(number, "chosen", choice.side[rows])
            if choice.weight is not None:
                self._save(number, "weight", choice.weight[rows])
        return _Decided(constant, hard, edges, notes)

    def _balance(self, choice: Choice, reports: list[Task], counts: Counter[str]) -> str:
        """Balance the classes; returns how many training samples of each there were before, as JSON."""
        names = sorted({name for report in reports for name in report["classes"]})
        code = {name: n for n, name in enumerate(names)}
        coded = []
        for number, report in enumerate(reports):
            own = np.load(self._unique / f"{number:04d}.class.npy")
            to = np.array([*(code[name] for name in report["classes"]), -1], np.int32)
            coded.append(to[own])
        classes = np.concatenate(coded)
        training = classes[(choice.copies > 0) & (choice.side == 0)]
        before = Counter(names[c] if c >= 0 else "None" for c in training.tolist())
        balance(choice, classes, names, self._column("draw"), self._settings["balance"], counts)
        return json.dumps(before, ensure_ascii=False)

    def _difficulty(self, choice: Choice, notes: dict[str, str]) -> tuple[int, list[float]]:
        """Measure it; returns which measure (0 text, 1 log-probability) and the bins' inner edges."""
        config = self._config.difficulty
        if config is None:
            return 0, []
        numbers = range(self._partitions)
        seen = sum(np.load(self._unique / f"{n:04d}.shingles.npy") for n in numbers)
        rarity = self._unique / "rarity.npy"
        save_array(rarity, rarity_of(np.asarray(seen)))
        tasks = [
            {
                "folder": str(self._unique.resolve()),
                "partition": number,
                "rarity": str(rarity.resolve()),
                "report": self._path("unique", f"{number:04d}.hard.json"),
            }
            for number in numbers
        ]
        list(self._each(measure, tasks, "partitions"))
        hard = np.concatenate([np.load(self._unique / f"{n:04d}.hard.npy") for n in numbers], axis=1)
        hard = hard[:, choice.copies > 0]
        known = not np.isnan(hard[1]).any() and hard.size > 0
        if config.measure == "logprob" and not known:
            missing = int(np.isnan(hard[1]).sum())
            raise DataError(
                f"collect.difficulty.measure is logprob, but {missing} of {hard.shape[1]} samples were logged"
                " without `logprobs`. Use text, or auto."
            )
        which = int(known and config.measure != "text")
        edges = bin_edges(hard[which], config.bins)
        notes["difficulty"] = json.dumps({"measure": ("text", "logprob")[which], "edges": edges})
        return which, edges

    def _write(self, decided: _Decided) -> list[Task]:
        tasks = [
            {
                "folder": str(self._unique.resolve()),
                "partition": number,
                "out": str(self._folder.resolve()),
                "report": self._path("unique", f"{number:04d}.written.json"),
                "config": self._settings,
                "constant": decided.constant,
                "hard": decided.hard,
                "edges": decided.edges,
            }
            for number in range(self._partitions)
        ]
        list(self._each(write_partition, tasks, "parts"))
        return [json.loads(Path(task["report"]).read_text(encoding="utf-8")) for task in tasks]

    # files -----------------------------------------------------------------------------------------

    def _each(self, work: Work, tasks: list[Task], unit: str) -> Any:
        for done, report in enumerate(self._mapper(work, tasks), start=1):
            yield report
            self._progress.update(done, len(tasks), unit)

    def _path(self, *names: str) -> str:
        return str(self._folder.joinpath(*names).resolve())

    def _column(self, name: str) -> Any:
        return np.concatenate(
            [np.load(self._unique / f"{n:04d}.{name}.npy") for n in range(self._partitions)]
        )

    def _save(self, number: int, name: str, values: Any) -> None:
        save_array(self._unique / f"{number:04d}.{name}.npy", values)


def held_out_texts(path: Path) -> list[str]:
    """The normalised texts of a held-out file: JSON lines with a request, or plain lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"collect.holdout: {path} cannot be read ({err}).") from err
    return [_held_out_text(line, path) for line in lines if line.strip()]


def _held_out_text(line: str, path: Path) -> str:
    if not line.lstrip().startswith("{"):
        return normalise(line)
    try:
        messages = conversation(json.loads(line)["request"])
    except (json.JSONDecodeError, KeyError, AttributeError) as err:
        raise ConfigError(
            f'{path}: a line is neither plain text nor {{"request": ...}}: {line[:80]}'
        ) from err
    if messages is None:
        raise ConfigError(f"{path}: a request has no text messages: {line[:80]}")
    return request_text(messages)
