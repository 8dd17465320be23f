"""Policies: what they refuse, and the spec they make."""

from __future__ import annotations

import pytest

from contracts.config import parse_config
from contracts.errors import ConfigError
from contracts.hooks import HookSpec
from contracts.metrics import MetricKind
from serve.rollout.policy import RolloutPolicy, make_spec, student_upstream
from serve.rollout.start import pick_policy
from tests.unit.rollout_world import T0, record


def test_the_defaults_are_a_valid_ramp() -> None:
    """Without any configuration: 1, 5, 10, 25, 50 % and guardrails that need no grader."""
    policy = RolloutPolicy()
    assert [s.weight for s in policy.steps] == [0.01, 0.05, 0.10, 0.25, 0.50]
    assert {m.kind for m in policy.metrics} == {MetricKind.ERRORS, MetricKind.TTFT, MetricKind.E2E}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": []}, "steps: weights must rise strictly"),
        ({"steps": [{"weight": 0.1}, {"weight": 0.1}]}, "steps: weights must rise strictly"),
        ({"steps": [{"weight": 0.5}, {"weight": 1.0}]}, "leave out the step of weight 1"),
        ({"metrics": []}, "metrics: give one at least"),
        ({"metrics": [{"kind": "errors", "margin": 0.1}] * 2}, "two are called errors"),
        ({"metrics": [{"kind": "eror", "margin": 0.1}]}, "'errors', 'ttft', 'e2e', 'quality'"),
        ({"metrics": [{"kind": "ttft", "margin": 0.1}]}, "thresholds_s must be bucket edges"),
        ({"look_s": 60, "no_data_deadline_s": 90}, "no_data_deadline_s: must be at least 120 s"),
        ({"windows": ["9 to 5"]}, "write 'Mon-Fri 09:00-17:00 Europe/Berlin'"),
        ({"look_s": 60, "watch_s": 100}, "watch_s: must be 0 (off) or at least two looks, 120 s"),
        ({"holdback": 0.6}, "less than or equal to 0.5"),
        ({"srm": "shrug"}, "'hold', 'rollback' or 'ignore'"),
        ({"cooldown_s": -1}, "greater than or equal to 0"),
        ({"look": 60}, "unknown key; known keys: alpha_harm"),
    ],
)
def test_wrong_policies_are_refused_with_the_field_and_the_fix(wrong: dict[str, object], says: str) -> None:
    """A misnamed metric or an impossible ramp fails when the file is read, not in the middle of a rollout."""
    with pytest.raises(ConfigError) as err:
        parse_config(wrong, RolloutPolicy)
    assert says in str(err.value)


def test_a_spec_carries_the_policy_and_the_model() -> None:
    """Every knob of the policy reaches the spec; the student gets an application of its own."""
    hook = HookSpec(on=("held",), url="http://h/")
    policy = RolloutPolicy(
        alpha_harm=0.01, look_s=5.0, hold_final=True, windows=("09:00-17:00",), hooks=(hook,), watch_s=60.0
    )
    spec = make_spec(policy, "support", record(3), now=T0, by="ann")
    assert (spec.alpha_harm, spec.look_s, spec.hold_final, spec.steps) == (0.01, 5.0, True, policy.steps)
    assert (spec.windows, spec.hooks, spec.watch_s) == (("09:00-17:00",), (hook,), 60.0)
    assert all(getattr(spec, name) == getattr(policy, name) for name in RolloutPolicy.model_fields)
    assert (spec.model_ref, spec.digest, spec.artifact_uri) == ("student:3", "digest-3", "/models/student")
    assert (spec.candidate.app, spec.candidate.name) == ("student-v3", "student-v3")
    assert spec.id.startswith("support-19700112-134640-")


def test_an_upstream_that_already_runs_is_not_deployed() -> None:
    """No artifact to deploy means the controller will never deploy or retire it."""
    upstream = student_upstream(record(2))
    assert make_spec(RolloutPolicy(), "r", record(2), upstream=upstream).artifact_uri is None


def test_picking_a_policy() -> None:
    """By name, else 'default', else the only one, else built in; several without a default is an error."""
    one, two = RolloutPolicy(look_s=1.0), RolloutPolicy(look_s=2.0)
    assert pick_policy({"a": one, "b": two}, "b") is two
    assert pick_policy({"default": one, "b": two}, None) is one
    assert pick_policy({"a": one}, None) is one
    assert pick_policy({}, None) == RolloutPolicy(watch_s=4 * 3600.0)
    with pytest.raises(ConfigError, match=r"--policy a \| b"):
        pick_policy({"a": one, "b": two}, None)
    with pytest.raises(ConfigError, match="no rollout policy 'c'"):
        pick_policy({"a": one}, "c")
