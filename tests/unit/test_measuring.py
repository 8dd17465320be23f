"""The arithmetic of evaluation, by values computed by hand or by the field's libraries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import precision_recall_fscore_support

from contracts.errors import ConfigError
from distill_jobs.config import EvaluateConfig, IntervalConfig
from distill_jobs.measuring.calibration import calibration, confidence_of, reliability
from distill_jobs.measuring.classes import class_function, class_statistics, classes_of, table
from distill_jobs.measuring.intervals import Bootstrap
from distill_jobs.measuring.scores import against_teacher, kl_topk, likelihood
from distill_jobs.measuring.statistics import Statistic, load, mean_of, save
from distill_jobs.measuring.subject import Output, measure
from distill_jobs.measuring.texts import against_references


def test_perplexity_is_over_all_tokens_together() -> None:
    """Long rows weigh more: the mean is over tokens, not over rows; bits are by byte of UTF-8."""
    half = math.log(0.5)
    rows = [{"id": 0, "actual": [0.0]}, {"id": 2, "actual": [half, half, half]}]
    found = likelihood(rows, {0: "a", 2: "né"}, 4)
    assert found["perplexity"].value() == pytest.approx(2 ** (3 / 4))
    assert found["bits_per_byte"].value() == pytest.approx(3 / 4)
    assert found["perplexity"].contributing.tolist() == [True, False, True, False]
    assert likelihood([], {}, 3)["perplexity"].value() is None


def test_kl_is_exact_when_the_lists_hold_all_mass() -> None:
    """Over a whole vocabulary, listed in any order, it is the textbook KL."""
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.5, 0.25, 0.25]])
    expected = float((p * np.log(p / q)).sum())
    got = kl_topk(np.array([[4, 5, 6]]), np.log(p), np.array([[6, 4, 5]]), np.log(q[:, [2, 0, 1]]))
    assert got[0] == pytest.approx(expected)


def test_kl_puts_unlisted_tokens_into_one_bucket() -> None:
    """A token only one side lists is compared as part of the rest, on both sides."""
    got = kl_topk(np.array([[1, 2]]), np.log([[0.6, 0.3]]), np.array([[1, 9]]), np.log([[0.5, 0.4]]))
    assert got[0] == pytest.approx(0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5))


def test_kl_never_exceeds_the_full_one_and_is_zero_for_equals() -> None:
    """Bucketing is a lower bound of the KL of the whole distributions."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(50), 20), rng.dirichlet(np.ones(50), 20)
    top_p, top_q = np.argsort(-p)[:, :10], np.argsort(-q)[:, :10]
    log_p = np.log(np.take_along_axis(p, top_p, 1))
    got = kl_topk(top_p, log_p, top_q, np.log(np.take_along_axis(q, top_q, 1)))
    assert (got <= (p * np.log(p / q)).sum(1) + 1e-9).all()
    assert (got > 0).all()
    assert kl_topk(top_p, log_p, top_p, log_p) == pytest.approx(np.zeros(20))


def scored(number: int, ids: list[list[int]], logprobs: list[list[float]]) -> dict[str, Any]:
    """A row as the engine writes it."""
    flat_ids, flat = [i for p in ids for i in p], [x for p in logprobs for x in p]
    return {"id": number, "actual": [0.0] * len(ids), "topk_ids": flat_ids, "topk_logprobs": flat}


def test_agreement_is_the_share_of_equal_first_choices() -> None:
    """Two of three positions agree; a row that the student did not score says nothing."""
    even = [math.log(0.5), math.log(0.5)]
    teacher = [
        scored(0, [[1, 2], [3, 4]], [even, even]),
        scored(1, [[5, 6]], [even]),
        scored(2, [[7, 8]], [even]),
    ]
    student = [scored(0, [[1, 2], [4, 3]], [even, even]), scored(1, [[5, 6]], [even])]
    found = against_teacher(teacher, student, 3)
    assert found["agreement"].value() == pytest.approx(2 / 3)
    assert found["kl_to_teacher"].value() == pytest.approx(0.0)
    assert found["acceptance"].value() == pytest.approx(1.0)
    assert [s.value() for s in against_teacher(teacher, [], 3).values()] == [None] * 3


def test_ungradable_answers_are_no_evidence() -> None:
    """None neither helps nor harms; with nothing gradable there is no value, and so no pass."""
    assert mean_of([1.0, None, 0.0, 1.0]).value() == pytest.approx(2 / 3)
    assert mean_of([None, float("nan")]).value() is None


TEXTS = ["the cat sat on the mat", "", "退款 refund the order A-1", "same words here for all", "x"]
REFERENCES = [
    "the cat is on the mat",
    "an answer",
    "退款 refund order A-1 now",
    "same words here for all",
    None,
]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    """The corpus scores over the requests that have a reference, from sums by request."""
    known = [t for t, r in zip(TEXTS, REFERENCES, strict=True) if r is not None]
    wanted = [r for r in REFERENCES if r is not None]
    for tokenize in ("13a", "zh"):
        found = against_references(TEXTS, REFERENCES, tokenize)
        expected = BLEU(tokenize=tokenize).corpus_score(known, [wanted]).score
        assert found["bleu"].value() == pytest.approx(expected)
        assert 0 < expected < 100
    assert found["chrf"].value() == pytest.approx(CHRF().corpus_score(known, [wanted]).score)
    assert found["exact_match"].value() == pytest.approx(1 / 4)
    assert against_references(["a"], [None], "13a") == {}


def test_rouge_is_rouge_scores_and_knows_other_scripts() -> None:
    """English as the library has it; Chinese by character (the library's own tokenizer drops it all)."""
    english = against_references(TEXTS[:1], REFERENCES[:1], "13a")
    expected = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(REFERENCES[0], TEXTS[0])
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert english[ours].value() == pytest.approx(expected[theirs].fmeasure)
    chinese = against_references(["我要退款"], ["我要退货"], "13a")
    assert chinese["rouge_1"].value() == pytest.approx(3 / 4)
    assert chinese["rouge_2"].value() == pytest.approx(2 / 3)
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert against_references([composed], [decomposed], "13a")["exact_match"].value() == 1.0
    nothing = against_references(["", "!"], ["gone", "!"], "13a")
    assert nothing["rouge_l"].value() == pytest.approx(0.5), "an empty answer is 0, equal marks are 1"


def test_class_scores_are_scikit_learns() -> None:
    """Macro, weighted and worst; an unknown prediction is a miss, an unknown actual class no evidence."""
    actual = ["a", "a", "b", "b", "c", None, "c"]
    predicted = ["a", "b", "b", None, "unheard of", "a", "c"]
    found = {n: s.value() for n, s in class_statistics(predicted, actual).items()}
    pairs = [(a, p or "") for a, p in zip(actual, predicted, strict=True) if a is not None]
    labels = ["a", "b", "c"]
    truth, guess = [a for a, _ in pairs], [p for _, p in pairs]
    kinds = {
        average: precision_recall_fscore_support(
            truth, guess, labels=labels, average=average, zero_division=0
        )
        for average in ("macro", "weighted", None)
    }
    assert found["precision_macro"] == pytest.approx(kinds["macro"][0])
    assert found["recall_macro"] == pytest.approx(kinds["macro"][1])
    assert found["f1_macro"] == pytest.approx(kinds["macro"][2])
    assert found["f1_weighted"] == pytest.approx(kinds["weighted"][2])
    assert found["f1_worst"] == pytest.approx(min(kinds[None][2]))
    rows = table(predicted, actual)
    assert [r["f1"] for r in rows] == pytest.approx(list(kinds[None][2]))
    assert [(r["class"], r["support"]) for r in rows] == [("a", 2), ("b", 2), ("c", 2)]
    assert class_statistics(["a"], [None]) == {}


def test_a_class_is_a_field_of_a_json_answer_or_what_a_function_says() -> None:
    """Anything that is no JSON scalar at the path has no class; a function's odd result names the setting."""
    classify = class_function("json:0.tool")
    texts = ['[{"tool": "refund"}]', "[]", "not json", '{"tool": 1}', '[{"tool": {"x": 1}}]', '[{"tool": 7}]']
    assert [classify({}, t) for t in texts] == ["refund", None, None, None, None, "7"]
    assert class_function("json:lang")({}, '{"lang": "日本"}') == "日本"
    assert classes_of(classify, [{}], [None]) == [None]
    for wrong in ("json:", "json:a..b", "nocolon"):
        with pytest.raises(ConfigError, match=r"evaluate\.classes"):
            class_function(wrong)
    with pytest.raises(ConfigError, match=r"evaluate\.classes"):
        classes_of(lambda request, text: 3, [{}], ["x"])  # type: ignore[arg-type,return-value]


def test_calibration_by_hand() -> None:
    """Two bins of ten hold answers: |0.85 - 0.5| over two and |0.25 - 1| over one of three requests."""
    found = calibration([0.9, 0.8, 0.25, None, 0.7], [1.0, 0.0, 1.0, 1.0, None], 2)
    assert found["ece"].value() == pytest.approx((2 * abs(0.85 - 0.5) + abs(0.25 - 1)) / 3)
    assert found["brier"].value() == pytest.approx((0.1**2 + 0.8**2 + 0.75**2) / 3)
    assert reliability(found["ece"]) == [
        {"from": 0.0, "to": 0.5, "requests": 1, "confidence": 0.25, "accuracy": 1.0},
        {"from": 0.5, "to": 1.0, "requests": 2, "confidence": pytest.approx(0.85), "accuracy": 0.5},
    ]
    assert calibration([None], [1.0], 10) == {}


def test_confidence_is_what_the_setting_says() -> None:
    """The geometric mean of the answer's token probabilities, or the first one; none of no tokens."""
    answer = {"logprobs": [math.log(0.5), math.log(0.125)]}
    assert confidence_of(answer, "answer") == pytest.approx(0.25)
    assert confidence_of(answer, "first_token") == pytest.approx(0.5)
    assert confidence_of({"logprobs": []}, "answer") is None


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_intervals_are_scipys(method: Any) -> None:
    """The skewed mean that BCa is for, and a ratio of sums: the library's limits within resampling noise."""
    rng = np.random.default_rng(5)
    values = rng.exponential(1.0, 60) ** 2
    ours = Bootstrap(60, IntervalConfig(method=method, resamples=20_000)).interval(mean_of(list(values)))
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa" if method == "bca" else method, rng=rng
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.03)


def test_intervals_cover_what_they_say() -> None:
    """Of 300 samples of 80 graded answers, about 95 % of the intervals hold the true share."""
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap(80, IntervalConfig(resamples=1000))
    held = 0
    for _ in range(300):
        found = bootstrap.interval(mean_of(list((rng.random(80) < 0.85).astype(float))))
        assert found is not None
        held += found[0] <= 0.85 <= found[1]
    assert 0.91 <= held / 300 <= 0.98


def test_a_ratio_is_paired_by_request() -> None:
    """Two models that fail on the same requests differ little, however many they fail on."""
    rng = np.random.default_rng(1)
    teacher = (rng.random(200) < 0.7).astype(float)
    student = teacher.copy()
    student[np.flatnonzero(teacher)[:2]] = 0.0
    bootstrap = Bootstrap(200, IntervalConfig())
    low, high = bootstrap.ratio(mean_of(list(student)), mean_of(list(teacher))) or (0, 0)
    assert 0.94 < low < 1 - 2 / teacher.sum() < high <= 1.0
    unpaired = bootstrap.ratio(mean_of(list(rng.permutation(student))), mean_of(list(teacher))) or (0, 0)
    assert unpaired[1] - unpaired[0] > 4 * (high - low)


def test_perfect_scores_are_not_certain() -> None:
    """20 of 20 right is no proof of 100 %: Clopper and Pearson's bound, 1 - 0.025^(1/20) short of it; also
    for a ratio of two models that never differed.
    """
    bootstrap = Bootstrap(20, IntervalConfig())
    perfect = mean_of([1.0] * 20)
    short = 1 - 0.025 ** (1 / 20)
    assert bootstrap.interval(perfect) == pytest.approx((1 - short, 1.0))
    assert bootstrap.interval(mean_of([0.0] * 20)) == pytest.approx((0.0, short))
    flawless = class_statistics(["a", "b"] * 10, ["a", "b"] * 10)["f1_macro"]
    assert flawless.value() == 1.0
    assert bootstrap.interval(flawless) is None, "no width is no knowledge"
    assert bootstrap.ratio(perfect, perfect) == pytest.approx((1 - short, 1 + short))


def test_too_little_has_no_interval() -> None:
    """One request, or none, says nothing about others; neither does a reference of zero."""
    bootstrap = Bootstrap(5, IntervalConfig())
    assert bootstrap.interval(mean_of([1.0, None, None, None, None])) is None
    assert bootstrap.interval(mean_of([None] * 5)) is None
    assert bootstrap.ratio(mean_of([1.0] * 5), mean_of([0.0] * 5)) is None


def test_the_same_seed_gives_the_same_interval() -> None:
    """A report can be made again to the digit; another seed differs."""
    values = mean_of([float(x) for x in np.random.default_rng(2).random(50)])
    first, again, other = (Bootstrap(50, IntervalConfig(seed=s)).interval(values) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    """Names with dots and slashes, kinds and values come back."""
    made = {"student.lm_eval.a/b.acc": mean_of([1.0, None]), "q.f1": Statistic(np.ones((2, 6)), "f1_macro")}
    save(made, tmp_path / "s.npz")
    found = load(tmp_path / "s.npz")
    assert {n: (s.kind, s.rows.tolist()) for n, s in found.items()} == {
        n: (s.kind, s.rows.tolist()) for n, s in made.items()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_a_models_references_are_the_datasets_answers_then_the_teachers() -> None:
    """Text scores take the dataset's answer where a row has one, else the teacher's; the teacher itself is
    scored on the dataset's alone; without a grader, right means the reference's class.
    """
    config = EvaluateConfig(dataset="d", classes="json:tool")
    dataset = [{"request": {}, "answer": '{"tool": "a"}'}, {"request": {}}]
    speed = {"speed": {"tokens_per_s": 5.0, "ttft_s": [0.3, 0.1, 0.2]}, "memory": {"peak_rss": 7, "gpu": 0}}

    def output(*texts: str) -> Output:
        return Output([{"text": t, "logprobs": [math.log(0.5)]} for t in texts], [], speed)

    teacher = output('{"tool": "b"}', '{"tool": "c"}')
    student = measure(config, dataset, output('{"tool": "a"}', "?"), teacher, {})
    assert student.statistics["exact_match"].value() == 0.5
    assert student.statistics["f1_macro"].value() == 0.5
    assert [row["right"] for row in student.rows] == [1.0, 0.0]
    assert student.statistics["ece"].value() == pytest.approx(0.0)
    assert student.figures == {"tokens_per_s": 5.0, "ttft_s": 0.2, "peak_rss_bytes": 7, "gpu_bytes": None}
    own = measure(config, dataset, teacher, None, {})
    assert own.statistics["exact_match"].value() == 0.0
    assert own.statistics["exact_match"].contributing.tolist() == [True, False]
    assert "agreement" not in own.statistics
