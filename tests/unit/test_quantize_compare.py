"""The comparison's mechanics: going on, refusals as rows, inputs that must not mix (engine and compression
faked).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cli.main import app
from contracts.errors import ConfigError, DataError, EngineError, QuantizationError
from distill_jobs.config import EngineConfig
from distill_jobs.quantize import Made
from distill_jobs.quantizing import compare as module
from distill_jobs.quantizing.candidates import parse_candidate
from distill_jobs.quantizing.compare import Comparison, compare, read_data
from distill_jobs.quantizing.config import QuantizeConfig
from distill_jobs.quantizing.verify import Verdict
from tests.integration.pipeline_world import write_model
from tests.unit.test_teach import sample

BASE = QuantizeConfig(samples=2, scheme="MIXED")
SPEED = {"bf16": 100.0, "rtn-w4a16-g128": 120.0, "gptq-w4a16-g128": 110.0}
NATS = {"bf16": 1.0, "rtn-w4a16-g128": 1.05, "gptq-w4a16-g128": 1.01}


class World:
    """Stands for compression environment, engine and offline scorer; counts what is asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.broken: set[str] = set()
        self.dies: set[str] = set()
        self.death: BaseException = KeyboardInterrupt()
        for name in ("make", "run_engine", "verify_served"):
            monkeypatch.setattr(module, name, getattr(self, name))
        monkeypatch.setattr(module, "check", lambda config, model: model)

    def make(self, config: QuantizeConfig, model: Path, rows: Any, folder: Path, tell: Any) -> Made:
        """An artifact of as many bytes as its name has letters."""
        self.calls.append(f"make {config.precision}")
        (folder / "artifact").mkdir(parents=True, exist_ok=True)
        (folder / "artifact" / "model.safetensors").write_bytes(b"x" * len(config.precision))
        (folder / "result.json").write_text("{}")
        return Made(folder / "artifact", 1.0, {}, None)

    def run_engine(self, job: dict[str, Any], engine: EngineConfig) -> dict[str, Any]:
        """Scores of every row, the same for each of its tokens."""
        out = Path(job["out"])
        name = out.name if out.name == "bf16" else out.parent.name
        self.calls.append(f"engine {name}")
        if name in self.dies:
            raise self.death
        rows = [json.loads(line) for line in Path(job["score"]["rows"]).read_text().splitlines()]
        scores = [
            {
                "id": r["id"],
                "actual": [-NATS[name]] * len(r["completion"]),
                "topk_ids": [1, 2] * len(r["completion"]),
                "topk_logprobs": [-0.5, -1.5] * len(r["completion"]),
            }
            for r in rows
        ]
        out.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(scores), out / "scores.parquet")
        return {"speed": {"tokens_per_s": SPEED[name]}}

    def verify_served(self, student: Path, artifact: Path, *more: object) -> Verdict:
        """Damage where it was planted."""
        name = artifact.parent.name
        return Verdict(2.7, 2.7, 2.7, 0.0001, 0.01, "planted" if name in self.broken else None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A world in which everything works."""
    return World(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A student."""
    write_model(tmp_path / "model", hidden=128, layers=1, seed=1)
    return tmp_path / "model"


def job(model: Path, out: Path, *names: str, budget: int | None = None) -> Comparison:
    """Two rows, and these candidates."""
    base = BASE.model_copy(update={"budget_bytes": budget})
    return Comparison(
        model=model,
        out=out,
        candidates=tuple(parse_candidate(name, base) for name in names),
        rows=[{"id": 0, "ids": [1, 2], "completion": [3, 4]}, {"id": 1, "ids": [1], "completion": [5]}],
        calibration=[{"ids": [1, 2, 3]}],
        engine=EngineConfig(),
    )


RTN, GPTQ = "rtn-w4a16-g128", "gptq-w4a16-g128"


def test_figures_are_of_what_was_served(tmp_path: Path, world: World, model: Path) -> None:
    """Perplexity, loss against bf16, KL, bytes and speed of each candidate."""
    base, (rtn, gptq) = compare(job(model, tmp_path / "out", RTN, GPTQ), lambda _: None)
    assert base.perplexity == pytest.approx(2.71828, abs=1e-4)
    assert rtn.loss == pytest.approx(0.05127, abs=1e-4)
    assert gptq.loss == pytest.approx(0.01005, abs=1e-4)
    assert (rtn.kl, rtn.bytes, rtn.tokens_per_s) == (0.0, len(RTN), 120.0)
    assert rtn.served_gap == pytest.approx(0.0001, rel=1e-3)


def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path, world: World, model: Path) -> None:
    """What was measured is not measured again, what was quantized not quantized again."""
    world.dies = {GPTQ}
    with pytest.raises(KeyboardInterrupt):
        compare(job(model, tmp_path / "out", RTN, GPTQ), lambda _: None)
    world.dies, world.calls = set(), []
    _, found = compare(job(model, tmp_path / "out", RTN, GPTQ), lambda _: None)
    assert world.calls == [f"engine {GPTQ}"]
    assert [m.name for m in found] == [RTN, GPTQ]


def test_an_engine_that_died_is_asked_again(tmp_path: Path, world: World, model: Path) -> None:
    """This run says so and measures the others; the next one measures what is missing."""
    world.dies, world.death = {RTN}, EngineError("out of memory")
    _, (rtn, gptq) = compare(job(model, tmp_path / "out", RTN, GPTQ), lambda _: None)
    assert (rtn.refused, gptq.refused) == ("out of memory", None)
    world.dies, world.calls = set(), []
    _, (rtn, _) = compare(job(model, tmp_path / "out", RTN, GPTQ), lambda _: None)
    assert world.calls == [f"engine {RTN}"]
    assert rtn.perplexity == pytest.approx(2.8577, abs=1e-4)


def test_a_damaged_candidate_is_a_row_that_says_why(tmp_path: Path, world: World, model: Path) -> None:
    """The others are still measured, and the damaged one has no figures to be chosen by."""
    world.broken = {RTN}
    _, (rtn, gptq) = compare(job(model, tmp_path / "out", RTN, GPTQ), lambda _: None)
    assert rtn.refused is not None
    assert "planted" in rtn.refused
    assert rtn.perplexity is None
    assert gptq.refused is None


def test_one_folder_holds_one_comparison(tmp_path: Path, world: World, model: Path) -> None:
    """Other rows or another engine would make figures that cannot be compared."""
    first = job(model, tmp_path / "out", RTN)
    compare(first, lambda _: None)
    with pytest.raises(ConfigError, match="another rows"):
        compare(Comparison(**{**vars(first), "rows": first.rows[:1]}), lambda _: None)
    engine = EngineConfig(kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match="another engine"):
        compare(Comparison(**{**vars(first), "engine": engine}), lambda _: None)


def test_another_budget_is_another_artifact(
    tmp_path: Path, world: World, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name does not tell budgets apart, so the older artifact is made anew and not taken for this one."""
    monkeypatch.setitem(SPEED, "gptq-mixed-g128", 90.0)
    monkeypatch.setitem(NATS, "gptq-mixed-g128", 1.0)
    for budget in (10**6, 2 * 10**6, 2 * 10**6):
        compare(job(model, tmp_path / "out", "gptq-mixed", budget=budget), lambda _: None)
    assert world.calls.count("make gptq-mixed-g128") == 2


def test_rows_that_calibrate_are_not_measured_on(tmp_path: Path, model: Path) -> None:
    """Of a JSONL file every second row calibrates; of a collection, its calibration split."""
    lines = [
        {"request": {"messages": [{"role": "user", "content": f"where is {n}"}]}, "answer": f"there {n}"}
        for n in range(9)
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, calibration = read_data(file, model, BASE.model_copy(update={"samples": 4}), 5, 512)
    measured = {tuple(r["ids"] + r["completion"]) for r in rows}
    assert (len(rows), len(calibration)) == (5, 4)
    assert not measured & {tuple(r["ids"]) for r in calibration}
    for side, names in (("calibration", "c"), ("validation", "v"), ("train", "tu")):
        (tmp_path / "collect" / side).mkdir(parents=True)
        table = pa.Table.from_pylist([sample(name, f"answer {name}") for name in names])
        pq.write_table(table, tmp_path / "collect" / side / "part-00000.parquet")
    rows, calibration = read_data(tmp_path / "collect", model, BASE, 5, 512)
    assert (len(rows), len(calibration)) == (1, 2)


def test_data_that_is_none_is_an_error(tmp_path: Path, model: Path) -> None:
    """Neither a collection nor a file, or a file whose requests have no answers."""
    with pytest.raises(ConfigError, match="--data"):
        read_data(tmp_path / "gone", model, BASE, 5, 512)
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"request": {"messages": [{"role": "user", "content": "é"}]}}) + "\n")
    with pytest.raises(DataError, match="too little"):
        read_data(file, model, BASE, 5, 512)


def test_the_command_prints_the_front_and_says_the_rule(tmp_path: Path, world: World, model: Path) -> None:
    """Table, choice, report and plot; exit 3 when no candidate is good enough, 1 for a wrong candidate."""
    lines = [
        {"request": {"messages": [{"role": "user", "content": f"where is {n}"}]}, "answer": f"there {n}"}
        for n in range(6)
    ]
    file, out = tmp_path / "d.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--out", str(out), "--data", str(file), "--candidates", f"{RTN},{GPTQ}"]
    command = ["quantize", str(model), *given]
    done = CliRunner().invoke(app, [*command, "--max-loss", "0.02"])
    assert done.exit_code == 0, done.output
    assert "The rule: of the front, with a perplexity at most 2.00% above bf16" in done.output
    report = json.loads((out / "report.json").read_text())
    assert report["chosen"].endswith(f"{GPTQ}/artifact")
    assert [row["name"] for row in report["rows"]] == ["bf16", RTN, GPTQ]
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, [*command, "--max-loss", "0.001"]).exit_code == 3
    wrong = CliRunner().invoke(app, [*command[:-1], "awq-w9"])
    assert wrong.exit_code == 1
    assert "is no candidate" in wrong.output


def test_a_refusal_names_the_artifact() -> None:
    """The verdict's error is what the row and the pipeline show."""
    with pytest.raises(QuantizationError, match="a-folder is damaged"):
        Verdict(2, 2, 2, 0, 0, "planted").check("a-folder")
