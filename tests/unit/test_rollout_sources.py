"""What a policy's metrics need before a rollout starts: graders that exist, judges that people agree with."""

from __future__ import annotations

from typing import Any

import pytest

from contracts.errors import ConfigError, GateError
from contracts.grading import GraderSet, JudgeCheck
from contracts.metrics import MetricSpec
from contracts.rollout import Phase, RolloutSpec
from contracts.traffic import Split, Upstream
from registry.digest import digest_folder
from registry.fake import FakeRegistry
from serve.rollout.policy import RolloutPolicy
from serve.rollout.sources import Sources
from serve.rollout.start import start_rollout
from serve.state.judges import JudgeState
from serve.state.tables import open_state
from tests.unit.rollout_world import World, demo_policy, record

NOW = 10 * 86400.0
BIG = Upstream(name="big", model="m", url="http://h:1")
SPLIT = Split(route="support", version=1, salt="s", stable=BIG)
GRADERS = {
    "shape": {"kind": "json_schema", "schema": {}},
    "sales": {"kind": "regex", "pattern": "x", "routes": ["sales"]},
    "unpaired": {"kind": "regex", "pattern": "x", "against": None},
    "helpful": {"kind": "judge", "upstream": "big"},
    "marks": {"kind": "judge", "upstream": "big", "pairwise": False, "min_agreement": 0.7},
}


def sources(check: JudgeCheck | None = None, **changes: Any) -> Sources:
    graders = GraderSet.model_validate({"graders": {**GRADERS, **changes}}).graders
    return Sources(graders, {"big": BIG}, latest_check=lambda _name: check, clock=lambda: NOW)


def policy(mirror: float = 0.1, **metric: Any) -> RolloutPolicy:
    return RolloutPolicy(metrics=(MetricSpec.model_validate({"margin": 0.1, **metric}),), mirror=mirror)


def check(**fields: Any) -> JudgeCheck:
    base = {
        "name": "helpful", "grader": "helpful-1", "at": NOW - 60, "by": "ann", "anchors": 50, "agreed": 45,
        "agreement": 0.9, "low": 0.8, "high": 0.95, "kappa": 0.8,
    }  # fmt: skip
    return JudgeCheck.model_validate({**base, **fields})


@pytest.mark.parametrize(
    ("metric", "mirror", "why"),
    [
        ({"kind": "quality", "grader": "shap"}, 0.0, r"no grader 'shap'; there are: helpful, marks, sales"),
        ({"kind": "quality", "grader": "sales"}, 0.0, r"is not for route 'support'"),
        ({"kind": "score", "grader": "helpful"}, 0.0, r"only compares pairs; use kind 'pairs'"),
        ({"kind": "pairs", "grader": "helpful"}, 0.0, r"give the policy 'mirror'"),
        ({"kind": "pairs", "grader": "unpaired"}, 0.1, r"grades no pairs"),
        ({"kind": "pairs", "grader": "feedback"}, 0.1, r"no grader 'feedback'"),
    ],
)
def test_a_metric_that_could_have_no_data_is_refused(metric: dict[str, Any], mirror: float, why: str) -> None:
    """With the metric and the fix, instead of a rollout that waits for its deadline."""
    with pytest.raises(ConfigError, match=why):
        sources(check()).prepare(policy(mirror, **metric), SPLIT)


@pytest.mark.parametrize(
    "metric", [{"kind": "quality", "grader": "shape"}, {"kind": "score", "grader": "feedback"}]
)
def test_what_needs_no_check_passes_as_it_is(metric: dict[str, Any]) -> None:
    """Pure graders and users need nobody's blessing, and keep their names."""
    wanted = policy(0.0, **metric)
    assert sources().prepare(wanted, SPLIT, "why") == (wanted, "why")


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (None, "was never checked against people's judgements"),
        (check(at=NOW - 8 * 86400), "was last checked 8 days ago, at most 7 are allowed"),
        (check(anchors=19, agreed=19, agreement=1.0), "was checked on 19 anchors, at least 20"),
        (check(agreed=39, agreement=0.78), "agreed with people on 78 % of 50 anchors, at least 80 %"),
    ],
)
def test_a_judge_that_decides_needs_a_check_that_passed(last: JudgeCheck | None, why: str) -> None:
    """Never, too old, too small, too often wrong: refused with the command; as information it may run; by
    force it may decide, and the audit says so.
    """
    found, wanted = sources(last), policy(kind="pairs", grader="helpful")
    with pytest.raises(GateError, match=rf"{why}.*stillhouse judge check helpful --anchors"):
        found.prepare(wanted, SPLIT)
    with pytest.raises(GateError, match=why):
        found.prepare(policy(kind="pairs", grader="helpful", role="objective"), SPLIT)
    found.prepare(policy(kind="pairs", grader="helpful", role="info"), SPLIT)
    forced = "forced past the check of judge helpful"
    assert found.prepare(wanted, SPLIT, "", force=True)[1] == forced
    assert found.prepare(wanted, SPLIT, "hurry", force=True)[1] == f"hurry; {forced}"
    assert sources(check()).prepare(wanted, SPLIT, "fine", force=True)[1] == "fine"


def test_a_judge_is_pinned_to_its_version() -> None:
    """The spec counts one version's scores under the metric's own name; another rubric is another version."""
    (first,) = sources(check()).prepare(policy(kind="pairs", grader="helpful"), SPLIT)[0].metrics
    assert first.grader.startswith("helpful-")
    assert first.key == "pairs.helpful"
    changed = {"helpful": {**GRADERS["helpful"], "rubric": "other"}}
    (second,) = sources(check(), **changed).prepare(policy(kind="pairs", grader="helpful"), SPLIT)[0].metrics
    assert second.grader != first.grader
    assert MetricSpec.model_validate_json(first.model_dump_json()) == first


def test_a_forced_start_says_so_in_the_audit(tmp_path: Any) -> None:
    """Without a check nothing is created; with --force the rollout's first line names the judge and why."""
    world, registry = World(tmp_path), FakeRegistry()
    world.ask("abort")
    world.until(Phase.ABORTED)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    artifact = record().artifact.model_copy(update={"digest": digest_folder(tmp_path / "model")})
    registry.publish(record().model_copy(update={"version": None, "artifact": artifact}), tmp_path / "model")
    judged = demo_policy(metrics=policy(kind="pairs", grader="helpful").metrics, mirror=0.1, cooldown_s=0.0)

    def start(force: bool) -> RolloutSpec:
        return start_rollout(
            world.rollouts, world.traffic, registry, judged, "support", "student:1",
            by="ann", reason="hurry", force=force, sources=sources(),
        )  # fmt: skip

    with pytest.raises(GateError, match="never checked"):
        start(force=False)
    assert world.rollouts.active("support") == []
    spec = start(force=True)
    assert spec.created_by == "ann (hurry; forced past the check of judge helpful)"
    assert spec.mirror == 0.1
    assert spec.metrics[0].grader.startswith("helpful-")


def test_the_latest_check_of_a_version_counts(tmp_path: Any) -> None:
    """Checks are kept by the judge's name with its version; the last one stored is the one that counts."""
    state = JudgeState(open_state(f"sqlite:///{tmp_path}/s.db"))
    assert state.latest("helpful-1") is None
    state.add(check())
    state.add(check(agreed=10, agreement=0.2))
    state.add(check(grader="helpful-2"))
    assert state.latest("helpful-1") == check(agreed=10, agreement=0.2)
    assert state.latest("helpful-2") == check(grader="helpful-2")
