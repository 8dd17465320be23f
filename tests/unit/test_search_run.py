"""A whole student search on tiny models: trained, killed, resumed, timed, reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig
from typer.testing import CliRunner

from cli.main import app
from contracts.config import load_config, parse_config
from contracts.errors import ConfigError, DataError
from distill_jobs.config import DistillConfig
from distill_jobs.search.config import SearchConfig
from distill_jobs.search.report import winner, write_report
from distill_jobs.search.search import Found, Outcome, Search
from distill_jobs.search.space import Candidate, Frame, Shape
from distill_jobs.search.students import Students, round_to, train_config
from distill_jobs.training.data import Rows
from distill_jobs.training.method_config import LoraConfig
from tests.integration.pipeline_world import config_of, write_model
from tests.unit.teacher_world import rows_folder

HALVING = {"candidates": 8, "rungs": 2, "eta": 2, "tokens": 640}
SPACE = {"layers": [1, 2], "intermediate": [64, 128], "precision": ["bf16", "w4a16-g32"]}


class World:
    """A teacher of two blocks, rows, a job and a search over it; engines are timed by a formula."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write_model(root / "teacher", hidden=64, layers=2, seed=0)
        for name, seed in (("rows", 3), ("held-out", 4)):
            rows_folder(root / name, count=24, seed=seed)
        job = config_of(root)
        job["train"] = {
            "batch_rows": 8, "max_length": 32, "checkpoint_steps": 2, "threads": 1,
            "loss": {"kd_weight": 0.0, "hard_weight": 1.0},
        }  # fmt: skip
        (root / "job.yaml").write_text(json.dumps(job))
        self.job = parse_config(job, DistillConfig)
        self.said: list[str] = []
        self.timed: list[str] = []

    def config(self, **changes: Any) -> SearchConfig:
        data = {
            "folder": str(self.root / "search"), "distill": str(self.root / "job.yaml"),
            "rows": str(self.root / "rows"), "held_out": str(self.root / "held-out"),
            "budget": {"bytes": 10**9}, "space": SPACE, "halving": HALVING, "importance_rows": 8,
        }  # fmt: skip
        return parse_config(data | changes, SearchConfig)

    def search(self, **changes: Any) -> Search:
        config = self.config(**changes)
        rows, held_out = self.root / "rows", self.root / "held-out"
        return Search(config, self.job, rows, held_out, self.said.append, self._timer)

    def search_frame(self) -> Frame:
        return Frame.of(AutoConfig.from_pretrained(self.root / "teacher"))

    def _timer(self, one: Candidate, start: Path) -> float:
        assert (start / "config.json").is_file()
        self.timed.append(one.name)
        step = 1e-3 + 5e-4 * one.shape.layers
        return 32 / step


@pytest.fixture
def world(tmp_path: Path) -> World:
    """One world a test."""
    torch.set_num_threads(1)
    return World(tmp_path)


def _table(outcome: Outcome) -> list[tuple[str, int, int, float]]:
    return [(one.candidate.name, one.rung, one.tokens, round(one.loss, 6)) for one in outcome.found]


def test_a_search_trains_halves_times_and_leaves_a_job(world: World) -> None:
    """Eight candidates of four shapes on the first rung, four on the second, the best of those chosen; each
    shape is trained once for both precisions; the job that is left cuts the shape and is a valid one."""
    search = world.search()
    outcome = search.run()
    assert [(rung.candidates, rung.tokens) for rung in outcome.plan] == [(8, 320), (4, 640)]
    assert [one.rung for one in outcome.found] == [1] * 4 + [0] * 4
    assert outcome.chosen == outcome.found[0]
    assert outcome.chosen.loss == min(one.loss for one in outcome.found if one.rung == 1)
    assert all(one.tokens >= (320, 640)[one.rung] for one in outcome.found)
    by_shape: dict[tuple[str, int], set[int]] = {}
    for one in outcome.found:
        by_shape.setdefault((one.candidate.shape.name, one.rung), set()).add(one.tokens)
    assert all(len(tokens) == 1 for tokens in by_shape.values())
    assert sorted(world.timed) == sorted(one.candidate.name for one in outcome.found[:4])
    write_report(search.config, world.job, outcome)
    folder = world.root / "search"
    report = json.loads((folder / "report.json").read_text())
    assert report["chosen"] == outcome.chosen.candidate.name
    assert {row["name"] for row in report["rows"] if row["front"]} >= {report["rows"][0]["name"]}
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    made = load_config(folder / "winner.yaml", DistillConfig)
    shape = outcome.chosen.candidate.shape
    assert made.train.shrink is not None
    assert made.train.shrink.shape == vars(shape)
    assert (made.student, made.workdir) == (world.job.teacher, world.job.workdir)
    if outcome.chosen.candidate.precision != "bf16":
        assert (made.quantize.scheme, made.quantize.group_size) == ("W4A16", 32)


def test_a_killed_search_goes_on_and_finds_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within a training, between a student's state and its result, and on the second rung: what is
    finished is not trained again, and the outcome is that of a search that nobody killed."""
    whole = world.search(folder=str(world.root / "whole")).run()
    steps: list[tuple[str, int]] = []
    advance, left = Students.advance, [5]

    def counted(self: Students, shape: Any, tokens: int, on_step: Any) -> Any:
        def tell(done: int, total: int) -> None:
            steps.append((shape.name, done))
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            on_step(done, total)

        return advance(self, shape, tokens, tell)

    monkeypatch.setattr(Students, "advance", counted)
    killed = 0
    while True:
        try:
            found = world.search().run()
            break
        except KeyboardInterrupt:
            killed += 1
            left[0] = 5
    assert killed >= 3
    assert _table(found) == _table(whole)
    assert len(steps) - len(set(steps)) <= killed * world.job.train.checkpoint_steps
    again = world.search().run()
    assert _table(again) == _table(whole)
    assert left[0] > 0, "a finished search trains nothing"


def test_a_survivor_goes_on_from_its_own_checkpoint(world: World) -> None:
    """Advancing to a rung and then to the next is advancing to the next at once, bit for bit."""
    rows = Rows(world.root / "rows", 32, False)
    search = world.search()
    search._open()
    search.students.train = train_config(world.job.train, rows, 320, 640, 1)
    shape = search.frame.largest
    ticks: list[int] = []
    search.students.advance(shape, 320, lambda done, _: ticks.append(done))
    first = len(ticks)
    stepwise, tokens = search.students.advance(shape, 640, lambda done, _: ticks.append(done))
    assert ticks == sorted(set(ticks))
    assert 0 < first < len(ticks)
    other = world.search(folder=str(world.root / "other"))
    other._open()
    other.students.train = search.students.train
    at_once, same = other.students.advance(shape, 640, lambda *_: None)
    assert tokens == same
    for name, tensor in stepwise.state_dict().items():
        assert torch.equal(tensor, at_once.state_dict()[name]), name


def test_precision_is_measured_rounded_and_the_training_is_not_touched(world: World) -> None:
    """bf16 loses what the model loses; 4 bits give another loss, sixteen values a group, and
    leave the model's own weights and the embedding alone."""
    search = world.search()
    search._open()
    rows = Rows(world.root / "rows", 32, False)
    search.students.train = train_config(world.job.train, rows, 320, 640, 1)
    model, _ = search.students.advance(search.frame.largest, 100, lambda *_: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = {name: search.students.loss(model, name) for name in ("bf16", "w8a8", "w4a16-g32")}  # type: ignore[misc]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert len(set(losses.values())) == 3
    with torch.no_grad():
        round_to(model, "w4a16-g32")
    groups = model.get_decoder().layers[0].mlp.up_proj.weight.detach().reshape(-1, 32)
    assert max(len(set(group.tolist())) for group in groups) <= 16
    assert torch.equal(model.get_decoder().embed_tokens.weight, before["model.embed_tokens.weight"])


def test_what_is_surely_too_slow_is_not_trained_and_the_engine_decides(world: World) -> None:
    """Students of one block take 1.5 ms a step, of two 2 ms. A budget of 1.55 ms drops the deeper ones before
    any training, one of 1.7 ms (a prediction may err) after they were timed; at 0.9 ms nothing is left, which
    is an error that names who comes nearest."""
    near = world.search(folder=str(world.root / "a"), budget={"tpot_ms": 1.7}).run()
    assert {one.candidate.shape.layers for one in near.found} == {1, 2}
    last = [one for one in near.found if one.rung == 1]
    assert all(one.fits == (one.candidate.shape.layers == 1) for one in last)
    assert near.chosen == next((one for one in last if one.candidate.shape.layers == 1), None)
    assert near.model is not None
    assert near.model.worst < 0.01
    only = world.search(folder=str(world.root / "b"), budget={"tokens_per_s": 32 / 1.55e-3}).run()
    assert {one.candidate.shape.layers for one in only.found} == {1}
    assert only.chosen is not None
    with pytest.raises(DataError, match="l1-"):
        world.search(folder=str(world.root / "c"), budget={"tpot_ms": 0.9}).run()


def test_another_search_does_not_go_on_in_the_folder(world: World) -> None:
    """Other rows, another space or another training: named, and nothing is overwritten."""
    search = world.search(halving={**HALVING, "rungs": 1, "tokens": 64})
    search.run()
    before = (world.root / "search" / "search.json").read_text()
    with pytest.raises(ConfigError, match="another setting halving"):
        world.search().run()
    rows_folder(world.root / "rows", count=25, seed=9)
    with pytest.raises(ConfigError, match="another rows"):
        world.search(halving={**HALVING, "rungs": 1, "tokens": 64}).run()
    assert (world.root / "search" / "search.json").read_text() == before


def test_a_state_that_is_none_and_a_job_of_adapters_are_refused(world: World) -> None:
    """Each with what to do, and the job's file is what the message names."""
    (world.root / "search").mkdir()
    (world.root / "search" / "search.json").write_text("{ torn")
    with pytest.raises(ConfigError, match=r"Remove .*search to search anew"):
        world.search().run()
    world.job = world.job.model_copy(
        update={"train": world.job.train.model_copy(update={"lora": LoraConfig()})}
    )
    with pytest.raises(ConfigError, match=r"train\.lora"):
        world.search().run()


def test_the_winners_precision_takes_the_place_of_the_jobs(world: World) -> None:
    """A job that quantized otherwise, in a format that the winner cannot have, is still a valid job."""
    config = world.job.quantize.model_copy(update={"scheme": "W4A16", "format": "awq", "samples": 9})
    job = world.job.model_copy(update={"quantize": config})
    candidate = Candidate(Shape(1, 64, 64, 4, 2), "w8a8", 1, 1)
    made = winner(world.config(), job, Found(candidate, 0, 1, 1.0, None, True), world.search_frame())
    assert made["quantize"] == {"samples": 9, "max_tokens": 128, "scheme": "W8A8", "granularity": "channel"}


def test_from_scratch_the_job_that_is_left_makes_the_shape(world: World) -> None:
    """start: random draws the shape by the seed; the job trains the same shape from random weights."""
    space = {"layers": [1], "hidden": [32], "heads": [2], "kv_heads": [1], "precision": ["w4a16-g32"]}
    search = world.search(start="random", space=space, halving={**HALVING, "rungs": 1, "tokens": 64})
    outcome = search.run()
    write_report(search.config, world.job, outcome)
    made = load_config(world.root / "search" / "winner.yaml", DistillConfig)
    assert made.train.shape is not None
    assert (made.train.shape.layers, made.train.shape.hidden_size, made.train.shape.heads) == (1, 32, 2)
    assert made.train.shrink is None


def test_the_rate_rises_within_the_first_rung_and_then_stays(world: World) -> None:
    """So every rung is comparable and nobody waits for a fall that a later rung would need."""
    rows = Rows(world.root / "rows", 32, False)
    config = train_config(world.job.train, rows, first=1000, most=9000, threads=2)
    a_step = 8 * float(np.mean(rows.lengths))
    assert config.max_steps is not None
    assert config.max_steps * a_step > 9000
    assert config.optimizer.schedule == "constant"
    assert config.optimizer.warmup * config.max_steps * a_step <= 101
    assert (config.workers, config.threads, config.shrink) == (1, 2, None)


def test_the_command_prints_its_plan_and_refuses_with_a_reason(world: World) -> None:
    """`--dry-run` trains nothing; a missing job or folder is one line and exit code 1."""
    file = world.root / "search.yaml"
    file.write_text(yaml.safe_dump(json.loads(world.config().model_dump_json(exclude_defaults=True))))
    shown = CliRunner().invoke(app, ["search", str(file), "--dry-run"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    assert "rung 2: 4 candidates, 640 tokens each" in shown.output
    assert "l1-h64-i64-q4-k2-w4a16-g32" in shown.output
    assert not (world.root / "search").exists()
    missing = world.config().model_copy(update={"rows": world.root / "none"})
    file.write_text(yaml.safe_dump(json.loads(missing.model_dump_json(exclude_defaults=True))))
    refused = CliRunner().invoke(app, ["search", str(file)])
    assert refused.exit_code == 1
    assert "rows: there is no folder" in " ".join(refused.output.split())


def test_the_example_and_the_guide_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """configs/search-support.yaml and every YAML block of the guide are searches; the example's space has
    something within its budget."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    text = (root / "docs/guides/search.md").read_text(encoding="utf-8")
    (block,) = [part.split("```")[0] for part in text.split("```yaml\n")[1:]]
    guide = parse_config(yaml.safe_load(block), SearchConfig)
    example = load_config(root / "configs/search-support.yaml", SearchConfig)
    assert guide.halving == example.halving
    assert guide.space.layers == example.space.layers
    shown = CliRunner().invoke(app, ["search", "configs/search-support.yaml", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "rung 1: 27 candidates, 166,666 tokens each" in shown.output
