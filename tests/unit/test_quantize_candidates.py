"""Names of ways to quantize, what does not fit together, the front and the choice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from contracts.errors import ConfigError
from distill_jobs.quantizing.candidates import DEFAULT, Measured, choose, front, parse_candidate
from distill_jobs.quantizing.cli import EPILOG
from distill_jobs.quantizing.config import QuantizeConfig, Scheme

BASE = QuantizeConfig(samples=7)


@pytest.mark.parametrize(
    "name",
    [
        "rtn-w4a16-g128", "awq-w4a16-asym-g64", "gptq-w4a16-g32-as-gptq", "awq-w4a16-asym-g128-as-awq",
        "smoothquant-w8a8-channel", "rtn-w8a8-tensor", "smoothquant-w8a8-static-channel", "gptq-w8a8-channel",
        "smoothquant-w4a8-g32", "rtn-w4a16-channel", "gptq-mixed-g128", "rtn-fp8-dynamic-channel",
        "smoothquant-w8a8-asym-channel",
    ],
)  # fmt: skip
def test_a_candidates_name_is_its_artifacts_precision(name: str) -> None:
    """What a table prints can be asked for again, and means the same."""
    config = parse_candidate(name, BASE)
    assert config.precision == name
    assert config.samples == 7


def test_the_default_candidates_are_valid() -> None:
    """Each of the command's own candidates parses, and none is another's twin."""
    assert len({parse_candidate(name, BASE).precision for name in DEFAULT}) == len(DEFAULT)


@pytest.mark.parametrize("name", ["", "awq", "awq-w4a16-g", "awq-w3a16-g128x", "größe-w4a16", "awq w4a16"])
def test_a_misspelt_candidate_says_how_one_is_written(name: str) -> None:
    """The error shows examples."""
    with pytest.raises(ConfigError, match="awq-w4a16-g128"):
        parse_candidate(name, BASE)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("smoothquant-w4a16-g128", "quantizes activations"),
        ("rtn-w8a8-channel-as-awq", "4-bit weights alone"),
        ("gptq-w4a16-asym-g128-as-gptq", "symmetric"),
        ("rtn-w4a16-tensor", "no kernel with one scale a tensor"),
        ("rtn-w8a8-g128", "no kernel with a scale a group"),
        ("awq-mixed-g128", "one scheme"),
        ("awq-w4a16-channel-as-awq", "leave granularity out"),
        ("gptq-w4a16-g256-as-gptq", "know 32, 64 and 128"),
        ("foo-w4a16-g128", "algorithm"),
        ("rtn-w4a16-g48", "group_size"),
        ("rtn-w5a16-g128", "scheme"),
    ],
)
def test_combinations_that_nobody_serves_are_refused(name: str, why: str) -> None:
    """Said before any work, naming the field."""
    with pytest.raises(ConfigError, match=why):
        parse_candidate(name, BASE)


def test_auto_is_the_algorithm_that_fits_the_scheme() -> None:
    """AWQ for weights alone (the pipeline's default since decision 0002), SmoothQuant for activations."""
    schemes = ("W4A16", "W8A8", "W4A8", "MIXED", "FP8_DYNAMIC")
    by_scheme = {s: QuantizeConfig(scheme=s).method for s in schemes}  # type: ignore[arg-type]
    assert by_scheme == {
        "W4A16": "awq", "W8A8": "smoothquant", "W4A8": "smoothquant", "MIXED": "gptq", "FP8_DYNAMIC": "rtn",
    }  # fmt: skip
    assert QuantizeConfig().precision == "awq-w4a16-g128"


def measured(name: str, size: int, loss: float, speed: float, refused: str | None = None) -> Measured:
    """A candidate with these figures."""
    return Measured(
        name=name, artifact=f"/a/{name}", bytes=size, perplexity=30 * (1 + loss), loss=loss, kl=loss,
        tokens_per_s=speed, refused=refused,
    )  # fmt: skip


ALL = [
    measured("small", 50, 0.03, 90),
    measured("good", 55, 0.01, 90),
    measured("worse", 56, 0.02, 80),
    measured("fast", 100, 0.015, 150),
    measured("broken", 10, 0.0, 500, refused="served otherwise than written"),
]


def test_the_front_has_what_nothing_beats() -> None:
    """In bytes, quality and speed together; what was refused beats nobody."""
    assert [m.name for m in front(ALL)] == ["small", "good", "fast"]


def test_the_choice_follows_its_rule() -> None:
    """Within loss and bytes, by what is preferred; the rule is told with the limits in it."""
    assert _picked("bytes", 0.02) == "good"
    assert _picked("bytes", 0.05) == "small"
    assert _picked("speed", 0.02) == "fast"
    assert _picked("speed", 0.02, 60) == "good"
    assert _picked("quality", 0.02) == "good"
    assert _picked("bytes", 0.001) is None
    told = choose(ALL, "speed", 0.02, 60).rule
    assert "2.00%" in told
    assert "60 bytes" in told
    assert "tokens/s" in told


def _picked(prefer: str, loss: float, budget: int | None = None) -> str | None:
    found = choose(ALL, prefer, loss, budget).picked  # type: ignore[arg-type]
    return None if found is None else found.name


def test_every_candidate_that_is_written_down_exists() -> None:
    """Help and guide name candidates and schemes that parse: a reader may copy any of them."""
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "quantization.md").read_text()
    named = set(re.findall(r"^  ([a-z]+-[a-z0-9-]+) ", EPILOG, re.MULTILINE))
    named |= set(re.findall(r"`([a-z]+-(?:w\d+a\d+|mixed|fp8)[a-z0-9-]*)`", guide))
    assert len(named) >= 10
    for name in named:
        parse_candidate(name, BASE)
    for scheme in get_args(Scheme):
        assert scheme in guide, scheme
