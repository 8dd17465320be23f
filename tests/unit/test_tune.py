"""tune: logged traffic as work, the search over engines that a formula stands for, what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ConfigError, DataError, EngineError
from serve.engine.config import EngineOptions
from serve.engine.settings import read_settings
from serve.tuning.load import Timed, Turn, body_of, summary
from serve.tuning.report import write
from serve.tuning.search import Target, Tuner, singles
from serve.tuning.speculate import by_task
from serve.tuning.traffic import CHAT, COMPLETIONS, Work, traffic_of

WORK = [Work(CHAT, {"messages": [{"role": "user", "content": str(n)}]}, 20, 10, "t") for n in range(200)]
TARGET = Target(of="e2e", p95_s=1.0)


class Engines:
    """Stands for engines: a request takes 0.1 s times the concurrency over the engine's speed."""

    def __init__(self, broken: str | None = None) -> None:
        self.broken, self.started, self.alive, self.asked = broken, 0, 0, 0

    @contextmanager
    def run(self, options: EngineOptions, log: Path) -> Iterator[str]:
        """Its URL is its options."""
        if self.broken and getattr(options, self.broken):
            raise EngineError("it does not start")
        self.started, self.alive = self.started + 1, self.alive + 1
        try:
            yield options.model_dump_json()
        finally:
            self.alive -= 1

    def ask(self, url: str, work: Sequence[Work], concurrency: int) -> Turn:
        """Two threads help by 1.5, compiling by 1.2, and 32 sequences hurt; p95 is what a request takes."""
        self.asked += 1
        options = json.loads(url)
        speed = {1: 1.0, 2: 1.5}[options["threads"]] * (1.0 if options["enforce_eager"] else 1.2)
        speed *= 0.8 if options["max_num_seqs"] else 1.0
        each = 0.1 * (1 + 0.1 * concurrency) / speed
        p95 = {"e2e": each, "ttft": each / 2, "tpot": each / 20}
        return Turn(
            concurrency=concurrency, requests=len(work), seconds=len(work) * each / concurrency,
            tokens=10 * len(work), p95=p95,
        )  # fmt: skip


def tuner(folder: Path, engines: Engines, target: Target = TARGET) -> Tuner:
    """A search from an eager engine of one thread."""
    base = EngineOptions(enforce_eager=True)
    return Tuner(base, WORK, target, folder, engines.run, engines.ask, requests=16, rounds=2)


CANDIDATES: list[dict[str, Any]] = [
    {"max_num_seqs": 32}, {"threads": 2}, {"enforce_eager": False}, {"block_size": 32},
]  # fmt: skip


def test_what_helps_is_found_and_combined(tmp_path: Path) -> None:
    """The two changes that gain are combined, what hurts or does nothing is left out, and the gain is that of
    the formula within the ladder's steps; every engine has ended."""
    engines = Engines()
    final, trials = tuner(tmp_path, engines).search(CANDIDATES)
    assert final.changes == {"threads": 2, "enforce_eager": False}
    assert final.gain == pytest.approx(1.8)
    assert final.rate > final.base_rate > 0
    assert all(turn.p95["e2e"] <= TARGET.p95_s for turn in final.turns[:1])
    assert {t.name for t in trials} >= {"threads=2", "threads=2, enforce_eager=False"}
    assert engines.alive == 0


def test_a_candidate_that_does_not_start_is_said_and_left_out(tmp_path: Path) -> None:
    """An option that this machine's vLLM refuses ends a trial, not the search."""
    final, trials = tuner(tmp_path, Engines(broken="block_size")).search(CANDIDATES)
    assert final.changes["threads"] == 2
    assert [t.error for t in trials if "block_size" in t.changes] == ["it does not start"]


def test_a_search_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    """Ctrl-C ends every engine and keeps what was measured; the same search measures only the rest."""
    first = Engines()
    stopped = tuner(tmp_path, first)
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        if len(told) == 5:
            raise KeyboardInterrupt

    stopped.say = say
    with pytest.raises(KeyboardInterrupt):
        stopped.search(CANDIDATES)
    assert first.alive == 0
    rest, whole = Engines(), Engines()
    again, _ = tuner(tmp_path, rest).search(CANDIDATES)
    fresh, _ = tuner(tmp_path / "fresh", whole).search(CANDIDATES)
    assert again.changes == fresh.changes
    assert rest.started == whole.started - 2
    done = Engines()
    assert tuner(tmp_path, done).search(CANDIDATES)[0] == again
    assert done.started == 1


def test_the_default_may_be_the_best(tmp_path: Path) -> None:
    """Where nothing gains, nothing is chosen, and the settings file changes nothing."""
    final, trials = tuner(tmp_path, Engines()).search([{"max_num_seqs": 32}, {"block_size": 32}])
    assert final.changes == {}
    files = write(tmp_path, TARGET, final, trials)
    assert read_settings(files[0]) == {}


def test_a_target_nobody_reaches_is_said(tmp_path: Path) -> None:
    """A target below what one request alone takes has no req/s to compare."""
    with pytest.raises(ConfigError, match="larger target"):
        tuner(tmp_path, Engines(), Target(of="e2e", p95_s=0.01)).search(CANDIDATES)


def test_what_is_written_is_what_an_engine_section_takes(tmp_path: Path) -> None:
    """The settings file gives the tuned engine, beside JSON and a plot with both sides."""
    final, trials = tuner(tmp_path, Engines()).search(CANDIDATES)
    settings, data, picture = write(tmp_path, TARGET, final, trials)
    assert EngineOptions.model_validate({"settings": str(settings)}).threads == 2
    assert json.loads(data.read_text())["final"]["changes"] == final.changes
    assert all(word in picture.read_text() for word in ("default", "chosen", "target"))


def test_single_changes_differ_from_the_default_and_are_valid() -> None:
    """Each is one the engine's options take, and none is what is there already."""
    base = EngineOptions(threads=2, kv_cache_bytes=2**26, max_model_len=4096)
    found = singles(base, cores=4, longest=300)
    assert {"threads": 4} in found
    assert {"threads": 2} not in found
    assert {"chunked_prefill": False, "max_num_batched_tokens": 4096} in found
    for changes in found:
        assert EngineOptions.model_validate({**base.model_dump(), **changes}) != base


def row(number: int, **changes: Any) -> str:
    """A line of the request log."""
    told: dict[str, Any] = {
        "request_id": f"r{number}", "ts": 100.0 + number, "route": "support", "endpoint": CHAT,
        "arm": "stable", "served_arm": "stable", "reason": "only_arm", "unit_kind": "header",
        "unit_hash": "u", "split_version": 1, "upstream": "teacher", "model": "m",
        "stream": False, "status": 200, "outcome": "ok",
        "prompt_tokens": 10 + number, "completion_tokens": 5, "e2e_s": 2.0, "overhead_s": 0.0,
        "request": {"model": "support", "user": "x", "messages": [{"role": "user", "content": "hi"}],
                    "metadata": {"task": "refund" if number % 2 else "cancel"}},
        "response_text": "yes",
    }  # fmt: skip
    return json.dumps({**told, **changes}) + "\n"


def test_logged_rows_become_work(tmp_path: Path) -> None:
    """The latest rows of the route with their own texts, lengths and tasks; arrivals and Little's law give
    the concurrency; failed rows, other routes, shadows' copies and torn lines are no work."""
    rows = [row(n) for n in range(6)]
    rows += [row(7, outcome="upstream_error"), row(8, route="other"), row(9, pair_id="r1")]
    (tmp_path / "requests-1.jsonl").write_text("".join(rows) + row(10)[:50])
    found = traffic_of(tmp_path, "support", 5, "metadata.task")
    assert [one.prompt_tokens for one in found.work] == [11, 12, 13, 14, 15]
    assert found.work[0].body == {"messages": [{"role": "user", "content": "hi"}]}
    assert {name: len(part) for name, part in by_task(found.work).items()} == {"refund": 3, "cancel": 2}
    assert found.requests_per_s == pytest.approx(1.0)
    assert found.concurrency == pytest.approx(2.0)
    with pytest.raises(DataError, match="no answered"):
        traffic_of(tmp_path, "nobody", 5)


def test_rows_without_texts_become_prompts_of_their_length(tmp_path: Path) -> None:
    """Counts alone are enough to tune on; the same row gives the same ids."""
    (tmp_path / "requests-1.jsonl").write_text(row(1, log_mode="metadata", request={}, response_text=None))
    one = traffic_of(tmp_path, "support", 5, vocabulary=100).work[0]
    assert one.endpoint == COMPLETIONS
    assert len(one.body["prompt"]) == 11
    assert all(3 <= token < 100 for token in one.body["prompt"])
    assert traffic_of(tmp_path, "support", 5, vocabulary=100).work[0] == one
    with pytest.raises(DataError):
        traffic_of(tmp_path, "support", 5)


def test_requests_are_as_long_as_they_were(tmp_path: Path) -> None:
    """Every setting does the same work: greedy, and exactly the logged length."""
    body = body_of("m", WORK[0], fixed=True)
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"], body["model"]) == (10, True, 0, "m")


def test_a_turns_figures() -> None:
    """p95s are of the requests; a token's time is of those after the first."""
    timed = [Timed(0.1 * n, 0.1 * n + 0.9, 10, "") for n in range(1, 101)]
    found = summary(timed, 4, 20.0)
    assert found.p95["ttft"] == pytest.approx(9.505)
    assert found.p95["tpot"] == pytest.approx(0.1)
    assert (found.requests_per_s, found.tokens_per_s) == (5.0, 50.0)
