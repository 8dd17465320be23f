"""The teacher's text: which samples it answers, the best of several, texts shared between jobs,
demonstrations.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from distill_jobs.config import EngineConfig
from distill_jobs.engine import write_lines
from distill_jobs.teaching.answers import Texts, best, fill_answers, sampling_of, unknown
from distill_jobs.teaching.ask import Question, Sampling
from distill_jobs.teaching.config import TeachConfig
from distill_jobs.teaching.demonstrations import Pool, fitting, shown_to_teacher
from distill_jobs.tokens import ChatTokenizer
from tests.integration.pipeline_world import write_model
from tests.unit.fake_openai import FakeOpenAI, serving
from tests.unit.teaching_world import rows_of, run, sample


class FakeVoice:
    """A teacher that says the same to everybody, and remembers who asked."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.asked: list[str] = []

    def ask(self, questions: Iterable[Question], sampling: Sampling, folder: Path) -> dict[str, list[str]]:
        """Texts of each question."""
        asked = list(questions)
        self.asked += [q.messages[-1]["content"] for q in asked]
        return {q.id: list(self.texts) for q in asked}


def fill(
    samples: list[dict[str, Any]], voice: FakeVoice, texts: Texts | None = None, **answers: Any
) -> Counter[str]:
    """Answer samples; returns the counts."""
    counts: Counter[str] = Counter()
    config, known = TeachConfig(answers=answers), texts or Texts(None)
    said = voice.ask(unknown(samples, config, known), sampling_of(config), Path())
    fill_answers(samples, config, said, known, counts)
    return counts


def grade_number(request: dict[str, Any], text: str) -> float | bool | None:
    """Numbers are their own grade, "right" and "wrong" what they say, the rest cannot be graded."""
    return {"right": True, "wrong": False}.get(text, float(text) if text[0].isdigit() else None)


def test_all_is_sequence_level_distillation(tmp_path: Path) -> None:
    """The teacher's text takes the place of what was logged, but not of a user's correction."""
    samples = [sample("a", "logged"), sample("b", None), sample("c", "fixed", corrected=True)]
    samples.append(sample("d", "steps", task="rationale"))
    voice = FakeVoice("taught")
    assert fill(samples, voice, which="all")["answered_offline"] == 2
    assert [s["answer"] for s in samples] == ["taught", "taught", "fixed", "steps"]
    samples = [sample("a", "logged"), sample("b", None)]
    fill(samples, voice := FakeVoice("taught"))
    assert ([s["answer"] for s in samples], voice.asked) == (["logged", "taught"], ["b"])


def test_the_best_of_several_stays() -> None:
    """The highest grade, then what was said most, then what was said first; all wrong is no answer."""
    assert best({}, ["0.2", "0.9", "0.5"], grade_number) == "0.9"
    assert best({}, ["perhaps", "right"], grade_number) == "right"
    assert best({}, ["wrong", "perhaps"], grade_number) == "perhaps"
    assert best({}, ["wrong", "wrong"], grade_number) is None
    assert best({}, ["b", "a", "a "], None) == "a"
    assert best({}, [], None) is None


def test_answers_that_the_grader_calls_wrong_are_counted() -> None:
    """A sample without a good answer has none: the student never sees it."""
    samples = [sample("a", None)]
    counts = fill(
        samples, FakeVoice("wrong", "wrong"), grader=f"{__name__}:grade_number", n=2, temperature=1.0
    )
    assert samples[0]["answer"] is None
    assert (counts["no_good_answer"], counts["answered_offline"]) == (1, 0)


def test_another_job_does_not_ask_again(tmp_path: Path) -> None:
    """Texts are found by everything that the teacher is shown, not by the sample's normalised digest."""
    fill([sample("a", None), sample("b", None)], FakeVoice("said"), Texts(tmp_path))
    voice = FakeVoice("new")
    known, other = [sample("a", None)], [sample("A", None) | {"sample_digest": "d-a"}]
    counts = fill(known, voice, Texts(tmp_path)) + fill(other, voice, Texts(tmp_path))
    assert (known[0]["answer"], other[0]["answer"], voice.asked) == ("said", "new", ["A"])
    assert counts["answers_cached"] == 1


def test_an_engine_is_told_how_to_draw(tmp_path: Path) -> None:
    """n, temperature and nucleus reach the engine's job; all its choices are looked at."""
    teacher = tmp_path / "teacher"
    write_model(teacher, hidden=32, layers=1, seed=0)
    jobs: list[dict[str, Any]] = []

    def answer(job: dict[str, Any], engine: EngineConfig) -> dict[str, Any]:
        jobs.append(job["answer"])
        choices = [
            {"text": t, "finish_reason": r} for t, r in (("x", "length"), ("y", "stop"), ("y", "stop"))
        ]
        write_lines(Path(job["out"]) / "answers.jsonl", [{"id": "d-one", "choices": choices}])
        return {}

    answers = {"n": 3, "temperature": 0.8, "top_p": 0.9}
    config = TeachConfig(scheme="text", answers=answers, answer_tokens=32)
    row = rows_of(run(tmp_path, teacher, [sample("one", None)], config, answer))["d-one"]
    assert {k: v for k, v in jobs[0].items() if k != "prompts"} == {"max_tokens": 32, **answers}
    assert row["input_ids"][row["prompt_len"] :] == ChatTokenizer(str(teacher)).answer("y")


def test_an_api_teaches_text(tmp_path: Path) -> None:
    """source: api end to end: the API's words in the student's tokens, no model loaded, the manifest says
    text.
    """
    teacher = tmp_path / "teacher"
    write_model(teacher, hidden=32, layers=1, seed=0)
    with serving(FakeOpenAI(chat=lambda body: ["by the API ü"])) as fake:
        endpoint = {"url": fake.url, "model": "big"}
        config = TeachConfig(source="api", scheme="text", endpoint=endpoint)
        result = run(tmp_path, teacher, [sample("one", None), sample("two", "logged")], config)
    assert [b["messages"][0]["content"] for b in fake.asked] == ["one"]
    row = rows_of(result)["d-one"]
    assert row["input_ids"][row["prompt_len"] :] == ChatTokenizer(str(teacher)).answer("by the API ü")
    about = json.loads((Path(result.outputs["train"].path) / "manifest.json").read_text())
    assert (about["scheme"], about["k"]) == ("text", 0)


POOL = [
    sample("where is my parcel number 17", "parcel"),
    sample("please reset the password", "password"),
    sample("where is my parcel number 18", "parcel 18"),
    sample("reset my password now", "password now"),
    sample("no answer to where is my parcel", None),
]


def test_demonstrations_are_similar_solved_and_never_the_sample_itself() -> None:
    """By characters in common; neither its own digest nor its own text, which would give the answer away."""
    twin = sample("please reset the password", "twin") | {"sample_digest": "other"}
    chosen = Pool([*POOL, twin], 100).choose([POOL[0], POOL[1]], 2)
    assert chosen[0][0]["text"] == "where is my parcel number 18"
    assert chosen[1][0]["text"] == "reset my password now"
    for shown, own in zip(chosen, POOL, strict=False):
        assert len(shown) == 2
        assert own["text"] not in [s["text"] for s in shown]
        assert all(s["answer"] for s in shown)
    assert Pool([POOL[0]], 100).choose([POOL[0]], 3) == [[]]
    assert Pool([], 100).choose([POOL[0]], 3) == [[]]
    assert Pool([sample(" ", "empty")], 100).choose([POOL[0]], 3) == [[]]


def test_demonstrations_come_after_instructions_the_most_similar_last() -> None:
    """As turns of the conversation, before its own; the least similar give way to the limit."""
    system = {"role": "system", "content": "be brief"}
    own = sample("x", "y")
    own["messages"] = json.dumps([system, *json.loads(own["messages"])])
    shown = shown_to_teacher(own, POOL[:2])
    assert [m["content"] for m in shown] == [
        "be brief", "please reset the password", "password", "where is my parcel number 17", "parcel", "x",
    ]  # fmt: skip
    kept = fitting(own, POOL[:2], lambda messages: 10 * len(messages), 40)
    assert [m["content"] for m in kept] == ["be brief", "where is my parcel number 17", "parcel", "x"]
    assert len(fitting(own, POOL[:2], len, 1)) == 2


def test_only_the_teacher_sees_demonstrations(tmp_path: Path) -> None:
    """The student's tokens are as without; the distributions are those after the longer prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    teacher = tmp_path / "teacher"
    write_model(teacher, hidden=64, layers=2, seed=0)
    config = TeachConfig(k=3, dtype="float32", demonstrations={"k": 1, "max_tokens": 400})
    plain = rows_of(run(tmp_path / "a", teacher, POOL[:4], TeachConfig(k=3, dtype="float32")))
    shown = rows_of(run(tmp_path / "b", teacher, POOL[:4], config))
    assert {d: r["input_ids"] for d, r in shown.items()} == {d: r["input_ids"] for d, r in plain.items()}
    row = shown["d-please reset the password"]
    assert row["topk_logprobs"] != plain["d-please reset the password"]["topk_logprobs"]
    tokenizer = ChatTokenizer(str(teacher))
    messages = [
        {"role": "user", "content": "reset my password now"},
        {"role": "assistant", "content": "password now"},
        {"role": "user", "content": "please reset the password"},
    ]
    prompt = tokenizer.prompt({"messages": messages})
    ids = prompt + tokenizer.answer("password")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.inference_mode():
        top = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1).topk(3)
    assert row["topk_ids"] == top.indices.flatten().tolist()
    assert row["topk_logprobs"] == pytest.approx(top.values.flatten().tolist(), abs=5e-3)
