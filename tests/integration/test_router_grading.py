"""Graders, judges, mirrored pairs and feedback on a real router: what reaches ledger, log and metrics."""

from __future__ import annotations

import json
from typing import Any

import pytest

from contracts.grading import JudgeGrader
from contracts.metrics import FEEDBACK, SCORE_VALUES, ArmCounts
from contracts.traffic import Upstream
from serve.grading.judge import evidence_name
from tests.integration.router_rig import Fake, Server, World, get, post, total, wait_until

pytestmark = pytest.mark.integration
CHAT = "/v1/chat/completions"
TICK = "tests.integration.graders:says_tick"
LONGER = {"kind": "function", "function": "tests.integration.graders:longer_wins", "pairwise": True}


def ask(router: Server, text: str, **headers: str) -> str:
    """One answered request in a conversation of its own; returns its id."""
    body = {"model": "support", "messages": [{"role": "user", "content": text}]}
    status, _, answered = post(f"{router.url}{CHAT}", body, **headers)
    assert status == 200
    return answered["x-request-id"]


def histogram(counts: ArmCounts, grader: str) -> dict[float, int]:
    """Score → how often a grader gave it."""
    found = counts.scores.get(grader, ())
    return {v: n for v, n in zip(SCORE_VALUES, found, strict=False) if n}


def score_lines(world: World) -> list[dict[str, Any]]:
    """All lines of the scores beside the request log."""
    files = sorted((world.folder / "log").glob("scores-*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text().splitlines()]


def pairs(world: World) -> ArmCounts:
    return world.evidence().get("pair", ArmCounts())


def judge_at(engine: Fake, **fields: Any) -> tuple[dict[str, Any], Upstream, str]:
    """A judge's configuration, its upstream, and the name its scores are counted under."""
    upstream = Upstream(name="judge", model="wise", url=engine.url)
    spec = {"kind": "judge", "upstream": "judge", **fields}
    return spec, upstream, evidence_name("helpful", JudgeGrader.model_validate(spec), upstream)


def test_each_grader_counts_under_its_name(world: World) -> None:
    """Scores of both arms reach the ledger, the log's rows and the metrics by grader; a failing grader costs
    nothing but its own score.
    """
    world.split(1, weight=0.5)
    router = world.router(
        graders={
            "grade": {"kind": "function", "function": TICK},
            "form": {"kind": "regex", "pattern": "^t[io]ck( t[io]ck){7} $"},
            "tocks": {"kind": "function", "function": "tests.integration.graders:share_of_tocks"},
            "broken": {"kind": "function", "function": "json:loads"},
            "other": {"kind": "regex", "pattern": "x", "routes": ["sales"]},
        }
    )
    for i in range(20):
        ask(router, f"q{i}")
    wait_until("all rows are written", lambda: len(world.rows()) == 20)
    wait_until("all is flushed", lambda: sum(c.n for c in world.evidence().values()) == 20)
    counts, rows = world.evidence(), world.rows()
    stable, canary = counts["stable"], counts["canary"]
    assert stable.n + canary.n == 20
    assert min(stable.n, canary.n) > 0
    assert histogram(stable, "grade") == {1.0: stable.n}
    assert histogram(canary, "grade") == {0.0: canary.n}
    assert histogram(canary, "tocks") == histogram(canary, "form") == {1.0: canary.n}
    assert set(stable.scores) == {"grade", "form", "tocks"}
    assert {r["arm"]: r["scores"] for r in rows} == {
        "stable": {"grade": 1.0, "form": 1.0, "tocks": 0.0},
        "canary": {"grade": 0.0, "form": 1.0, "tocks": 1.0},
    }
    scrape = get(f"{router.url}/metrics")[1]
    grades = "stillhouse_grades_total"
    assert total(scrape, grades, arm="canary", grader="grade", verdict="fail") == canary.n
    assert total(scrape, grades, arm="stable", grader="form", verdict="pass") == stable.n
    assert total(scrape, grades, grader="other") == 0
    assert total(scrape, "stillhouse_grader_errors_total", grader="broken") == 20


def test_mirrored_pairs_reach_the_ledger(world: World) -> None:
    """With weight 0 the canary is asked what stable answered, clients notice nothing, and every pair is
    counted once by every grader, under an arm of its own.
    """
    world.canary.control(text="tock ", tokens=4)
    world.split(1, weight=0.0, mirror=1.0)
    router = world.router(
        graders={
            "grade": {"kind": "function", "function": TICK},
            "tocks": {"kind": "function", "function": "tests.integration.graders:share_of_tocks"},
            "longer": LONGER,
        }
    )
    ids = [ask(router, f"q{i}") for i in range(8)]
    ask(router, "abstain")
    ask(router, "crash")
    wait_until("all pairs are counted", lambda: sum(pairs(world).scores.get("tocks", ())) == 10)
    counts = world.evidence()
    assert set(counts) == {"pair"}  # nothing was drawn at random, so nothing else is evidence
    assert histogram(counts["pair"], "grade") == {0.0: 10}  # stable says tick, the canary does not
    assert histogram(counts["pair"], "tocks") == {1.0: 10}
    assert histogram(counts["pair"], "longer") == {0.0: 8}
    assert counts["pair"].n == 0
    rows = {r["request_id"]: r for r in world.rows()}
    mirror = rows[f"{ids[0]}-mirror"]
    assert (mirror["arm"], mirror["pair_id"], mirror["upstream"]) == ("shadow", ids[0], "student")
    assert (rows[ids[0]]["arm"], rows[ids[0]]["response_text"]) == ("stable", "tick " * 8)
    assert mirror["response_text"] == "tock " * 4
    wait_until("all lines are written", lambda: len(score_lines(world)) == 28)
    (line,) = (r for r in score_lines(world) if r["pair_id"] == ids[0] and r["grader"] == "longer")
    assert (line["request_id"], line["reference_id"], line["score"]) == (f"{ids[0]}-mirror", ids[0], 0.0)
    assert (line["arm"], line["against"], line["first"]) == ("pair", "stable", None)
    scrape = get(f"{router.url}/metrics")[1]
    assert total(scrape, "stillhouse_grades_total", arm="pair", grader="longer", verdict="fail") == 8
    assert total(scrape, "stillhouse_grader_errors_total", grader="longer") == 1
    assert total(scrape, "stillhouse_ungraded_total", grader="longer", reason="abstained") == 1


def test_pairs_can_be_scored_against_the_teacher(world: World) -> None:
    """`against` an upstream: it is asked too, and the pair is the canary's answer and its; stable's own
    graders still compare with stable.
    """
    teacher = Fake(text="sage ", tokens=2)
    world.others.append(teacher)
    world.canary.control(text="tock ", tokens=4)
    world.split(1, mirror=1.0)
    router = world.router(
        upstreams={"sage": {"name": "sage", "model": "wise", "url": teacher.url}},
        graders={"beats": {**LONGER, "against": "sage"}, "longer": LONGER},
    )
    ids = [ask(router, f"q{i}") for i in range(5)]
    wait_until("all pairs are counted", lambda: sum(pairs(world).scores.get("beats", ())) == 5)
    assert histogram(pairs(world), "beats") == {1.0: 5}  # four tocks to two words of the teacher
    assert histogram(pairs(world), "longer") == {0.0: 5}  # and to eight ticks of stable
    assert teacher.status()["requests"] == 5
    wait_until("all lines are written", lambda: len(score_lines(world)) == 10)
    lines = {r["grader"]: r for r in score_lines(world) if r["pair_id"] == ids[0]}
    assert lines["beats"]["reference_id"] == f"{ids[0]}-vs-sage"
    assert (lines["beats"]["against"], lines["longer"]["against"]) == ("sage", "stable")
    teacher.control(status=500)
    ask(router, "again")
    wait_until("stable's pair is counted", lambda: sum(pairs(world).scores["longer"]) == 6)
    assert sum(pairs(world).scores["beats"]) == 5  # no reference, no score


def test_a_canary_that_fails_has_lost_its_pair(world: World) -> None:
    """It cannot win by failing on what is hard; and pairs are only made of the stable arm's own answers."""
    world.canary.control(status=500)
    world.split(1, mirror=1.0)
    router = world.router(graders={"grade": {"kind": "function", "function": TICK}, "longer": LONGER})
    ask(router, "a")
    ask(router, "b", x_stillhouse_arm="stable")  # asked for: no part of any sample
    wait_until("the pair is counted", lambda: sum(pairs(world).scores.get("longer", ())) == 1)
    assert histogram(pairs(world), "longer") == {0.0: 1}
    assert histogram(pairs(world), "grade") == {0.0: 1}
    assert world.canary.status()["requests"] == 1


def test_a_mirror_takes_its_share_and_its_budget(world: World) -> None:
    """A quarter of the conversations; what is over the hour's budget is dropped and counted."""
    world.split(1, mirror=0.25)
    router = world.router(mirror_per_hour=10)
    for i in range(100):
        ask(router, f"q{i}")
    url = f"{router.url}/metrics"
    dropped = total(get(url)[1], "stillhouse_shadows_dropped_total", reason="mirror_budget")
    wait_until("the mirrored ones have ended", lambda: world.canary.status()["requests"] == 10)
    assert 12 <= 10 + dropped <= 40
    assert world.stable.status()["requests"] == 100


def test_a_judge_compares_pairs_in_random_order(world: World) -> None:
    """It always says A: so whoever was shown first wins, about half of the time the canary; its scores are
    counted under a name that holds its version.
    """
    engine = Fake(text="VERDICT: A", tokens=1)
    world.others.append(engine)
    spec, upstream, name = judge_at(engine, rubric="Be short.")
    world.split(1, mirror=1.0)
    router = world.router(upstreams={"judge": upstream.model_dump()}, graders={"helpful": spec})
    for i in range(24):
        ask(router, f"q{i}")
    wait_until("all pairs are judged", lambda: sum(pairs(world).scores.get(name, ())) == 24)
    wait_until("all lines are written", lambda: len(score_lines(world)) == 24)
    lines = score_lines(world)
    assert {(r["first"], r["score"]) for r in lines} == {("canary", 1.0), ("reference", 0.0)}
    firsts = sum(r["first"] == "canary" for r in lines)
    assert 4 <= firsts <= 20
    assert histogram(pairs(world), name) == {1.0: firsts, 0.0: 24 - firsts}
    asked = engine.status()["last"]["body"]
    assert asked["model"] == "wise"
    assert "Be short." in asked["messages"][0]["content"]
    assert "tick tick" in asked["messages"][1]["content"]
    assert "tock tock" in asked["messages"][1]["content"]
    assert (
        total(get(f"{router.url}/metrics")[1], "stillhouse_judge_calls_total", grader=name, result="ok") == 24
    )


def test_a_judge_scores_answers_of_both_arms(world: World) -> None:
    """0 to 10 becomes a score in [0, 1] of the arm that answered, as evidence; requests that are no evidence
    are not judged; its key goes along.
    """
    engine = Fake(text="SCORE: 7", tokens=1)
    world.others.append(engine)
    spec, upstream, name = judge_at(engine, pairwise=False)
    keyed = upstream.model_copy(update={"api_key_env": "PATH"})
    world.split(1, weight=0.5)
    router = world.router(upstreams={"judge": keyed.model_dump()}, graders={"helpful": spec})
    ids = [ask(router, f"q{i}") for i in range(10)]
    ask(router, "mine", x_stillhouse_arm="canary")

    def judged() -> int:
        return sum(sum(c.scores.get(name, ())) for c in world.evidence().values())

    wait_until("all are judged", lambda: judged() == 10)
    counts = world.evidence()
    assert {arm: histogram(c, name) for arm, c in counts.items()} == {
        arm: {0.7: counts[arm].n} for arm in ("stable", "canary")
    }
    assert sum(c.n for c in counts.values()) == 10
    assert engine.status()["requests"] == 10
    assert engine.status()["last"]["headers"]["authorization"].startswith("Bearer /")
    wait_until("all lines are written", lambda: len(score_lines(world)) == 10)
    assert {r["request_id"] for r in score_lines(world)} == set(ids)
    assert {(r["score"], r["grader"], r["pair_id"]) for r in score_lines(world)} == {(0.7, name, None)}


@pytest.mark.parametrize(
    ("behaviour", "result"),
    [
        ({"text": "both are fine"}, "unparsed"),
        ({"text": "VERDICT: A\nVERDICT: B\n"}, "unparsed"),
        ({"status": 429}, "failed"),
        ({"hang": True}, "failed"),
    ],
)
def test_a_judge_that_does_not_judge_costs_nobody(
    world: World, behaviour: dict[str, Any], result: str
) -> None:
    """Unreadable, refused or silent: no evidence, a counter, and every client has its answer at once."""
    engine = Fake(tokens=1, **behaviour)
    world.others.append(engine)
    spec, upstream, name = judge_at(engine, timeout_s=0.5)
    world.split(1, mirror=1.0)
    router = world.router(
        upstreams={"judge": upstream.model_dump()}, graders={"helpful": spec, "longer": LONGER}
    )
    for i in range(3):
        ask(router, f"q{i}")

    def calls() -> float:
        return total(get(f"{router.url}/metrics")[1], "stillhouse_judge_calls_total", grader=name)

    wait_until("all calls have ended", lambda: calls() == 3)
    assert total(get(f"{router.url}/metrics")[1], "stillhouse_judge_calls_total", result=result) == 3
    wait_until("the other grader counted", lambda: sum(pairs(world).scores.get("longer", ())) == 3)
    assert set(pairs(world).scores) == {"longer"}


def test_a_judge_keeps_to_its_budget(world: World) -> None:
    """Four calls an hour: the rest is dropped and counted, and so is what is too long to be judged."""
    engine = Fake(text="VERDICT: TIE", tokens=1)
    world.others.append(engine)
    spec, upstream, name = judge_at(engine, per_hour=4, max_chars=200)
    world.split(1, mirror=1.0)
    router = world.router(upstreams={"judge": upstream.model_dump()}, graders={"helpful": spec})
    ask(router, "x" * 300)
    for i in range(8):
        ask(router, f"q{i}")
    url = f"{router.url}/metrics"

    def dropped(reason: str) -> float:
        return total(get(url)[1], "stillhouse_judge_dropped_total", grader=name, reason=reason)

    wait_until(
        "nine are accounted for", lambda: dropped("budget") + dropped("busy") + dropped("too_long") == 5
    )
    wait_until("four are judged", lambda: histogram(pairs(world), name) == {0.5: 4})
    assert dropped("too_long") == 1
    assert engine.status()["requests"] == 4


def test_feedback_is_evidence_of_the_arm_once(world: World) -> None:
    """Thumbs and scores count for the arm that was drawn, on whichever router they arrive; words alone,
    changed judgements, and requests that asked for their arm do not.
    """
    world.split(1, weight=1.0)
    first, second = world.router(), world.router()

    def say(router: Server, request_id: str, **fields: Any) -> str:
        status, reply, _ = post(f"{router.url}/v1/feedback", {"request_id": request_id, **fields})
        assert status == 200
        return str(reply["status"])

    ids = [ask(first, f"q{i}") for i in range(5)]
    assert say(first, ids[0], good=True) == "created"
    assert say(second, ids[1], good=False) == "created"
    assert say(second, ids[2], score=0.3) == "created"
    assert say(first, ids[3], comment="hm") == "created"
    assert say(second, ids[0], good=False) == "updated"
    assert say(first, ids[1], good=False) == "unchanged"
    assert say(first, ask(first, "mine", x_stillhouse_arm="canary"), good=True) == "created"

    def counted() -> dict[float, int]:
        return histogram(world.evidence().get("canary", ArmCounts()), FEEDBACK)

    wait_until("feedback is evidence", lambda: sum(counted().values()) == 3)
    for router in (first, second):
        router.stop()
    assert counted() == {1.0: 1, 0.0: 1, 0.3: 1}
    assert "stable" not in world.evidence()


def test_an_erased_request_takes_its_copies_along(world: World) -> None:
    """The mirrored copy holds the same texts, and the scores its id: an erasure by request finds all of
    them."""
    from serve.request_log.erase import erase
    from serve.request_log.subjects import TargetKind, make_target

    world.split(1, mirror=1.0)
    router = world.router(graders={"longer": LONGER})
    gone, kept = ask(router, "a"), ask(router, "b")
    wait_until("both pairs are counted", lambda: sum(pairs(world).scores.get("longer", ())) == 2)
    router.stop()
    found = erase(world.folder / "log", None, make_target(TargetKind.REQUEST, gone, at=2e9))
    assert found.local == 3  # request, copy, score
    assert {r["request_id"] for r in world.rows()} == {kept, f"{kept}-mirror"}
    assert [r["pair_id"] for r in score_lines(world)] == [kept]
