"""Signals of a cascade: log-probabilities asked for, read, taken out; answers compared; who can be judged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.cascade import CascadeFields, Signal
from contracts.config import parse_config
from contracts.errors import ConfigError
from contracts.traffic import Cascade, Upstream
from serve.cascade import signals
from serve.cascade.logprobs import CHAT, COMPLETIONS, TokenScores, Wish, asking, read, take_out


def chat(*tokens: tuple[str, float, list[float]]) -> dict[str, Any]:
    content = [
        {
            "token": t,
            "logprob": v,
            "top_logprobs": [{"token": f"{t}{i}", "logprob": w} for i, w in enumerate(top)],
        }
        for t, v, top in tokens
    ]
    return {"index": 0, "logprobs": {"content": content}}


def scores(*choices: dict[str, Any]) -> TokenScores:
    found = TokenScores()
    for choice in choices:
        read(choice, found)
    return found


def test_signals_of_known_tokens() -> None:
    """Mean and minimum of the tokens' own, margin to the best other token, which a sampled one may exceed."""
    found = scores(chat(("a", -0.2, [-0.2, -1.7]), ("b", -1.0, [-0.5, -1.0])), {"index": 0, "logprobs": None})
    assert signals.of_scores(Signal.MEAN_LOGPROB, found) == pytest.approx(-0.6)
    assert signals.of_scores(Signal.MIN_LOGPROB, found) == -1.0
    assert signals.of_scores(Signal.MARGIN, found) == -0.5
    assert found.margins == pytest.approx([1.5, -0.5])


def test_nothing_to_measure_is_no_signal() -> None:
    """No tokens, no top two of some token: None, never a number that was not measured."""
    assert signals.of_scores(Signal.MEAN_LOGPROB, TokenScores()) is None
    assert signals.of_scores(Signal.MARGIN, scores(chat(("a", -0.2, [-0.2, -1.0]), ("b", -1.0, [])))) is None


@pytest.mark.parametrize(
    "said",
    [{"content": [{}]}, {"content": 3}, {"content": [{"logprob": "x"}]}, "x", {"token_logprobs": [None]},
     {"token_logprobs": [-1.0], "top_logprobs": [{}, {}]}, {"content": [{"logprob": float("nan")}]}],
)  # fmt: skip
def test_odd_shapes_are_errors(said: object) -> None:
    """What is of no known shape raises ValueError, so that the answer counts as not judged."""
    with pytest.raises(ValueError):
        read({"logprobs": said}, TokenScores())


def test_completions_tell_the_same_in_lists() -> None:
    """The older API's lists side by side give the same numbers."""
    choice = {
        "logprobs": {
            "tokens": ["a", "b"],
            "token_logprobs": [-0.2, -1.0],
            "top_logprobs": [{"a": -0.2, "x": -1.7}, {"y": -0.5, "b": -1.0}],
        }
    }
    found = scores(choice)
    assert (found.logprobs, found.margins) == ([-0.2, -1.0], pytest.approx([1.5, -0.5]))
    take_out(choice, Wish(True, 0))
    assert choice["logprobs"]["top_logprobs"] == [{"a": -0.2}, {"b": -1.0}]
    take_out(choice, Wish(False, 0))
    assert choice["logprobs"] is None


@settings(deadline=None)  # of wall-clock time, on a busy machine
@given(st.booleans(), st.none() | st.integers(0, 20), st.sampled_from([0, 2]))
def test_a_chat_sees_what_it_asked_for(wants: bool, top: int | None, need: int) -> None:
    """Whatever the signal needs, the client's part of the answer is as if nobody else had asked."""
    body = {**({"logprobs": True} if wants else {}), **({} if top is None else {"top_logprobs": top})}
    more, wish = asking(CHAT, body, need)
    assert more["logprobs"] is True
    asked = more.get("top_logprobs", 0)
    assert asked >= need
    choice = chat(("a", -0.1, [-0.1 - i for i in range(asked)]))
    before = copy.deepcopy(choice)
    take_out(choice, wish)
    if not wants:
        assert choice["logprobs"] is None
    else:
        kept = before["logprobs"]["content"][0]
        assert choice["logprobs"]["content"] == [{**kept, "top_logprobs": kept["top_logprobs"][: top or 0]}]


@pytest.mark.parametrize(
    ("given_", "need", "asked"), [(None, 0, 1), (None, 2, 2), (0, 0, 1), (5, 2, 5), (True, 0, 1)]
)
def test_completions_ask_for_a_number(given_: object, need: int, asked: int) -> None:
    """A client's own number is never lowered; true is no number there."""
    more, wish = asking(COMPLETIONS, {} if given_ is None else {"logprobs": given_}, need)
    assert more == {"logprobs": asked}
    assert wish.any == (type(given_) is int)


def test_answers_are_compared_by_what_they_mean() -> None:
    """White space, case and the order of JSON's keys are nothing; another value, or a call, is something."""

    def said(text: str | None, calls: object = None) -> str | None:
        return signals.normalised({"message": {"content": text, "tool_calls": calls}})

    assert said('{"a": 1, "b": [2]}') == said('{"b":[2],"a":1}')
    assert said(" Yes,\n of course") == said("yes, of course")
    assert said('{"a": 1}') != said('{"a": 2}')
    assert signals.normalised({"text": "Yes"}) == said("yes")
    call = [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1, "y": 2}'}}]
    same = [{"id": "2", "function": {"name": "f", "arguments": '{"y":2,"x":1}'}}]
    assert said(None, call) == said(None, same) != said(None)
    assert said(None) is None
    assert signals.agreement("a", ["a", "b", "a", "a"]) == 0.75
    assert signals.agreement("a", []) is None


@pytest.mark.parametrize(
    ("signal", "endpoint", "body", "able"),
    [
        (Signal.MEAN_LOGPROB, CHAT, {}, True),
        (Signal.MEAN_LOGPROB, CHAT, {"n": 1}, True),
        (Signal.MEAN_LOGPROB, CHAT, {"n": 2}, False),
        (Signal.MEAN_LOGPROB, "/v1/messages", {}, False),
        (Signal.GRADER, "/v1/messages", {}, True),
        (Signal.GRADER, "/v1/embeddings", {}, False),
        (Signal.MARGIN, COMPLETIONS, {"prompt": "a"}, True),
        (Signal.MARGIN, COMPLETIONS, {"prompt": [1, 2]}, True),
        (Signal.MARGIN, COMPLETIONS, {"prompt": ["a", "b"]}, False),
        (Signal.MARGIN, COMPLETIONS, {"prompt": [[1], [2]]}, False),
        (Signal.MARGIN, COMPLETIONS, {"prompt": "a", "echo": True}, False),
        (Signal.MARGIN, COMPLETIONS, {"prompt": "a", "best_of": 3}, False),
        (Signal.MARGIN, COMPLETIONS, {"prompt": "a", "use_beam_search": True}, False),
    ],
)
def test_which_requests_can_be_judged(
    signal: Signal, endpoint: str, body: dict[str, Any], able: bool
) -> None:
    """One answer, in an API in which the signal can be measured."""
    assert signals.can_judge(signal, endpoint, body) is able


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 0.1}, "mean_logprob lies in"),
        ({"signal": "self_consistency", "threshold": 1.5}, "self_consistency lies in"),
        ({"threshold": float("inf")}, "finite"),
        ({"signal": "grader", "threshold": 1.0}, "grader: give one"),
        ({"threshold": -1.0, "grader": "x"}, "grader: give one"),
        ({"threshold": -1.0, "hold_tokens": 0}, "hold_tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    """A threshold outside its signal's range would serve all or nothing in silence."""
    with pytest.raises(ConfigError, match=message):
        parse_config(fields, CascadeFields)


def test_a_cascade_is_of_two_plain_upstreams() -> None:
    """No cascade of cascades, not twice the same, no second target, no key of its own; JSON and back."""
    one, two = (Upstream(name=n, model=n, url="http://x") for n in ("one", "two"))
    cascade = Cascade(first=one, then=two, threshold=-0.1)
    smart = Upstream(name="smart", model="smart", cascade=cascade)
    assert smart.parts == (one, two)
    assert one.parts == (one,)
    assert Upstream.model_validate_json(smart.model_dump_json()) == smart
    with pytest.raises(ValueError, match="is a cascade itself"):
        Cascade(first=one, then=smart, threshold=-0.1)
    with pytest.raises(ValueError, match="give another upstream"):
        Cascade(first=one, then=one, threshold=-0.1)
    with pytest.raises(ValueError, match="exactly one of"):
        Upstream(name="smart", model="smart", url="http://x", cascade=cascade)
    with pytest.raises(ValueError, match="have the keys"):
        Upstream(name="smart", model="smart", api_key_env="KEY", cascade=cascade)
