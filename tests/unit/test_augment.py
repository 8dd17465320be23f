"""augment: what the teacher is asked, what becomes of its words, what is kept out, and where each row came
from.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.errors import ConfigError
from distill_jobs import augment
from distill_jobs.augmenting.config import AugmentConfig, HardNegativesConfig
from distill_jobs.augmenting.novelty import apart, unlike
from distill_jobs.augmenting.prompts import prompt_digests, read_prompt
from distill_jobs.augmenting.rationales import agrees, split_answer
from distill_jobs.augmenting.variants import borders, lines_of
from distill_jobs.collecting.rows import normalise
from distill_jobs.collecting.shingles import jaccard, shingles
from distill_jobs.keys import sha256_of
from distill_jobs.progress import Progress
from distill_jobs.stage import Result
from distill_jobs.teaching.ask import Question, Sampling


def sample(text: str, answer: str | None, system: str | None = None) -> dict[str, Any]:
    """A sample as collect writes it."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return {
        "sample_digest": sha256_of([text, system]),
        "request": json.dumps({"model": "support", "messages": messages, "tools": [{"type": "function"}]}),
        "messages": json.dumps(messages),
        "answer": answer,
        "text": normalise(text),
        "request_id": "r",
        "ts": 1.0,
        "upstream": "teacher",
        "answer_digest": None,
        "corrected": False,
    }


class Teacher:
    """Says what it is told to; remembers questions and how they were asked."""

    def __init__(self, say: Any) -> None:
        self._say = say
        self.questions: list[Question] = []
        self.samplings: list[Sampling] = []

    def ask(self, questions: Iterable[Question], sampling: Sampling, folder: Path) -> dict[str, list[str]]:
        """Texts by question."""
        asked = list(questions)
        self.questions += asked
        self.samplings.append(sampling)
        return {q.id: [self._say(q.messages[-1]["content"])] for q in asked}


TRAIN = [
    sample("Where is my parcel 17, please?", "parcel", system="You are the desk."),
    sample("Where is my invoice 17, please?", "invoice"),
    sample("Close the account of my late aunt", "account"),
]


def run(
    tmp: Path, teacher: Teacher, train: Sequence[dict[str, Any]] = TRAIN, **config: Any
) -> tuple[Result, list[dict[str, Any]]]:
    """Run the stage; its result and the rows it added."""
    collected = {}
    sides = {
        "train": list(train),
        "validation": [sample("how do I cancel my plan", "plan")],
        "calibration": [],
    }
    sides["calibration"] = [sample("my screen is broken again", "screen")]
    for name, rows in sides.items():
        collected[name] = tmp / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), collected[name])
    held_out = tmp / "held.jsonl"
    held_out.write_text(
        json.dumps({"request": {"messages": [{"role": "user", "content": "what does a coupon do"}]}})
    )
    folder = tmp / "augment"
    folder.mkdir(exist_ok=True)
    progress = Progress(tmp / "progress.json")
    result = augment.run(AugmentConfig(**config), teacher, collected, [held_out], folder, progress)  # type: ignore[arg-type]
    rows = pq.read_table(result.outputs["train"].path).to_pylist()
    assert [r["text"] for r in rows[: len(train)]] == [s["text"] for s in train]
    return result, rows[len(train) :]


def test_paraphrases_keep_the_form_of_their_request(tmp_path: Path) -> None:
    """System message and tools stay, the user's words change, the teacher answers them later; lineage says
    from which sample.
    """
    teacher = Teacher(lambda text: "1. I would like to know about parcel 17\n" if "parcel 17" in text else "")
    result, (new,) = run(tmp_path, teacher, paraphrase={"per_sample": 1}, weight=0.5)
    assert json.loads(new["messages"]) == [
        {"role": "system", "content": "You are the desk."},
        {"role": "user", "content": "I would like to know about parcel 17"},
    ]
    request = json.loads(new["request"])
    assert (request["messages"], request["tools"]) == (json.loads(new["messages"]), [{"type": "function"}])
    assert (new["answer"], new["kind"], new["weight"], new["task"]) == (None, "paraphrase", 0.5, "answer")
    assert new["origin"] == [TRAIN[0]["sample_digest"]]
    assert result.counts["paraphrase"] == 1
    assert teacher.samplings[0].temperature == 0.8
    assert any("Where is my parcel 17, please?" in q.messages[0]["content"] for q in teacher.questions)


def test_paraphrases_may_keep_the_answer(tmp_path: Path) -> None:
    """Where a request's meaning decides the answer, no teacher has to answer again."""
    teacher = Teacher(lambda text: "tell me about that bill" if "invoice" in text else "")
    _, (new,) = run(tmp_path, teacher, paraphrase={"keep_answer": True})
    assert new["answer"] == "invoice"


def test_what_is_there_or_kept_apart_is_dropped_and_counted(tmp_path: Path) -> None:
    """Near copies of validation, calibration and held-out requests never reach training; nor copies of
    training samples or of each other.
    """
    said = [
        "How do I cancel my plan?",  # validation
        "my screen is broken again!",  # calibration
        "What does a coupon do",  # held out
        "where is my Parcel 17, please??",  # logged
        "a new question about batteries",
        "a new question about batteries!",
        "where can I pick the cable up",
    ]
    result, rows = run(tmp_path, Teacher(lambda text: "\n".join(said)), expand={"requests": 7, "each": 7})
    assert sorted(r["text"].rstrip("!") for r in rows) == [
        "a new question about batteries",
        "where can i pick the cable up",
    ]
    names = ("written", "like_held_out", "like_logged", "like_each_other", "expansion")
    assert [result.counts[n] for n in names] == [7, 3, 1, 1, 2]


def test_expansion_shows_samples_and_asks_for_so_many(tmp_path: Path) -> None:
    """7 requests, 3 at a time: three questions, the last for one; the same job asks the same."""
    teacher = Teacher(lambda text: "")
    run(tmp_path, teacher, expand={"requests": 7, "each": 3, "shown": 2})
    asked = [q.messages[0]["content"] for q in teacher.questions]
    assert [f"Write {n} new" in text for n, text in zip((3, 3, 1), asked, strict=True)] == [True] * 3
    assert all(sum(json.loads(s["messages"])[-1]["content"] in text for s in TRAIN) == 2 for text in asked)
    again = Teacher(lambda text: "")
    run(tmp_path, again, expand={"requests": 7, "each": 3, "shown": 2})
    assert again.questions == teacher.questions


def test_hard_negatives_show_the_closest_of_two_classes(tmp_path: Path) -> None:
    """The parcel's and the invoice's question look alike and differ in class: they come first."""
    pairs = borders(HardNegativesConfig(), TRAIN)
    assert {pairs[0][2], pairs[0][3]} == {"parcel", "invoice"}
    teacher = Teacher(lambda text: "and where would a bill for parcel 17 be")
    _, rows = run(tmp_path, teacher, hard_negatives={"requests": 3, "each": 3})
    text = teacher.questions[0].messages[0]["content"]
    assert "class parcel" in text
    assert "class invoice" in text
    assert set(rows[0]["origin"]) == {TRAIN[0]["sample_digest"], TRAIN[1]["sample_digest"]}
    assert borders(HardNegativesConfig(), TRAIN[:1]) == []


def test_max_new_is_kept(tmp_path: Path) -> None:
    """A choice by digest, the rest counted."""
    said = "battery question one\nsomething about cables\nwhich store is near"
    result, rows = run(tmp_path, Teacher(lambda text: said), expand={"requests": 3}, max_new=2)
    assert (len(rows), result.counts["over_max_new"]) == (2, 1)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("Here are two requests:\n1. one\n2) two\n\n", ["one", "two"]),
        ("- one\n* two\n• three", ["one", "two", "three"]),
        ("\"quoted\"\n'also'", ["quoted", "also"]),
        ("2024 was my order\n(3) third", ["2024 was my order", "third"]),
        ("退货怎么办？\nсколько стоит", ["退货怎么办？", "сколько стоит"]),
        ("", []),
    ],
)
def test_lines_of_a_reply(text: str, lines: list[str]) -> None:
    """Numbers, bullets and quotes are not the user's words."""
    assert lines_of(text) == lines


def rationale_of(text: str) -> str:
    """Right about the parcel, wrong about the invoice, and chatter about the rest."""
    if "parcel 17" in text:
        return "The user asks where it is.\nIt is a parcel.\nAnswer: Parcel"
    return "It is a bill.\nAnswer: bill" if "invoice 17" in text else "I had rather not."


def test_steps_that_lead_to_the_logged_answer_become_rows_of_a_second_task(tmp_path: Path) -> None:
    """One rationale row for each agreeing sample; disagreeing and unreadable ones are counted; answer rows
    stay.

    The student is asked by rationale_student.txt, the teacher is scored on the prompt it wrote the steps for.
    """
    teacher = Teacher(rationale_of)
    result, (row,) = run(tmp_path, teacher, rationale={})
    names = ("rationale", "rationale_disagrees", "rationale_unreadable", "train")
    assert [result.counts[n] for n in names] == [1, 1, 1, 4]
    assert (row["task"], row["kind"], row["origin"]) == (
        "rationale",
        "rationale",
        [TRAIN[0]["sample_digest"]],
    )
    assert row["answer"] == "The user asks where it is.\nIt is a parcel.\nAnswer: Parcel"
    student, shown = json.loads(row["messages"]), json.loads(row["teacher_messages"])
    assert student[0] == shown[0] == {"role": "system", "content": "You are the desk."}
    assert student[1]["content"].startswith("Where is my parcel 17, please?\n\nExplain step by step")
    assert '"Answer:"' in shown[1]["content"]
    assert teacher.samplings[0].temperature == 0.0
    assert row["sample_digest"] != TRAIN[0]["sample_digest"]
    tasks = pq.read_table(result.outputs["train"].path)["task"].to_pylist()
    assert tasks == ["answer", "answer", "answer", "rationale"]


def test_steps_alone_are_the_papers_target(tmp_path: Path) -> None:
    """with_answer: false leaves the final answer out of the student's rationale."""
    _, (row,) = run(tmp_path, Teacher(rationale_of), rationale={"with_answer": False})
    assert row["answer"] == "The user asks where it is.\nIt is a parcel."


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("steps\nAnswer: 4", ("steps", "4")),
        ("a\nAnswer: 3, no\nb\n  answer: 4\nand more", ("a\nAnswer: 3, no\nb", "4\nand more")),
        ('steps\nAnswer:\n{"a": 1}', ("steps", '{"a": 1}')),
        ("Answer: 4", None),
        ("steps\nAnswer:", None),
        ("steps without one", None),
        ("The Answer: 4", None),
        ("", None),
    ],
)
def test_the_last_marked_line_is_the_answer(text: str, parsed: tuple[str, str] | None) -> None:
    """Steps may speak of answers; the last line that starts with the marker decides."""
    assert split_answer(text, "Answer:") == parsed


def test_answers_agree_by_value() -> None:
    """JSON whatever its spacing and key order, else normalised text."""
    assert agrees({}, '{"a": 1, "b": [2]}', '{"b":[2],"a":1}')
    assert agrees({}, "Refund  it", "refund it")
    assert not agrees({}, '{"a": 1}', '{"a": 2}')
    assert not agrees({}, "4", "five")
    assert not agrees({}, "1", "true")


def never(request: dict[str, Any], logged: str, stated: str) -> bool:
    """Nothing agrees."""
    return False


def test_a_users_own_rule_decides_agreement(tmp_path: Path) -> None:
    """Named in the configuration."""
    result, rows = run(tmp_path, Teacher(rationale_of), rationale={"agree": f"{__name__}:never"})
    assert (rows, result.counts["rationale_disagrees"]) == ([], 2)


def test_a_user_edits_prompts(tmp_path: Path) -> None:
    """A folder of files stands in for the built-in ones, one by one, and changes the stage's key."""
    own = tmp_path / "prompts"
    own.mkdir()
    (own / "paraphrase.txt").write_text("Sag es anders ($n Mal, höchstens $$5): $request")
    teacher = Teacher(lambda text: "")
    run(tmp_path, teacher, paraphrase={}, prompts=own)
    asked = {q.messages[0]["content"] for q in teacher.questions}
    assert "Sag es anders (1 Mal, höchstens $5): Where is my invoice 17, please?" in asked
    built_in, changed = prompt_digests(None), prompt_digests(own)
    assert {n for n in built_in if built_in[n] != changed[n]} == {"paraphrase"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Say $reqest otherwise", r"has \$reqest; it may have \$request, \$n"),
        ("Say it for $5", r"lone \$"),
        ("Say it otherwise", r"never says \$request"),
    ],
)
def test_a_wrong_prompt_is_named(tmp_path: Path, text: str, words: str) -> None:
    """The file and what is wrong with it, before the teacher is asked."""
    (tmp_path / "paraphrase.txt").write_text(text)
    with pytest.raises(ConfigError, match=rf"paraphrase\.txt .*{words}"):
        read_prompt("paraphrase", tmp_path)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    """Rather than using the built-in prompts."""
    with pytest.raises(ConfigError, match=r"augment\.prompts: there is no folder"):
        read_prompt("paraphrase", tmp_path / "nowhere")


def test_an_empty_section_is_refused() -> None:
    """Off is written by leaving the section out."""
    with pytest.raises(ValueError, match="at least one of paraphrase"):
        AugmentConfig()


def test_novelty_is_exact() -> None:
    """The index finds what comparing all with all finds, at the threshold too; without one, equal texts."""
    rng = random.Random(4)
    words = ["refund", "order", "parcel", "invoice", "late", "cancel", "plan", "password"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(60)]
    others = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(200)] + ["abc", ""]
    for threshold in (0.3, 0.5, 0.8, 1.0):
        expected = [all(jaccard(shingles(t), shingles(o)) < threshold for o in others) for t in texts]
        assert unlike(texts, others, threshold) == expected
    assert unlike(["a", "b"], ["b", "bb"], None) == [True, False]
    assert apart(["a text", "a text!", "a text", "another"], 0.6) == [True, False, False, True]
    assert apart(["a text", "a text!", "a text"], None) == [True, True, False]


def test_a_student_without_constant_text_keeps_being_one(tmp_path: Path) -> None:
    """Where collect took a system's text out of what the student reads, variants and rationales have it out
    too; the teacher reads all.
    """
    pruned = json.dumps([{"role": "user", "content": "Where is my parcel 17, please?"}])
    train = [TRAIN[0] | {"student_messages": pruned}, TRAIN[1] | {"student_messages": None}]

    def say(text: str) -> str:
        if "last line" in text:
            return rationale_of(text)
        return "any word of my goods yet" if "parcel" in text else "which bills are there to pay"

    result, rows = run(tmp_path, Teacher(say), train, paraphrase={}, rationale={})
    steps = rows[-1]
    assert [m["role"] for m in json.loads(steps["messages"])] == ["user"]
    assert [m["role"] for m in json.loads(steps["teacher_messages"])] == ["system", "user"]
    read = {r["text"]: r["student_messages"] for r in rows if r["kind"] == "paraphrase"}
    assert json.loads(read["any word of my goods yet"]) == [
        {"role": "user", "content": "any word of my goods yet"}
    ]
    assert read["which bills are there to pay"] is None
    assert (result.counts["rationale"], result.counts["paraphrase"]) == (1, 2)
