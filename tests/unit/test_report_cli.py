"""`rollout report` and `rollout board` against a real state store, and where their prices come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from contracts.config import parse_config
from contracts.errors import ConfigError, DataError, NotFoundError
from contracts.metrics import PAIR, SCORE_STEPS, ArmCounts
from contracts.price import Price
from contracts.rollout import LedgerEntry, Phase
from contracts.traffic import Arm
from serve.config import ServeConfig
from serve.rollout import cli, cli_report
from serve.rollout.cli_stack import StackHandle, open_stack
from serve.rollout.report.model import Report
from serve.state.outbox import OutboxState
from tests.unit import report_log
from tests.unit.rollout_world import World

runner = CliRunner()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world with a request log, and the commands bound to it."""
    made = World(tmp_path)
    log = report_log.write(tmp_path / "requests", [report_log.row(1, made.spec.id, Arm.CANARY, grade=False)])
    stack = StackHandle(
        made.rollouts,
        made.traffic,
        OutboxState(made.engine),
        {},
        lambda: None,  # type: ignore[arg-type,return-value]
        request_log=log,
        reports=tmp_path / "reports",
        prices={"teacher": Price(per_hour=1.0)},
    )
    monkeypatch.setattr(cli_report, "open_stack", lambda config: stack)
    return made


def run(*args: str) -> str:
    """Run a command; its error propagates as the CLI's main would see it."""
    result = runner.invoke(cli.app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_three_files_with_the_same_facts(world: World, tmp_path: Path) -> None:
    """The route's latest rollout by default, into the run's folder; the JSON is the report."""
    world.until()
    out = run("report", "support").replace("\n", "")
    folder = tmp_path / "reports" / world.spec.id
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    found = Report.model_validate_json((folder / "report.json").read_text())
    assert (found.id, found.decision) == (world.spec.id, "promoted")
    assert len(found.examples.shown) == 1
    assert "was promoted" in out
    assert found.model_ref in (folder / "report.html").read_text()


def test_one_by_id_and_without_texts(world: World, tmp_path: Path) -> None:
    """--id, --out and --examples 0: nothing that anybody wrote leaves the log."""
    world.until(Phase.RAMPING)
    run("report", "--id", world.spec.id, "--out", str(tmp_path / "here"), "--examples", "0")
    assert "Where is order 1?" not in (tmp_path / "here" / "report.html").read_text()
    assert json.loads((tmp_path / "here" / "report.json").read_text())["phase"] == "ramping"


def test_what_is_not_there_is_said(world: World, tmp_path: Path) -> None:
    """Unknown routes list the known ones; a folder that cannot be written names the option."""
    with pytest.raises(NotFoundError, match="'billing' never had a rollout; routes: support"):
        run("report", "billing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        run("report", "support", "--out", str(tmp_path / "file"))


def judged(world: World, seq: int, judge: str, lost: int, tied: int, won: int) -> None:
    """Let somebody judge pairs of the world's rollout."""
    scores = [0] * (SCORE_STEPS + 1)
    scores[0], scores[SCORE_STEPS // 2], scores[-1] = lost, tied, won
    entry = LedgerEntry(
        replica=f"judge-{judge}", seq=seq, route="support", rollout_id=world.spec.id, arm=PAIR,
        split_version=world.split.version, at=world.now, counts=ArmCounts(scores={judge: tuple(scores)}),
    )  # fmt: skip
    world.traffic.append_ledger([entry])


def test_the_board_counts_judged_pairs(world: World) -> None:
    """Every rollout's pairs are games of its candidate against the stable upstream of its time."""
    world.until(Phase.RAMPING)
    judged(world, 1, "helpful", lost=20, tied=10, won=70)
    world.until()
    (first, second) = json.loads(run("board", "support", "--json"))["rows"]
    assert (first["model"], first["won"], first["tied"], first["lost"]) == ("student-v1", 70, 10, 20)
    assert (second["model"], second["elo"], second["games"]) == ("teacher", 0.0, 100)
    assert first["win_share"] == pytest.approx(0.75, abs=0.01)
    assert first["low"] < first["elo"] < first["high"]
    assert "student-v1" in run("board", "support")


def test_judges_are_not_mixed(world: World) -> None:
    """Two judges are two scales: one must be named; without any pairs the message says what makes some."""
    with pytest.raises(NotFoundError, match="has no judged pairs"):
        run("board", "support")
    world.until(Phase.RAMPING)
    judged(world, 1, "helpful", 1, 0, 3)
    judged(world, 1, "polite", 3, 0, 1)
    world.until()
    with pytest.raises(DataError, match="--judge: helpful, polite"):
        run("board", "support")
    assert json.loads(run("board", "support", "--judge", "polite", "--json"))["rows"][0]["model"] == "teacher"
    with pytest.raises(NotFoundError, match="judges: helpful, polite"):
        run("board", "support", "--judge", "nobody")


def config(**changes: Any) -> dict[str, Any]:
    """A stack with priced upstreams."""
    base = {
        "upstreams": {
            "big": {"url": "https://api.example.com", "model": "big", "cost": {"per_hour": 2.5}},
            "small": {"engine": {"model": "some/model"}},
        },
        "routes": {"support": "big"},
        "students": {"num_replicas": 2, "cost": {"prompt_per_million": 0.1, "completion_per_million": 0.4}},
    }
    return {**base, **changes}


def test_prices_come_from_the_configuration(tmp_path: Path) -> None:
    """Upstreams and students have prices, and the engine of a student is started without them."""
    file = tmp_path / "stack.yaml"
    file.write_text(json.dumps(config(run_dir=str(tmp_path / "run"))))
    stack = open_stack(str(file))
    assert stack.prices == {"big": Price(per_hour=2.5)}
    assert stack.student_price == Price(prompt_per_million=0.1, completion_per_million=0.4)
    assert stack.request_log == tmp_path / "run" / "requests"
    assert stack.reports == tmp_path / "run" / "reports"
    students = parse_config(config(), ServeConfig).students
    assert students.options().num_replicas == 2
    assert "cost" not in students.options().model_dump()


def test_half_a_price_is_refused() -> None:
    """A forgotten completion price would make every answer look free."""
    wrong = config(
        upstreams={"big": {"url": "https://x.example", "model": "b", "cost": {"prompt_per_million": 1}}}
    )
    with pytest.raises(ConfigError, match=r"upstreams\.big\.cost"):
        parse_config(wrong, ServeConfig)
