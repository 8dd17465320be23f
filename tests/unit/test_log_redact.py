"""Redaction: what detectors find does not reach the log, in whatever shape it comes, and the rest does."""

from __future__ import annotations

import json
import re
import re._constants as sre
import re._parser as sre_parse
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from contracts import detectors
from contracts.detectors import BUILT_IN, Span, load_detectors
from contracts.errors import ConfigError, DataError
from contracts.redaction import Redactor, merged, replaced, replaced_in_parts
from contracts.routes import LogPolicy
from contracts.traffic import LogMode, Split, UnitKind, Upstream
from serve.router.assign import assign
from serve.router.exchange import Exchange
from serve.router.table import Route
from tests.unit.test_request_log import row

REDACTOR = Redactor(tuple(BUILT_IN.values()))

FOUND = [
    ("alice@example.com", "[EMAIL]"),
    ("x.y+z@mail.example.co.uk", "[EMAIL]"),
    ("用户@例子.公司", "[EMAIL]"),
    ("+49 (0)170 1234567", "[PHONE]"),
    ("0049 30 901820", "[PHONE]"),
    ("030 1234567", "[PHONE]"),
    ("06.12.34.56.78", "[PHONE]"),
    ("(555) 123-4567", "[PHONE]"),
    ("555-123-4567", "[PHONE]"),
    ("13800138000", "[PHONE]"),
    ("4111 1111 1111 1111", "[CREDIT_CARD]"),
    ("4111-1111-1111-1111", "[CREDIT_CARD]"),
    ("378282246310005", "[CREDIT_CARD]"),
    ("DE89 3704 0044 0532 0130 00", "[IBAN]"),
    ("gb29nwbk60161331926819", "[IBAN]"),
    ("192.168.0.1", "[IP]"),
    ("2001:db8::8a2e:370:7334", "[IP]"),
    ("::1", "[IP]"),
    ("sk-proj-abcDEF0123456789xyz", "[API_KEY]"),
    ("ghp_0123456789abcdefghij0123456789abcdef", "[API_KEY]"),
    ("AKIAIOSFODNN7EXAMPLE", "[API_KEY]"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.sig_n4ture", "[API_KEY]"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "[PRIVATE_KEY]"),
]


@pytest.mark.parametrize(("secret", "label"), FOUND)
@pytest.mark.parametrize("around", ["{}", "to {}, please", "地址{}的", "({})", "\u202e{}\u200b", "<b>{}</b>"])
def test_each_kind_is_replaced_wherever_it_stands(secret: str, label: str, around: str) -> None:
    """Neither brackets, nor Chinese text without spaces, nor invisible characters hide it."""
    assert REDACTOR.text(around.format(secret)).replace("地址", "") in (
        around.format(label).replace("地址", ""),
        f"{label}",  # an address takes letters that touch it along
        f"{label}的",
    )


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-15 10:30:45 and 01.02.2024 10:30",
        "order 1234567890, 0.123456789, 3.14159265358979",
        "4111 1111 1111 1112",
        "DE88370400440532013000",
        "std::vector a @ b, version 1.2.3, 999.999.999.999",
        "the secret: patience. token: probability; bearer of good news",
        "price: 1 299 000, pages 12-15, room 101",
    ],
)
def test_what_only_looks_alike_stays(text: str) -> None:
    """Dates, decimals, order numbers, wrong checksums and prose are what students learn from."""
    assert REDACTOR.text(text) == text


def test_named_secrets_lose_their_value_only() -> None:
    """The sentence around a password stays readable."""
    assert REDACTOR.text("my password: hunterzwei!") == "my password: [API_KEY]"
    assert REDACTOR.text('"api_key": "a1b2c3d4e5"') == '"api_key": "[API_KEY]"'
    assert REDACTOR.text("Authorization: Bearer abcdefghij12345678") == "Authorization: Bearer [API_KEY]"


plain = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
secrets = st.sampled_from([secret for secret, _ in FOUND])


@given(st.lists(st.tuples(plain, secrets), min_size=1, max_size=5), plain)
def test_no_secret_survives_between_any_texts(pieces: list[tuple[str, str]], end: str) -> None:
    """Set off by spaces, every secret is gone from every text, whatever its unicode neighbours."""
    hidden = REDACTOR.text("".join(f"{before} \n{secret}\n " for before, secret in pieces) + end)
    assert [secret for _, secret in pieces if secret in hidden] == []


spans = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 15), st.sampled_from(["A", "B_2", "C"])), max_size=8
)


@given(st.text(min_size=56, max_size=60), spans)
def test_no_detected_span_survives_and_nothing_else_is_lost(
    text: str, given_spans: list[tuple[int, int, str]]
) -> None:
    """However spans overlap, exactly the characters that some span covers are gone, in order."""
    assume("\0" not in text and not any(f"[{label}]" in text for label in ("A", "B_2", "C")))
    found = [(start, start + length, label) for start, length, label in given_spans]
    hidden = replaced(text, merged(text, found))
    covered = {i for start, end, _ in found for i in range(start, end)}
    pieces = "".join("\0" if i in covered else char for i, char in enumerate(text))
    expected = re.split("\0+", pieces)
    # Spans that only touch stay two labels with nothing between them.
    assert re.split(r"(?:\[(?:A|B_2|C)\])+", hidden) == expected


@given(st.lists(st.text(max_size=12), min_size=1, max_size=6), spans)
def test_parts_are_redacted_as_one_text(parts: list[str], given_spans: list[tuple[int, int, str]]) -> None:
    """A span over several parts of a content is gone from all of them; there are as many parts as before."""
    text = "".join(parts)
    found = merged(text, [(s, min(s + n, len(text)), label) for s, n, label in given_spans if s < len(text)])
    made = replaced_in_parts(parts, found)
    assert len(made) == len(parts)
    assert "".join(made) == replaced(text, found)


CARD = "4111 1111 1111 1111"
MAIL = "alice@example.com"
PNG = "data:image/png;base64," + "A" * 80


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"I am {MAIL}", "I am [EMAIL]"),
        (None, None),
        ([{"type": "text", "text": MAIL}], [{"type": "text", "text": "[EMAIL]"}]),
        (
            [{"type": "text", "text": "alice@exam"}, {"type": "text", "text": "ple.com!"}],
            [{"type": "text", "text": "[EMAIL]"}, {"type": "text", "text": "!"}],
        ),
        (
            [{"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}],
            [{"type": "image_url", "image_url": {"url": "[BINARY]", "detail": "low"}}],
        ),
        (
            [{"type": "input_audio", "input_audio": {"data": "B" * 100, "format": "wav"}}],
            [{"type": "input_audio", "input_audio": {"data": "[BINARY]", "format": "wav"}}],
        ),
        (
            [{"type": "tool_result", "content": [{"type": "text", "text": CARD}]}],
            [{"type": "tool_result", "content": [{"type": "text", "text": "[CREDIT_CARD]"}]}],
        ),
        (
            [{"type": "refusal", "refusal": MAIL}, MAIL],
            [{"type": "refusal", "refusal": "[EMAIL]"}, "[EMAIL]"],
        ),
    ],
)
def test_every_shape_of_a_content_is_redacted(content: Any, expected: Any) -> None:
    """Strings, parts, nested tool results; pictures and sound go whole, because nobody can look into them."""
    made = REDACTOR.row(row(1).model_copy(update={"request": {"messages": [{"content": content}]}}))
    assert made.request["messages"] == [{"content": expected}]


def test_arguments_of_tool_calls_are_read_as_json() -> None:
    """Escapes do not hide an address, a number that is a card becomes a string, and it stays JSON."""
    arguments = '{"to": "alice\\u0040example.com", "card": 4111111111111111, "n": 3, "alice@example.com": 1}'
    call = {"id": "c1", "type": "function", "function": {"name": "send", "arguments": arguments}}
    made = REDACTOR.row(row(1).model_copy(update={"request": {"messages": [{"tool_calls": [call]}]}}))
    hidden = made.request["messages"][0]["tool_calls"][0]["function"]
    assert json.loads(hidden["arguments"]) == {"to": "[EMAIL]", "card": "[CREDIT_CARD]", "n": 3, "[EMAIL]": 1}
    assert hidden["name"] == "send"


def test_json_with_a_key_twice_hides_nothing() -> None:
    """A parser keeps the last of two equal keys; the text that is logged must not keep the first."""
    assert MAIL not in REDACTOR.text(f'{{"a": "{MAIL}", "a": 1}}')
    assert MAIL not in REDACTOR.text("[" * 100_000 + MAIL)


def test_a_row_is_redacted_everywhere_but_in_what_its_developer_wrote() -> None:
    """Request, answer, whole response and error; tools, model and parameters stay as they are."""
    tools = [{"type": "function", "function": {"name": "f", "description": f"mail {MAIL}"}}]
    request = {
        "model": "support", "messages": [{"role": "user", "content": MAIL}], "prompt": [1, 2, 3],
        "tools": tools, "user": MAIL, "metadata": {"phone": 4915112345671}, "seed": 4111111111111111,
        "input": f"call {MAIL}", "logprobs": True,
    }  # fmt: skip
    response = {
        "created": 1700000000,
        "choices": [{"message": {"content": MAIL}, "logprobs": {"content": [{"token": "alice"}]}}],
        "prompt_logprobs": [None, {"1": {"decoded_token": "alice"}}],
    }
    made = REDACTOR.row(
        row(1, text=f"I wrote to {MAIL}.").model_copy(
            update={"request": request, "response": response, "error": f"no such user {MAIL}"}
        )
    )
    assert made.log_mode is LogMode.REDACTED
    assert made.response_text == "I wrote to [EMAIL]."
    assert made.error == "no such user [EMAIL]"
    assert made.response == {
        "created": 1700000000,
        "choices": [{"message": {"content": "[EMAIL]"}, "logprobs": None}],
        "prompt_logprobs": None,
    }
    assert made.request == {
        "model": "support", "messages": [{"role": "user", "content": "[EMAIL]"}], "prompt": "[TOKENS]",
        "tools": tools, "user": "[EMAIL]", "metadata": {"phone": 4915112345671}, "seed": 4111111111111111,
        "input": "call [EMAIL]", "logprobs": True,
    }  # fmt: skip


def test_what_a_stream_tears_apart_is_redacted_whole() -> None:
    """Detectors see the assembled answer, not the chunks it came in."""
    split = Split(route="r", version=1, salt="s", stable=Upstream(name="t", model="m", url="http://h"))
    ex = Exchange(
        "r1", "/v1/chat/completions", Route(split), assign(split, UnitKind.HEADER, "c"), {}, 0.0, b""
    )
    ex.streamed = True
    for piece in ("I am al", "ice@exam", "ple.c", "om!"):
        event = {"choices": [{"index": 0, "delta": {"content": piece}}]}
        ex.chunks.append(b"data: " + json.dumps(event).encode() + b"\n\n")
    ex.log_policy = LogPolicy(mode=LogMode.REDACTED)
    assert ex.log_mode() is LogMode.REDACTED
    assert REDACTOR.row(ex.build()).response_text == "I am [EMAIL]!"


def test_a_detector_of_ones_own_is_used_and_checked() -> None:
    """'module:function' works like a built-in one; nonsense from it is an error, never half a redaction."""
    (own,) = load_detectors(["tests.unit.test_log_redact:shouts"])
    assert Redactor([own]).text("is HE in") == "is [SHOUT] in"
    with pytest.raises(DataError, match="outside"):
        Redactor([lambda text: [(0, len(text) + 1, "X")]]).text("ab")
    with pytest.raises(DataError, match="label"):
        Redactor([lambda text: [(0, 1, "not a label")]]).text("ab")
    for wrong in ("nonsense", "no.such:thing", "json:nothing", "json:__name__"):
        with pytest.raises(ConfigError, match=re.escape("log.detectors")):
            load_detectors([wrong])


def shouts(text: str) -> list[Span]:
    return [(m.start(), m.end(), "SHOUT") for m in re.finditer("[A-Z]{2,}", text)]


PATTERNS = {name: value for name, value in vars(detectors).items() if isinstance(value, re.Pattern)}


@pytest.mark.parametrize("name", PATTERNS)
def test_no_pattern_repeats_an_unbounded_repeat(name: str) -> None:
    """(a+)+ is what makes a regular expression exponential; only separated digits may look like it."""
    allowed = {"_DIGITS"}  # \\d+(sep \\d+)*: one character decides, so there is only one way to match
    assert (_nested(sre_parse.parse(PATTERNS[name].pattern)) == []) or name in allowed


def _nested(tree: Any, inside: bool = False) -> list[Any]:
    found = []
    for op, args in tree:
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            unbounded = args[1] == sre.MAXREPEAT
            found += [args] if inside and unbounded else []
            found += _nested(args[2], inside=True)
        elif op is sre.SUBPATTERN:
            found += _nested(args[3], inside)
        elif op is sre.BRANCH:
            for branch in args[1]:
                found += _nested(branch, inside)
        elif op in (sre.ASSERT, sre.ASSERT_NOT):
            found += _nested(args[1], inside)
    return found


@pytest.mark.parametrize(
    "piece",
    [
        "a", "a@", "a@b.", "1", "44 ", "0 ", "+1 ", "(0", "eyJ", "eyJaaaaaaaa.", ":", "f:", "DE12 ", "token=",
        "bearer ", "sk-", "1.", "[", '{"a":', "-----BEGIN PRIVATE KEY-----", "@", " ", "password",
    ],
)  # fmt: skip
def test_a_megabyte_of_anything_is_read_in_one_pass(piece: str) -> None:
    """A quadratic pattern would need hours for these and run into the suite's own limit."""
    text = piece * (2**20 // len(piece)) + " \n" + MAIL
    assert REDACTOR.text(text).endswith("[EMAIL]") or "[PRIVATE_KEY]" in REDACTOR.text(text)
