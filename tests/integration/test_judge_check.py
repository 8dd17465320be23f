"""`stillhouse judge check` against a real HTTP judge: what it prints, stores and decides."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from contracts.grading import JudgeCheck, JudgeGrader
from contracts.traffic import Upstream
from serve.grading.judge import evidence_name
from serve.grading.sampling import canary_first
from serve.state.judges import JudgeState
from serve.state.tables import open_state
from tests.integration.router_rig import ROOT, Fake

pytestmark = pytest.mark.integration
ASKED = {"messages": [{"role": "user", "content": "2+2?"}]}


@pytest.fixture(scope="module")
def engine() -> Iterator[Fake]:
    made = Fake(text="VERDICT: A", tokens=1)
    yield made
    made.stop()


def stack(folder: Path, engine: Fake, **grader: Any) -> tuple[Path, str]:
    """A configuration with one judge, and the judge's name with its version."""
    spec = {"kind": "judge", "upstream": "judge", **grader}
    file = folder / "stack.yaml"
    upstreams = {"judge": {"url": engine.url, "model": "wise"}, "teacher": {"url": engine.url, "model": "m"}}
    routes = {"support": "teacher"}
    run = {"run_dir": str(folder / "run"), "upstreams": upstreams, "routes": routes}
    file.write_text(yaml.safe_dump({**run, "graders": {"helpful": spec}}))
    upstream = Upstream(name="judge", model="wise", url=engine.url)
    return file, evidence_name("helpful", JudgeGrader.model_validate(spec), upstream)


def check(config: Path, rows: list[dict[str, Any]], *options: str) -> subprocess.CompletedProcess[str]:
    anchors = config.parent / "anchors.jsonl"
    anchors.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "cli.main", "judge", "check", "helpful", "--anchors", str(anchors)]
    return subprocess.run(
        [*command, "--config", str(config), *options],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=120,
    )  # fmt: skip


def stored(config: Path, name: str) -> JudgeCheck | None:
    return JudgeState(open_state(f"sqlite:///{config.parent}/run/state.db")).latest(name)


def pair(human: str) -> dict[str, Any]:
    return {"request": ASKED, "answer_a": "four", "answer_b": "five", "human": human}


def test_a_judge_that_says_the_first_is_found_out(tmp_path: Path, engine: Fake) -> None:
    """It agrees as often as the drawn order does, which is by chance: not passed, exit status 1, stored."""
    engine.control(text="VERDICT: A")
    config, name = stack(tmp_path, engine)
    done = check(config, [pair("a")] * 24, "--json", "--by", "ann")
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    agreed = sum(canary_first(name, str(i)) for i in range(24))
    assert (said["anchors"], said["agreed"], said["passed"]) == (24, agreed, False)
    assert (said["first_share"], said["flipped"], said["abstained"]) == (1.0, 1.0, 0)
    kept = stored(config, name)
    assert kept is not None
    assert (kept.agreed, kept.by, kept.grader) == (agreed, "ann", name)
    seen = engine.status()["last"]["body"]
    assert (seen["model"], seen["temperature"]) == ("wise", 0)


def test_a_judge_that_agrees_passes(tmp_path: Path, engine: Fake) -> None:
    """21 of 24 ties: printed with its interval, kappa and bias; stored for seven days."""
    engine.control(text="VERDICT: TIE")
    config, name = stack(tmp_path, engine)
    done = check(config, [pair("tie")] * 21 + [pair("a")] * 3)
    assert done.returncode == 0, done.stderr
    assert "agreement 87.5 % (21 of 24; 95 % interval 69.0 to 95.7 %)" in done.stdout
    assert "Cohen's kappa 0.00" in done.stdout
    assert "the order changed 0 % of the verdicts" in done.stdout
    assert "Passed; good for 7 days" in done.stdout
    kept = stored(config, name)
    assert kept is not None
    assert kept.agreement == 0.875


def test_scores_are_checked_against_peoples(tmp_path: Path, engine: Fake) -> None:
    """Within a fifth is agreement; there is no order to be biased by."""
    engine.control(text="SCORE: 7")
    config, name = stack(tmp_path, engine, pairwise=False, min_anchors=4, min_agreement=0.75)
    rows = [{"request": ASKED, "answer": "four", "human_score": s} for s in (0.6, 0.9, 0.7, 0.1)]
    done = check(config, rows, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["agreed"], said["first_share"], said["passed"]) == (3, None, True)
    kept = stored(config, name)
    assert kept is not None
    assert kept.anchors == 4


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([pair("tie"), {"request": ASKED, "answer": "x"}], r"anchors.jsonl:2: the line: give 'answer_a'"),
        ([{"request": ASKED, "answer": "x", "human_score": 1}], "needs anchors with 'answer_a'"),
        ([pair("c")], "anchors.jsonl:1: human:"),
        ([], "holds no anchors"),
    ],
)
def test_odd_anchors_are_named_by_their_line(
    tmp_path: Path, engine: Fake, rows: list[dict[str, Any]], why: str
) -> None:
    """Nothing is asked or stored."""
    config, name = stack(tmp_path, engine)
    done = check(config, rows)
    assert done.returncode == 1
    assert why in " ".join(done.stderr.split())
    assert stored(config, name) is None


def test_a_silent_judge_is_no_result(tmp_path: Path, engine: Fake) -> None:
    """An upstream that fails is an error to try again after, not a judge that disagrees."""
    engine.control(status=500)
    config, name = stack(tmp_path, engine)
    done = check(config, [pair("a")] * 3)
    engine.control(status=200)
    assert done.returncode == 1
    assert "judge judge: answered 500. Nothing was stored" in " ".join(done.stderr.split())
    assert stored(config, name) is None


def test_what_is_no_judge_is_not_found(tmp_path: Path, engine: Fake) -> None:
    """With the judges that there are."""
    config, _ = stack(tmp_path, engine)
    command = [sys.executable, "-m", "cli.main", "judge", "check", "nobody", "--anchors", "x"]
    done = subprocess.run(
        [*command, "--config", str(config)], capture_output=True, text=True, cwd=ROOT, check=False, timeout=60
    )
    assert (done.returncode, "no judge 'nobody'; there are: helpful" in done.stderr) == (1, True)
