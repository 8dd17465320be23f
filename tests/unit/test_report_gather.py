"""What a report says of simulated rollouts, held against figures computed another way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from contracts.errors import NotFoundError
from contracts.gates import Verdict
from contracts.metrics import LATENCY_BUCKETS_S, ArmCounts
from contracts.price import Price
from contracts.rollout import Phase
from contracts.traffic import Arm, LogMode, Outcome
from serve.rollout.report.gather import Sources, gather
from serve.rollout.report.model import Report
from serve.state.rollouts import Tick
from tests.unit import report_log
from tests.unit.rollout_world import BROKEN, World, demo_policy


def made(world: World, folder: Path | None = None, examples: int = 3, **prices: object) -> Report:
    """The report of a world's rollout now."""
    sources = Sources(folder, **prices)  # type: ignore[arg-type]
    return gather(world.rollouts, world.spec.id, sources, examples=examples, now=world.now)


@pytest.fixture
def promoted(tmp_path: Path) -> World:
    """A healthy student that was promoted."""
    world = World(tmp_path)
    assert world.until().phase is Phase.PROMOTED
    return world


def test_the_counts_are_those_of_the_ledger(promoted: World) -> None:
    """Requests, errors, wrong answers and buckets add up to what the routers wrote of the rollout."""
    report = made(promoted)
    stable, canary = ArmCounts(), ArmCounts()
    for entry in promoted.traffic.read_ledger("support", promoted.spec.id, {}):
        if entry.arm == "canary":
            canary = canary.plus(entry.counts)
        else:
            stable = stable.plus(entry.counts)
    for arm, counts in zip(report.arms, (stable, canary), strict=True):
        assert (arm.requests, arm.errors) == (counts.n, counts.errors)
        assert (arm.ttft.buckets, arm.e2e.buckets) == (counts.ttft, counts.e2e)
    quality = next(m for m in report.metrics if m.name == "quality").comparisons[0]
    assert (quality.canary.bad, quality.canary.n) == (canary.failed(), canary.graded())
    slow = next(m for m in report.metrics if m.name == "e2e").comparisons
    assert [c.threshold_s for c in slow] == [0.6, 1.5]
    edge = LATENCY_BUCKETS_S.index(0.6)
    assert slow[0].stable.bad == sum(stable.e2e[edge + 1 :])
    assert not any("do not add up" in note for note in report.notes)


def test_the_evidence_is_what_the_controller_decided_on(promoted: World) -> None:
    """Every look of the trail is a point, and the last one is the status's e-values to the last bit."""
    report, status = made(promoted), promoted.status
    looked = [e for e in promoted.rollouts.audit(promoted.spec.id) if e.kind == "look"]
    assert report.series.seconds == tuple(e.at - promoted.spec.created_at for e in looked)
    for series, metric in zip(report.series.tests, status.metrics, strict=True):
        assert series.metric == metric.name
        assert (series.log_harm[-1], series.log_noninferior[-1]) == (metric.log_harm, metric.log_noninferior)
    assert report.thresholds.log_harm_each == pytest.approx(math.log(4 / 0.05))
    assert report.thresholds.log_promote == pytest.approx(math.log(20))
    assert {m.verdict for m in report.metrics} == {Verdict.PASS}


def test_the_timeline_tells_every_step_once(promoted: World) -> None:
    """Warming, five steps, the promotion and its end, with the weights of the ladder."""
    report = made(promoted)
    assert [m.weight for m in report.timeline if m.what == "step"] == [0.01, 0.05, 0.1, 0.25, 0.5]
    assert [m.what for m in report.timeline][-2:] == ["promoted", "promoting → promoted"]
    assert report.headline == "promoted to stable"
    assert report.sentence.startswith("After ")
    assert report.sentence.endswith(f"{promoted.status.reason}.")
    assert report.max_weight == promoted.status.max_weight


def test_the_quantiles_are_edges_around_the_truth(promoted: World) -> None:
    """A quantile is given as its bucket: so many requests are at or below its upper edge, and not below."""
    arm = made(promoted).arms[1]
    for q in arm.e2e.quantiles:
        assert q.at_most_s is not None
        upto = sum(arm.e2e.buckets[: LATENCY_BUCKETS_S.index(q.at_most_s) + 1])
        below = upto - arm.e2e.buckets[LATENCY_BUCKETS_S.index(q.at_most_s)]
        assert upto >= q.q * arm.e2e.n > below


def test_intervals_hold_the_difference_and_shrink(promoted: World) -> None:
    """A confidence sequence a look, around an estimate that weighs looks by n_b n_c / (n_b + n_c)."""
    report = made(promoted)
    quality = next(m for m in report.metrics if m.name == "quality").comparisons[0].interval
    assert quality is not None
    assert quality.seconds == report.series.seconds[-len(quality.seconds) :]
    assert len(quality.seconds) > 10
    assert all(a <= b <= c for a, b, c in zip(quality.low, quality.estimate, quality.high, strict=True))
    assert quality.high[-1] - quality.low[-1] < quality.high[0] - quality.low[0]
    assert quality.low[-1] <= 0.0 <= quality.high[-1]  # both arms get 2 % wrong
    weights, total = 0.0, 0.0
    for entry in promoted.rollouts.audit(promoted.spec.id):
        for window in entry.body["observation"]["windows"] if entry.kind == "look" else ():
            if "canary" not in window or "stable" not in window:
                continue
            n_b, n_c = (sum(window[arm]["scores"]["grade"]) for arm in ("stable", "canary"))
            k_b, k_c = (window[arm]["scores"]["grade"][0] for arm in ("stable", "canary"))
            weights += n_b * n_c / (n_b + n_c)
            total += n_b * n_c / (n_b + n_c) * (k_c / n_c - k_b / n_b)
    assert quality.estimate[-1] == pytest.approx(total / weights)


def test_the_sample_ratio_is_the_splits(promoted: World) -> None:
    """Routers that follow the split show no mismatch; the promise is the sum of weight times requests."""
    ratio = made(promoted).sample_ratio
    assert not ratio.mismatch
    assert abs(ratio.canary - ratio.expected) < 5 * math.sqrt(ratio.expected)


def test_routers_that_assign_wrongly_are_noticed(tmp_path: Path) -> None:
    """Twice the promised canary traffic is a mismatch: such a comparison must not be trusted."""
    world = World(tmp_path, per_s=200.0)
    serve = world.routers.serve

    def too_many(now: float, seconds: float) -> None:
        split = world.split
        if split.weight and split.rollout_id:
            extra = world.routers._append
            counts = ArmCounts(n=int(split.weight * 200 * seconds) + 1)
            extra("router-a", split, "canary", counts, now)
        serve(now, seconds)

    world.routers.serve = too_many  # type: ignore[method-assign]
    world.until()
    assert made(world).sample_ratio.mismatch


def test_the_audit_replays(promoted: World) -> None:
    """The report says that the trail gives the same decisions, with the digest to compare."""
    audit = made(promoted).audit
    assert audit.exact
    assert audit.ticks == promoted.status.ticks
    assert audit.mismatches == ()


def test_a_changed_trail_is_said(promoted: World) -> None:
    """A trail that does not lead to the stored status is not called exact."""
    stored = promoted.rollouts.get(promoted.spec.id)
    status = stored.status.model_copy(update={"reason": "because I say so"})
    promoted.rollouts.save_tick(Tick(stored, status))
    audit = made(promoted).audit
    assert not audit.exact
    assert len(audit.mismatches) == 1
    assert "the trail ends at" in audit.mismatches[0]


def test_a_harmful_student_and_its_reason(tmp_path: Path) -> None:
    """Rolled back: the verdict is on the metric that showed it, the sentence names it with its counts."""
    world = World(tmp_path, canary=BROKEN)
    world.until()
    report = made(world)
    assert (report.headline, report.decision) == ("rolled back", "rolled_back")
    assert [m.name for m in report.metrics if m.verdict is Verdict.FAIL] == ["quality"]
    assert "graded answers wrong" in report.sentence
    assert "at most 1 % of the traffic" in report.sentence


def test_nothing_has_happened_yet(tmp_path: Path) -> None:
    """A rollout that was only asked for has a report: no looks, no data, and it says so."""
    world = World(tmp_path)
    report = made(world)
    assert report.timeline == ()
    assert report.series.seconds == ()
    assert all(m.verdict is Verdict.NO_DATA for m in report.metrics)
    assert "no traffic yet" in report.sentence
    assert any("audit trail is empty" in n for n in report.notes)
    assert report.audit.exact


def test_an_ab_test_says_that_peeking_is_free(tmp_path: Path) -> None:
    """Undecided by design: the sentence gives the state and why it may be read at any time."""
    world = World(tmp_path, demo_policy(hold_final=True))
    world.until(Phase.PROMOTED, limit_s=60)
    report = made(world)
    assert report.ab_test
    assert report.headline == "A/B test running at 50 %"
    assert "e-process" in report.sentence
    assert "costs nothing" in report.sentence


def test_an_unknown_rollout(tmp_path: Path) -> None:
    """The message says how to find the known ones."""
    world = World(tmp_path)
    with pytest.raises(NotFoundError, match="no rollout 'nope'"):
        gather(world.rollouts, "nope", Sources())


def test_cost_is_tokens_times_prices(promoted: World, tmp_path: Path) -> None:
    """Per 1000 requests: mean tokens of the logged times the price; by the hour: spread over requests."""
    rows = [report_log.row(i, promoted.spec.id, Arm.STABLE, prompt_tokens=100 + i) for i in range(4)]
    rows.append(report_log.row(9, promoted.spec.id, Arm.STABLE, prompt_tokens=None))
    folder = report_log.write(tmp_path / "requests", rows)
    prices = {"teacher": Price(prompt_per_million=2.0, completion_per_million=8.0)}
    stable, canary = made(promoted, folder, prices=prices, student_price=Price(per_hour=3.6)).arms
    assert stable.cost.per_1000 == pytest.approx(1000 * (101.5 * 2.0 + 20 * 8.0) / 1e6)
    assert "mean of 4 logged requests" in stable.cost.said
    assert "1 more" in stable.cost.said
    looks = made(promoted).series.seconds
    seconds = looks[-1] - looks[0] + promoted.spec.look_s
    assert canary.cost.per_1000 == pytest.approx(
        seconds / canary.requests
    )  # 3.6 an hour: a thousandth a second
    both = stable.requests + canary.requests
    assert canary.cost.at_full_traffic == pytest.approx(seconds / both)


def test_an_unknown_price_is_not_zero(promoted: World) -> None:
    """What is not configured is said, with the key that would tell."""
    for arm in made(promoted).arms:
        assert arm.cost.per_1000 is None
        assert "students.cost" in arm.cost.said


def test_examples_pair_what_belongs_together(promoted: World, tmp_path: Path) -> None:
    """A shadow's answer to the same request first, else the stable answer to the most similar one."""
    of = promoted.spec.id
    rows = [
        report_log.row(1, of, Arm.CANARY, asked="Cancel order 7 please", said="No.", grade=False),
        report_log.row(2, of, Arm.STABLE, asked="Cancel order 8 please", said="Cancelled.", grade=True),
        report_log.row(3, of, Arm.STABLE, asked="How do I wash wool?", said="By hand.", grade=True),
        report_log.row(4, of, Arm.CANARY, asked="wash wool how?", said="At 90 degrees.", grade=False),
        report_log.row(
            5, of, Arm.SHADOW, asked="wash wool how?", said="Cold.", upstream="teacher", pair_id="req-4"
        ),
        report_log.row(
            6, of, Arm.CANARY, outcome=Outcome.TIMEOUT, status=504, response_text=None, error="late"
        ),
        report_log.row(7, of, Arm.CANARY, asked="slow", e2e_s=30.0),
        report_log.row(8, "another", Arm.CANARY, grade=False),
    ]
    report = made(promoted, report_log.write(tmp_path / "requests", rows, tail='{"torn'), examples=3)
    found = {e.canary.request_id: e for e in report.examples.shown}
    assert [e.why for e in report.examples.shown] == ["failed", "graded wrong", "graded wrong", "slowest"]
    assert found["req-1"].other is not None
    assert found["req-1"].other.request_id == "req-2"
    assert found["req-1"].similarity == pytest.approx(3 / 5)
    assert found["req-4"].other is not None
    assert (found["req-4"].other.arm, found["req-4"].other.text) == ("shadow", "Cold.")
    assert found["req-4"].relation == "the same request, answered by both"
    assert found["req-7"].other is None
    assert found["req-6"].canary.missing == "it gave no text"
    assert report.examples.rows == 7


def test_examples_are_bounded(promoted: World, tmp_path: Path) -> None:
    """However many bad answers there are, a page shows a few, and repeats none."""
    of = promoted.spec.id
    rows = [report_log.row(i, of, Arm.CANARY, asked=f"question {i % 40}", grade=False) for i in range(400)]
    folder = report_log.write(tmp_path / "requests", rows)
    shown = made(promoted, folder, examples=2).examples.shown
    assert len(shown) == 2
    assert len({e.canary.prompt for e in shown}) == 2
    none = made(promoted, folder, examples=0).examples
    assert (none.shown, none.rows) == ((), 400)


def test_rows_without_texts_say_so(promoted: World, tmp_path: Path) -> None:
    """Log mode metadata: no text is invented, the length that is kept is told."""
    bare = {"model": "support", "messages": [{"role": "user"}]}
    row = report_log.row(
        1, promoted.spec.id, Arm.CANARY, grade=False, request=bare, response_text=None, response_chars=812,
        log_mode=LogMode.METADATA,
    )  # fmt: skip
    rows = [row, report_log.row(2, promoted.spec.id, Arm.STABLE)]
    (example,) = made(promoted, report_log.write(tmp_path / "requests", rows)).examples.shown
    assert example.canary.missing == "not kept (log mode metadata, it had 812 characters)"
    assert example.canary.prompt is None
    assert example.other is None
    assert "not kept" in example.relation
    assert example.diff == ()


def test_what_the_watch_saw_is_not_mixed_into_the_ramp(tmp_path: Path) -> None:
    """After the promotion the arms are swapped: the ramp's counts stay what the decision was made of."""
    world = World(tmp_path, demo_policy(watch_s=60.0, holdback=0.2))
    world.until(Phase.WATCHING)
    decided = {arm.arm: arm.requests for arm in made(world).arms}
    for _ in range(20):
        world.step()
    report = made(world)
    assert world.status.phase is Phase.WATCHING
    assert report.headline == "promoted, watched for late harm"
    assert {arm.arm: arm.requests for arm in report.arms} == decided
    assert not any("do not add up" in note for note in report.notes)
    assert report.audit.exact
