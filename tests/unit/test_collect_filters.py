"""collect's rules, ranking, redaction, pruning, balance, difficulty, further sources, and the card."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from contracts.errors import ConfigError, DataError
from distill_jobs.collect import run
from distill_jobs.collecting.choose import Choice, balance, best_share, bin_edges
from distill_jobs.collecting.pruning import constant_texts, prune, shared_prefix
from distill_jobs.collecting.rules import TextRules
from distill_jobs.collecting.settings import BalanceConfig, RulesConfig, SourceConfig
from distill_jobs.collecting.window import pin_window
from distill_jobs.config import CollectConfig
from distill_jobs.progress import Progress
from distill_jobs.stage import Result
from tests.integration.pipeline_world import log_row
from tests.unit.test_collect import chat, collect

ALONE = {"near_duplicates": None, "validation": 0, "calibration": 0}


def lines(count: int, **changes: Any) -> list[str]:
    """Log lines of unlike requests; a change may be a function of the number."""
    made = []
    for n in range(count):
        own = {k: v(n) if callable(v) else v for k, v in changes.items()}
        made.append(json.dumps(log_row(n, own.pop("request", chat(f"request {n} {n * 7919}")), **own)))
    return made


@pytest.mark.parametrize(
    ("rules", "text", "answer", "why"),
    [
        ({}, "x", "y", None),
        ({"drop_request": ("TEST",)}, "a test here", "y", "drop_request"),
        ({"require_request": ("order [0-9]+",)}, "order x", "y", "require_request"),
        ({"require_request": ("order [0-9]+",)}, "order 7", "y", None),
        ({"drop_answer": ("TODO",)}, "x", "todo", None),
        ({"drop_answer": ("TODO",)}, "x", "a TODO", "drop_answer"),
        ({"require_answer": ("^{",)}, "x", "{}", None),
        ({"require_answer": ("^{",)}, "x", "no", "require_answer"),
        ({"require_answer": ("^{",), "min_answer_chars": 9, "drop_refusals": True}, "x", None, None),
        ({"min_request_chars": 3}, "ab", "y", "request_short"),
        ({"max_request_chars": 3}, "abcd", "y", "request_long"),
        ({"min_answer_chars": 2}, "x", "y", "answer_short"),
        ({"max_answer_chars": 2}, "x", "yyy", "answer_long"),
        ({"answer_schema": {"required": ["topic"]}}, "x", '{"topic": 1}', None),
        ({"answer_schema": {"required": ["topic"]}}, "x", "{}", "schema"),
        ({"answer_schema": {"required": ["topic"]}}, "x", "topic", "not_json"),
    ],
)
def test_each_text_rule_names_itself(
    rules: dict[str, Any], text: str, answer: str | None, why: str | None
) -> None:
    """A sample is dropped by the rule that it breaks; an answer that is still to come breaks none."""
    assert TextRules(RulesConfig(**rules).model_dump(mode="json")).broken(text, answer) == why


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m very sorry. Unfortunately I am unable to do so", True),
        ("Unfortunately, I cannot access your account.", True),
        ("As an AI language model, I do not have feelings", True),
        ("I cannot assist with that request", True),
        ("很抱歉，我无法提供这些信息。", True),
        ("对不起，我不能回答这个问题", True),
        ("Your refund is on its way. I'm sorry that the first one can't be found.", False),
        ("Sorry for the delay! Your parcel arrives on Monday.", False),
        ("I can help: open the settings", False),
        ("抱歉让您久等，包裹明天送达", False),
        ('{"topic": "refund"}', False),
    ],
)
def test_refusals_are_known_by_how_they_begin(answer: str, refused: bool) -> None:
    """A student that is taught refusals refuses; an apology within help is no refusal."""
    rules = RulesConfig(drop_refusals=True).model_dump(mode="json")
    assert TextRules(rules).broken("x", answer) == ("refusal" if refused else None)


def test_wrong_rules_are_refused_with_their_names() -> None:
    """A pattern or schema that means nothing is an error at once, not after an hour of parsing."""
    with pytest.raises(ValidationError, match="no regular expression"):
        RulesConfig(drop_answer=("(",))
    with pytest.raises(ValidationError, match="no JSON Schema"):
        RulesConfig(answer_schema={"type": "strng"})
    with pytest.raises(ValidationError, match="json:FIELD"):
        BalanceConfig(classes="topic")
    with pytest.raises(ValidationError, match="log_dir"):
        CollectConfig()
    with pytest.raises(ValidationError, match="name of its own"):
        CollectConfig(sources=[{"kind": "jsonl", "path": "a"}, {"kind": "jsonl", "path": "b"}])


def test_rules_are_counted_in_the_manifest(tmp_path: Path) -> None:
    """Each dropped sample is counted once, under its rule."""
    rules = {"drop_request": ("request 1 ",), "answer_schema": {"type": "object"}}
    given = lines(6, response_text=lambda n: "{}" if n < 4 else "[]")
    result, rows = collect(tmp_path, given, rules=rules, **ALONE)
    assert (result.counts["drop_request"], result.counts["schema"]) == (1, 2)
    assert {r["request_id"] for r in rows["train"]} == {"r00000", "r00002", "r00003"}


def test_the_best_share_by_score_stays(tmp_path: Path) -> None:
    """Half of the scored rows stay, the best; unscored ones stay or go as asked; the score is a column."""
    given = lines(8, scores=lambda n: {"judge": n / 10} if n < 6 else {"other": 1.0})
    result, rows = collect(tmp_path, given, rank={"score": "judge", "keep": 0.5}, **ALONE)
    assert {r["request_id"]: r["score"] for r in rows["train"]} == {
        **{f"r{n:05d}": pytest.approx(n / 10) for n in (3, 4, 5)},
        **{f"r{n:05d}": None for n in (6, 7)},
    }
    assert result.counts["low_score"] == 3
    scores = np.array([0.5, np.nan, np.inf, 0.5, 0.9, 0.1], np.float32)
    assert best_share(scores, 0.5, "drop").tolist() == [True, False, True, False, True, False]


def test_personal_data_is_gone_before_anything_is_compared(tmp_path: Path) -> None:
    """No column holds it, requests that differ only in it are one sample, and the rows are counted."""
    people = ["ann@example.com", "bob@example.org", "+49 170 1234567"]
    given = lines(
        3,
        request=lambda n: chat(f"please write to {people[n]}"),
        response_text=lambda n: f"I wrote to {people[n]}",
    )
    result, rows = collect(tmp_path, given, redact={}, **ALONE)
    assert not any(person in json.dumps(rows) for person in people)
    assert sorted(r["text"] for r in rows["train"]) == [
        "please write to [email]",
        "please write to [phone]",
    ]
    assert (result.counts["redacted"], result.counts["exact_duplicate"]) == (3, 1)
    with pytest.raises(ConfigError, match=r"collect\.redact\.detectors"):
        collect(tmp_path / "x", given, redact={"detectors": ("nope",)}) if (
            tmp_path / "x"
        ).mkdir() is None else 0


def test_the_constant_prompt_is_taken_out_for_students_only(tmp_path: Path) -> None:
    """What all requests of a route say is in `messages` (the teacher's) and not in `student_messages`; the
    manifest names it, and a route without one is left alone.
    """
    constant = "You are the support bot of a shop. Answer in JSON."

    def request(n: int) -> dict[str, Any]:
        system = {"role": "system", "content": constant}
        asked = {"role": "user", "content": f"Customer message follows below this line:\nhelp {n} {n * 7919}"}
        return {"messages": [system, asked] if n < 40 else [asked | {"content": f"{n * 31} other"}]}

    given = lines(50, request=request, route=lambda n: "support" if n < 40 else "sales")
    result, rows = collect(tmp_path, given, prune={"share": 0.9, "min_chars": 20}, **ALONE)
    assert json.loads(result.notes["constant_prompts"]) == {
        "support": {"system": constant, "user": "Customer message follows below this line:\nhelp "}
    }
    assert result.counts["pruned"] == 40
    for row in rows["train"]:
        full, short = json.loads(row["messages"]), row["student_messages"]
        if row["route"] == "sales":
            assert short is None
        else:
            assert full[0]["content"] == constant
            assert json.loads(short) == [{"role": "user", "content": full[1]["content"][47:]}]


def test_what_is_shared_is_found_by_share_and_cut_at_words() -> None:
    """The longest beginning of at least the share of the texts; a few others don't hide it; nobody's message
    is emptied.
    """
    some = [f"Translate to German: text {n}" for n in range(9)] + ["Something else"]
    assert shared_prefix(some, 0.9) == "Translate to German: text "
    assert shared_prefix(some, 0.95) == ""
    assert shared_prefix(["same"] * 3, 1.0) == "same"
    heads = [["r", "", "Hello there, how are you?"]] * 3
    config = {"share": 0.9, "min_chars": 5}
    texts = constant_texts(heads, config)
    assert texts == {"r": {"user": "Hello there, how are you?"}}
    only = json.dumps([{"role": "user", "content": "Hello there, how are you?"}])
    assert prune(only, texts["r"]) is None
    more = json.dumps([{"role": "user", "content": "Hello there, how are you? Bye"}])
    assert json.loads(prune(more, texts["r"]) or "") == [{"role": "user", "content": " Bye"}]


def balanced(by: str, target: Any, most: int = 10) -> tuple[Choice, Counter[str]]:
    """Six of class a, two of b, one of c, one without; one more b in validation."""
    classes = np.array([0] * 6 + [1] * 2 + [2, -1, 1], np.int32)
    side = np.array([0] * 10 + [2], np.uint8)
    choice, counts = Choice(np.ones(11, np.uint8), side), Counter[str]()
    draw = np.arange(11)[::-1].astype(np.uint64)
    config = BalanceConfig(classes="json:x", by=by, target=target, most_repeats=most).model_dump()  # type: ignore[arg-type]
    balance(choice, classes, ["a", "b", "c"], draw, config, counts)
    return choice, counts


def test_balance_by_weights_dropping_and_repeating() -> None:
    """The weighted (dropped, repeated) training classes have the target's shares; other sides and samples
    without a named class are untouched; the draw decides who goes.
    """
    choice, _ = balanced("weight", "uniform")
    assert choice.weight is not None
    assert choice.weight.tolist() == pytest.approx([0.5] * 6 + [1.5] * 2 + [3.0, 1.0, 1.0])
    choice, counts = balanced("drop", {"a": 2, "b": 1})
    assert choice.copies.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert counts["balance_dropped"] == 2
    choice, counts = balanced("repeat", "uniform")
    assert choice.copies.tolist() == [1] * 6 + [3, 3, 6, 1, 1]
    assert counts["balance_repeated"] == 9
    assert balanced("repeat", "uniform", most=2)[0].copies.tolist() == [1] * 6 + [2, 2, 2, 1, 1]


def test_classes_come_from_the_answer_or_a_function(tmp_path: Path) -> None:
    """A field of the JSON answer names the class; so does a function; the card shows before and after."""
    given = lines(12, response_text=lambda n: json.dumps({"topic": {"name": "abc"[min(n // 3, 2)]}}))
    result, rows = collect(
        tmp_path, given, balance={"classes": "json:topic.name", "by": "drop"}, seed=3, **ALONE
    )
    assert Counter(r["class"] for r in rows["train"]) == {"a": 3, "b": 3, "c": 3}
    assert json.loads(result.notes["classes_before"]) == {"a": 3, "b": 3, "c": 6}
    card = (tmp_path / "collect" / "CARD.md").read_text()
    assert "| `c` | 6 | 50.0% | 3 | 33.3% |" in card
    (tmp_path / "f").mkdir()
    _, rows = collect(
        tmp_path / "f", given, balance={"classes": "tests.unit.test_collect_filters:parity"}, **ALONE
    )
    assert {r["class"]: r["weight"] for r in rows["train"]} == {"even": 1.0, "odd": 1.0}


def parity(request: dict[str, Any], answer: str) -> str:
    """A class function."""
    return "odd" if int(request["messages"][0]["content"].split()[1]) % 2 else "even"


def test_difficulty_by_text_and_by_log_probability(tmp_path: Path) -> None:
    """Long requests of rare words are harder than short common ones; where all answers were logged with their
    log-probabilities, these decide; bins are equally large.
    """
    rng = random.Random(1)
    hard = {n: " ".join("".join(rng.choices("qwxzjkvb", k=9)) for _ in range(12)) for n in range(5)}
    given = lines(20, request=lambda n: chat(hard.get(n) or "where is my order, " + "please " * n))
    result, rows = collect(tmp_path, given, difficulty={"bins": 4}, **ALONE)
    assert json.loads(result.notes["difficulty"])["measure"] == "text"
    ranked = sorted(rows["train"], key=lambda r: -r["difficulty"])
    assert {r["request_id"] for r in ranked[:5]} == {f"r{n:05d}" for n in range(5)}
    assert sorted(Counter(r["bin"] for r in rows["train"]).values()) == [5, 5, 5, 5]

    def whole(n: int) -> dict[str, Any]:
        said = {
            "message": {"content": "a"},
            "logprobs": {"content": [{"logprob": -float(n)}, {"logprob": 0.0}]},
        }
        return {"choices": [said]}

    (tmp_path / "l").mkdir()
    given = lines(6, response=whole, response_text=None)
    result, rows = collect(tmp_path / "l", given, difficulty={"bins": 2}, **ALONE)
    assert {r["request_id"]: (r["difficulty"], r["bin"]) for r in rows["train"]} == {
        f"r{n:05d}": (n / 2, int(n > 2)) for n in range(6)
    }
    (tmp_path / "m").mkdir()
    with pytest.raises(DataError, match="without `logprobs`"):
        collect(tmp_path / "m", lines(3), difficulty={"measure": "logprob"}, **ALONE)
    assert bin_edges(np.array([3.0, 1.0, 2.0, 4.0], np.float32), 2) == [2.0]


def gathered(tmp: Path, **changes: Any) -> tuple[Result, list[dict[str, Any]]]:
    """Collect without a log; returns the result and the training samples."""
    config = CollectConfig(executor="local", min_rows=1, **{**ALONE, **changes})
    (tmp / "collect").mkdir(parents=True)
    window = pin_window(config.log_dir, tmp / "window.json", config.sources)
    result = run(config, window, [], tmp / "collect", Progress(tmp / "p.json"))
    return result, pq.read_table(result.outputs["train"].path).to_pylist()


def test_files_are_sources_like_the_log(tmp_path: Path) -> None:
    """JSONL and Parquet rows become samples, answered or not, under their source's name; a logged answer to
    the same request comes before a file's; malformed rows cost a line; the window pins the files.
    """
    (tmp_path / "folder").mkdir()
    rows = [
        {"request": chat("from jsonl"), "answer": "yes"},
        {"request": chat("unanswered")},
        {"answer": "x"},
    ]
    text = "\n".join(json.dumps(r) for r in rows) + '\n{"request": 3}\nnonsense'
    (tmp_path / "folder" / "a.jsonl").write_text(text)
    table = pa.table(
        {
            "request": [chat("from parquet", temperature=0.5), chat("asked twice")],
            "answer": ["sure", "a file's"],
        }
    )
    pq.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "logs").mkdir()
    log = log_row(1, chat("Asked twice"), response_text="the log's")
    (tmp_path / "logs" / "requests-1.jsonl").write_text(json.dumps(log) + "\n")
    sources = [
        {"kind": "jsonl", "path": tmp_path / "folder", "name": "hand", "licence": "CC-BY-4.0"},
        {"kind": "parquet", "path": tmp_path / "b.parquet", "name": "old"},
    ]
    result, train = gathered(
        tmp_path / "w", log_dir=tmp_path / "logs", sources=sources, upstreams=("teacher",)
    )
    assert {r["text"]: (r["answer"], r["source"]) for r in train} == {
        "from jsonl": ("yes", "hand"),
        "unanswered": (None, "hand"),
        "from parquet": ("sure", "old"),
        "asked twice": ("the log's", "log"),
    }
    by_text = {r["text"]: json.loads(r["request"]) for r in train}
    assert by_text["from parquet"] == chat("from parquet", temperature=0.5)
    assert (result.counts["malformed"], result.counts["exact_duplicate"]) == (3, 1)
    assert json.loads(result.notes["malformed_lines"]) == {"a.jsonl": [3, 4, 5]}
    card = (tmp_path / "w" / "collect" / "CARD.md").read_text()
    assert "| hand | 2 | 1 |" in card
    assert "CC-BY-4.0" in card
    result, train = gathered(tmp_path / "only", sources=sources[:1])
    assert len(train) == 2
    assert result.metrics["log_from"] is None
    with pytest.raises(ConfigError, match=r"collect\.sources"):
        pin_window(None, tmp_path / "n.json", [SourceConfig(kind="jsonl", path=tmp_path / "logs" / "none")])


def test_the_card_says_what_a_person_asks(tmp_path: Path) -> None:
    """Counts by rule in words, lengths, examples, sources with digests, and how to rebuild it."""
    given = [*lines(5, response_text="| a pipe"), *lines(2), "garbage"]
    result, _ = collect(tmp_path, given, max_chars=5000, licence="internal", **ALONE)
    card = (tmp_path / "collect" / "CARD.md").read_text()
    for said in (
        "5 samples of 8 rows read",
        "routes: `support`",
        "| − exact_duplicate | 2 | the same conversation again |",
        "| malformed | 1 |",
        f"`{result.outputs['train'].digest[:16]}…`",
        "█",
        "→",
        "| log | 5 | 1 |",
        "internal",
        '"max_chars": 5000',
        "stillhouse distill CONFIG --stage collect",
    ):
        assert said in card, said
