"""Worst examples side by side: the question, both answers, and their differences marked word by word.

Everything shown was written by strangers and is escaped. Knows nothing about how examples were found.
"""

from __future__ import annotations

from html import escape

from serve.rollout.report import words
from serve.rollout.report.model import Answer, Example, Examples, Piece

_TITLES = {"failed": "Failed", "graded wrong": "Graded wrong", "slowest": "Among the slowest"}
_ALIKE = ("the most similar request", "an equal request")


def examples(found: Examples) -> str:
    """The section of examples."""
    intro = (
        "The canary's worst answers, beside the other arm's to the same request, or to the most similar one."
    )
    shown = "".join(_example(i, e) for i, e in enumerate(found.shown, start=1))
    lead = f"<p>{intro}</p>" if shown else ""
    return f"<h2>Worst examples</h2>{lead}<p class='soft'>{escape(found.said)}</p>{shown}"


def _example(index: int, example: Example) -> str:
    asked = example.canary.prompt
    question = "<i>the request's text is not kept</i>" if asked is None else escape(asked)
    alike = (
        ""
        if example.similarity is None or example.similarity == 1.0
        else f" ({example.similarity:.0%} alike)"
    )
    return (
        f"<article class='example'><header><h4>{index}. {_TITLES[example.why]}: {_how(example)}</h4>"
        f"<p class='text'>{question}</p></header><div class='sides'>"
        f"<div>{_other(example, alike)}</div><div>{_side(example.canary, example.diff, mine=True)}</div>"
        "</div></article>"
    )


def _how(example: Example) -> str:
    answer = example.canary
    if example.why == "failed":
        return f"{escape(answer.outcome.replace('_', ' '))}, status {answer.status}"
    if example.why == "slowest":
        return f"{words.seconds(round(answer.e2e_s, 3))} to the last token"
    return f"answered in {words.seconds(round(answer.e2e_s, 3))}"


def _other(example: Example, alike: str) -> str:
    if example.other is None:
        return f"<p class='who stable'>stable</p><p class='meta'>{escape(example.relation)}</p>"
    note = f"<p class='meta'>{escape(example.relation)}{alike}</p>"
    differs = example.other.prompt is not None and example.other.prompt != example.canary.prompt
    asked = f"<p class='meta'>asked: {escape(example.other.prompt or '')}</p>" if differs else ""
    return _side(example.other, example.diff, mine=False, note=note + asked)


def _side(answer: Answer, diff: tuple[Piece, ...], *, mine: bool, note: str = "") -> str:
    style = "canary" if mine else "stable"
    facts = [answer.outcome.replace("_", " ") if answer.outcome != "ok" else ""]
    facts += [{True: "graded right", False: "graded wrong", None: ""}[answer.grade]]
    facts += [f"{words.seconds(round(answer.e2e_s, 3))}"]
    facts += ["" if answer.completion_tokens is None else f"{answer.completion_tokens:,} tokens"]
    meta = escape(" · ".join(f for f in (*facts, answer.request_id) if f))
    name = f"{escape(answer.arm)}: {escape(answer.upstream)}"
    who = f"<p class='who {style}'>{name}</p><p class='meta'>{meta}</p>"
    error = f"<p class='meta'>error: {escape(answer.error)}</p>" if answer.error else ""
    return who + note + error + _text(answer, diff, mine=mine)


def _text(answer: Answer, diff: tuple[Piece, ...], *, mine: bool) -> str:
    if answer.text is None:
        return f"<p class='text soft'><i>{escape(answer.missing)}</i></p>"
    if not diff:
        return f"<p class='text'>{escape(answer.text)}</p>"
    tag = "ins" if mine else "del"
    parts = []
    for piece in diff:
        said = escape(piece.canary if mine else piece.stable)
        parts.append(said if piece.same or not said else f"<{tag}>{said}</{tag}>")
    return f"<p class='text'>{''.join(parts)}</p>"
