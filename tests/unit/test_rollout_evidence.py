"""Evidence by kind and role: scores, judged pairs and queries next to rates, and what each may decide."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from contracts.gates import Verdict
from contracts.metrics import FEEDBACK, PAIR, ArmCounts, MetricKind, MetricSpec, QuerySpec, Role, pass_fail
from contracts.rollout import MetricStatus, Phase, RolloutSpec, RolloutStatus
from contracts.traffic import Arm, Split
from serve.rollout import evidence, sentences
from serve.rollout.decide import decide, initial
from serve.rollout.observation import Observation, QueryReading, SeenWindow
from serve.rollout.policy import make_spec
from serve.rollout.stats import betting, pairs, two_sample
from tests.unit.rollout_world import T0, TEACHER, demo_policy, record

ERRORS = MetricSpec(kind=MetricKind.ERRORS, margin=0.02)
SCORE = MetricSpec(kind=MetricKind.SCORE, margin=0.1, grader="judge", role=Role.OBJECTIVE)
PAIRS = MetricSpec(kind=MetricKind.PAIRS, margin=0.1, grader="judge")
COUNTERS = MetricSpec(
    kind=MetricKind.QUERY,
    name="retries",
    margin=0.05,
    query=QuerySpec(bad='retries_total{arm="{{arm}}"}', total='requests_total{arm="{{arm}}"}'),
)
VALUE = MetricSpec(
    kind=MetricKind.QUERY,
    name="queue",
    margin=0.05,
    query=QuerySpec(value="queue_depth", at_most=5.0, failures=2),
)
EMPTY = SeenWindow(split_version=2)


def spec(*metrics: MetricSpec, **changes: object) -> RolloutSpec:
    """A spec with these metrics and one step of 10 %."""
    made = make_spec(demo_policy(), "support", record(), now=T0)
    return RolloutSpec(**{**dict(made), "id": "the-one", "metrics": metrics, **changes})  # type: ignore[arg-type]


def scored(
    n: int, stable: tuple[int, ...] = (), canary: tuple[int, ...] = (), judged: tuple[int, ...] = ()
) -> SeenWindow:
    """A window of the judge's scores; n error-free requests in each arm."""
    return SeenWindow(
        split_version=2,
        stable=ArmCounts(n=n, scores={"judge": stable} if stable else {}),
        canary=ArmCounts(n=n, scores={"judge": canary} if canary else {}),
        pairs=ArmCounts(scores={"judge": judged} if judged else {}),
    )


def after(of: RolloutSpec, *windows: SeenWindow) -> dict[str, MetricStatus]:
    """Statuses by metric once the windows were seen."""
    found = evidence.fresh(of)
    for window in windows:
        found = evidence.update(of, found, window)
    return {m.name: m for m in found}


def asked(of: RolloutSpec, *readings: QueryReading, name: str = "queue") -> list[MetricStatus]:
    """The query metric's status after each reading."""
    found, seen = evidence.fresh(of), []
    for reading in readings:
        found = evidence.read(of, found, {name: reading})
        seen.append(next(m for m in found if m.name == name))
    return seen


def test_scores_are_bets_on_the_named_graders_counts() -> None:
    """SCORE equals betting.look on that grader's counts with the metric's margins, and nobody else's."""
    of = spec(ERRORS, SCORE)
    windows = [scored(100, pass_fail(80, 20), pass_fail(10, 2))] * 3
    state = betting.start()
    for _ in windows:
        state = betting.look(state, pass_fail(80, 20), pass_fail(10, 2), 0.025, 0.1)
    found = after(of, *windows)["score.judge"]
    assert (found.log_harm, found.log_noninferior) == (
        betting.log_harm(state),
        betting.log_noninferior(state),
    )
    other = spec(ERRORS, MetricSpec(kind=MetricKind.SCORE, margin=0.1, grader=FEEDBACK))
    assert after(other, *windows)["score.feedback"].verdict is Verdict.NO_DATA


def test_pairs_are_bets_on_the_windows_pairs() -> None:
    """PAIRS equals pairs.look on the pair counts; the arms' own scores do not enter."""
    of = spec(ERRORS, PAIRS)
    judged = (6, *(0,) * 9, 8, *(0,) * 9, 6)
    state = pairs.look(pairs.start(), judged, 0.025, 0.1)
    found = after(of, scored(50, pass_fail(9, 0), pass_fail(0, 9), judged))["pairs.judge"]
    assert (found.log_harm, found.log_noninferior) == (pairs.log_harm(state), pairs.log_noninferior(state))
    assert after(of, scored(50, pass_fail(9, 0), pass_fail(0, 9)))["pairs.judge"].verdict is Verdict.NO_DATA


def test_ledger_entries_of_pairs_join_the_window_as_pairs() -> None:
    """Arm 'pair' is neither canary nor stable; shadow counts stay nobody's evidence."""
    counts = ArmCounts(scores={"judge": pass_fail(2, 1)})
    window = EMPTY.plus(PAIR, counts).plus(PAIR, counts).plus(Arm.SHADOW, counts)
    assert window.pairs.scores == {"judge": pass_fail(4, 2)}
    assert (window.stable, window.canary) == (ArmCounts(), ArmCounts())


def test_better_asks_for_superiority() -> None:
    """Equal scores show non-inferiority and not superiority; 20 points more show both."""
    strict = SCORE.model_copy(update={"better": True, "name": "strict"})
    of = spec(ERRORS, SCORE, strict)
    equal = after(of, *[scored(100, pass_fail(80, 20), pass_fail(80, 20))] * 12)
    more = after(of, *[scored(100, pass_fail(70, 30), pass_fail(90, 10))] * 12)
    assert (equal["score.judge"].verdict, equal["strict"].verdict) == (Verdict.PASS, Verdict.INCONCLUSIVE)
    assert (more["score.judge"].verdict, more["strict"].verdict) == (Verdict.PASS, Verdict.PASS)


def test_better_pairs_must_win_more_than_they_lose() -> None:
    """As many wins as losses are no worse, but not better; twice as many are both."""
    strict = PAIRS.model_copy(update={"better": True, "name": "strict"})
    of = spec(ERRORS, PAIRS, strict)
    even, ahead = ((lost, *(0,) * 9, 10, *(0,) * 9, won) for lost, won in ((15, 15), (10, 20)))
    drawn = after(of, *[scored(40, judged=even)] * 20)
    won = after(of, *[scored(40, judged=ahead)] * 20)
    assert (drawn["pairs.judge"].verdict, drawn["strict"].verdict) == (Verdict.PASS, Verdict.INCONCLUSIVE)
    assert (won["pairs.judge"].verdict, won["strict"].verdict) == (Verdict.PASS, Verdict.PASS)


def test_better_errors_are_tested_at_margin_zero() -> None:
    """The same for rates: two_sample with a margin of 0."""
    of = spec(ERRORS.model_copy(update={"better": True}))
    state = two_sample.start(0.01)
    for _ in range(3):
        state = two_sample.look(state, two_sample.Window(300, 30, 300, 6), 0.005, 0.0)
    windows = [
        SeenWindow(split_version=2, stable=ArmCounts(n=300, errors=30), canary=ArmCounts(n=300, errors=6))
    ] * 3
    assert after(of, *windows)["errors"].log_noninferior == two_sample.log_noninferior(state)
    assert two_sample.log_noninferior(state) > math.log(20)


@pytest.mark.parametrize(
    ("role", "decision"), [(Role.GUARDRAIL, "rolled_back"), (Role.OBJECTIVE, None), (Role.INFO, None)]
)
def test_a_harmful_score_rolls_back_as_a_guardrail_only(role: Role, decision: str | None) -> None:
    """Through decide(): the same evidence throws back, waits for a person, or is only told."""
    of = spec(ERRORS, SCORE.model_copy(update={"role": role}), look_s=1.0)
    split, status = Split(route="support", version=1, salt="s", stable=TEACHER), initial(of)
    bad = scored(200, pass_fail(90, 10), pass_fail(30, 70))
    for tick in range(6):
        seen = Observation(now=T0 + 2 * tick, split=split, ready=True, warmed=True)
        if status.phase in (Phase.RAMPING, Phase.HELD):
            seen = seen.model_copy(
                update={"windows": (bad.model_copy(update={"split_version": split.version}),)}
            )
        decided = decide(of, status, seen)
        status, split = decided.status, decided.split or split
    assert status.decision == decision
    verdict = next(m.verdict for m in status.metrics if m.name == "score.judge")
    assert verdict is Verdict.FAIL
    assert evidence.combine(of, status.metrics).objective_harm is (role is Role.OBJECTIVE)


def test_info_alone_is_refused() -> None:
    """Nothing could be promoted or thrown back by it."""
    with pytest.raises(ValidationError, match="one at least must be a guardrail or an objective"):
        spec(ERRORS.model_copy(update={"role": Role.INFO}))


def test_a_margin_no_pairs_can_miss_is_refused() -> None:
    """Half of all wins below one half is 'loses everything'."""
    with pytest.raises(ValidationError, match=r"margin must be below 0\.5"):
        MetricSpec(kind=MetricKind.PAIRS, margin=0.5)


def test_query_counters_are_a_rate_like_any_other() -> None:
    """The same e-values as two_sample on these counts; totals are kept for the sentences."""
    of = spec(ERRORS, COUNTERS)
    reading = QueryReading(stable_total=400, stable_bad=8, canary_total=40, canary_bad=9)
    seen = asked(of, reading, reading, name="retries")
    state = two_sample.start(0.01)
    for _ in range(2):
        state = two_sample.look(state, two_sample.Window(400, 8, 40, 9), 0.0125, 0.05)
    assert seen[1].log_harm == two_sample.log_harm(state)
    assert seen[1].state["counts"] == [800.0, 16.0, 80.0, 18.0]
    said = sentences.compared(of, seen[1], {})
    assert said == "canary had 18 of 80 (22.5 %) bad against 16 of 800 (2.0 %) on stable"


def test_a_query_without_an_answer_is_no_data_and_no_pass() -> None:
    """Counters: the look multiplies by 1. A value: what is not known now does not pass now."""
    problem = QueryReading(problem="the series is empty")
    of = spec(ERRORS, COUNTERS, VALUE)
    first, second = asked(of, problem, problem, name="retries")
    assert (first.verdict, first.log_harm, second.log_noninferior) == (Verdict.NO_DATA, 0.0, 0.0)
    good, gone = asked(of, QueryReading(value=1.0), problem)
    assert (good.verdict, gone.verdict) == (Verdict.PASS, Verdict.NO_DATA)
    assert gone.log_noninferior == 0.0
    assert evidence.fresh(of)[2].verdict is Verdict.NO_DATA


def test_a_value_is_harm_after_its_looks_in_a_row() -> None:
    """failures=2: one broken look is not harm, a kept one starts over, an unanswered one does not."""
    of = spec(ERRORS, VALUE)
    bad, good, gone = QueryReading(value=6.0), QueryReading(value=5.0), QueryReading(problem="timeout")
    seen = asked(of, bad, good, bad, gone, bad)
    verdicts = [m.verdict for m in seen]
    expected = [Verdict.INCONCLUSIVE, Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.NO_DATA, Verdict.FAIL]
    assert verdicts == expected
    assert [m.log_harm for m in seen] == [0.0, 0.0, 0.0, 0.0, evidence.CERTAIN]


def test_the_sentence_on_a_value_speaks_of_looks_and_not_of_e_values() -> None:
    """A declared bound is outside the statistics, and is told so."""
    of = spec(ERRORS, VALUE)
    found = evidence.fresh(of)
    for _ in range(2):
        found = evidence.read(of, found, {"queue": QueryReading(value=6.5)})
    family = evidence.combine(of, found)
    assert family.harm
    said = sentences.harm(of, family, {})
    assert said == "queue: canary's value is 6.5 (at most 5): out of its bounds on 2 looks in a row"
    assert (
        sentences.weak(of, found[1], {}, 20.0)
        == "queue: canary's value is 6.5 (at most 5): out of its bounds"
    )


@pytest.mark.parametrize(
    ("low", "high", "value", "keeps"),
    [(None, 5.0, 5.0, True), (None, 5.0, 5.1, False), (1.0, None, 0.9, False), (1.0, 5.0, 3.0, True)],
)
def test_bounds_include_their_ends(low: float | None, high: float | None, value: float, keeps: bool) -> None:
    """At most 5 keeps 5."""
    assert QuerySpec(value="x", at_least=low, at_most=high).keeps(value) is keeps


def test_what_was_not_asked_stays_as_it_was() -> None:
    """A tick without queries, or with another metric's, changes no query metric."""
    of = spec(ERRORS, COUNTERS, VALUE)
    found = evidence.read(of, evidence.fresh(of), {"queue": QueryReading(value=1.0)})
    assert evidence.read(of, found, {}) == found
    assert evidence.read(of, found, {"retries": QueryReading(problem="gone")}) == found
    assert evidence.update(of, found, EMPTY)[1:] == found[1:]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"canary_total": 3, "canary_bad": 4}, "canary has 4 bad of 3"),
        ({"value": math.nan}, "finite"),
        ({"value": math.inf}, "finite"),
        ({"value": 1.0, "problem": "no"}, "no figures beside it"),
        ({"stable_total": -1}, "greater than or equal to 0"),
    ],
)
def test_a_reading_that_cannot_be_is_refused(fields: dict[str, object], says: str) -> None:
    """A counter that ran backwards, NaN, or an answer beside its own absence."""
    with pytest.raises(ValidationError, match=says):
        QueryReading(**fields)  # type: ignore[arg-type]


def test_readings_are_consumed_by_the_look_and_replayed_from_json() -> None:
    """An observation with readings survives the audit's JSON, and decide() folds it in exactly once."""
    of = spec(ERRORS, COUNTERS, look_s=1.0)
    status, split = initial(of), Split(route="support", version=1, salt="s", stable=TEACHER)
    for _ in range(2):
        decided = decide(of, status, Observation(now=T0, split=split, ready=True, warmed=True))
        status, split = decided.status, decided.split or split
    reading = QueryReading(stable_total=90, stable_bad=1, canary_total=10, canary_bad=0)
    seen = Observation(now=T0 + 2, split=split, queries={"retries": reading})
    again = Observation.model_validate(seen.model_dump(mode="json", exclude_defaults=True))
    one, two = decide(of, status, seen).status, decide(of, status, again).status
    assert one == two
    retries = next(m for m in one.metrics if m.name == "retries")
    assert retries.state["counts"] == [90.0, 1.0, 10.0, 0.0]
    early = decide(of, one, Observation(now=T0 + 2.5, split=split, queries={"retries": reading}))
    assert early.status.metrics == one.metrics


def test_pairs_are_totalled_beside_the_arms_for_the_sentence() -> None:
    """decide() keeps the pairs' counts; the sentence counts wins, losses and the mean."""
    of = spec(ERRORS, PAIRS, look_s=1.0)
    status, split = initial(of), Split(route="support", version=1, salt="s", stable=TEACHER)
    for _ in range(2):
        decided = decide(of, status, Observation(now=T0, split=split, ready=True, warmed=True))
        status, split = decided.status, decided.split or split
    window = scored(20, judged=(2, *(0,) * 9, 3, *(0,) * 9, 5)).model_copy(
        update={"split_version": split.version}
    )
    for tick in (2, 4):
        status = decide(of, status, Observation(now=T0 + tick, split=split, windows=(window,))).status
    assert status.total_counts[PAIR].scores == {"judge": (4, *(0,) * 9, 6, *(0,) * 9, 10)}
    found = next(m for m in status.metrics if m.name == "pairs.judge")
    said = sentences.compared(of, found, status.total_counts)
    assert said == "canary was better in 10 and worse in 4 of 20 pairs, 0.650 on average of 20"


def test_the_sentence_on_scores_has_both_means() -> None:
    """A person reads what both arms scored, on how many answers."""
    of = spec(ERRORS, SCORE)
    counts = {
        "stable": ArmCounts(scores={"judge": pass_fail(9, 1)}),
        "canary": ArmCounts(scores={"judge": pass_fail(1, 1)}),
    }
    said = sentences.compared(of, evidence.fresh(of)[1], counts)
    assert said == "canary scored 0.500 on average of 2 against 0.900 on average of 10 on stable"


COUNTS = st.lists(st.integers(0, 30), min_size=21, max_size=21).map(tuple)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(COUNTS, COUNTS, COUNTS, st.floats(0, 10)), min_size=1, max_size=5))
def test_every_kind_survives_json_to_the_last_bit(
    looks: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], float]],
) -> None:
    """Scores, pairs and queries stored as JSON at every look go on exactly as if they had not been."""
    of = spec(ERRORS, SCORE, PAIRS, COUNTERS, VALUE)
    kept = stored = evidence.fresh(of)
    for b, c, z, value in looks:
        window = scored(40, b, c, z)
        readings = {
            "queue": QueryReading(value=value),
            "retries": QueryReading(
                stable_total=sum(b), stable_bad=b[0], canary_total=sum(c), canary_bad=c[0]
            ),
        }
        kept = evidence.read(of, evidence.update(of, kept, window), readings)
        stored = evidence.read(of, evidence.update(of, stored, window), readings)
        status = initial(of).model_copy(update={"metrics": stored})
        stored = RolloutStatus.model_validate_json(status.model_dump_json()).metrics
    assert stored == kept
