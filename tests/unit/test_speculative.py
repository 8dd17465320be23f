"""Speculative decoding: the formulas, what may draft for whom, what vLLM is told, and settings files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from contracts.config import parse_config
from contracts.dataset import Manifest
from contracts.errors import ConfigError, GateError
from contracts.gates import Gate
from contracts.speculative import MOST, Speculative, best_tokens, expected_speed_up, expected_tokens
from distill_jobs.gate import check, offer
from distill_jobs.measuring.scores import shared_mass
from serve.engine.config import EngineOptions, engine_command, engine_environment
from serve.engine.drafts import check_draft
from serve.engine.settings import read_settings, write_settings


def checkpoint(folder: Path, words: list[str], size: int) -> str:
    """What of a checkpoint is looked at: vocabulary and bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(words)}))
    vocab = {word: number for number, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    (folder / "model.safetensors").write_bytes(b"0" * size)
    return str(folder)


def test_expected_tokens_is_the_mean_of_a_run_of_accepted_ones() -> None:
    """Equation 1 of Leviathan et al. is the sum over how many are kept, plus the one the model adds."""
    for alpha, gamma in ((0.0, 3), (0.6, 1), (0.8, 5), (1.0, 4)):
        runs = [alpha**kept * (1 - alpha) * (kept + 1) for kept in range(gamma)]
        assert expected_tokens(alpha, gamma) == pytest.approx(sum(runs) + alpha**gamma * (gamma + 1))


def test_table_1_of_the_paper_is_reproduced() -> None:
    """α 0.6, γ 2 → 1.96 tokens' speed with a draft of no cost; α 0.8, γ 5 → 3.69; α 0.9, γ 10 → 6.86."""
    for alpha, gamma, wanted in ((0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 5, 3.69), (0.9, 10, 6.86)):
        assert expected_speed_up(alpha, gamma, 0.0) == pytest.approx(wanted, abs=0.005)


def test_a_dear_or_bad_draft_proposes_few_tokens() -> None:
    """The best γ falls with the draft's cost and rises with acceptance."""
    assert best_tokens(1.0, 0.0) == MOST
    assert best_tokens(0.3, 0.5) == 1
    assert best_tokens(0.9, 0.3) < best_tokens(0.9, 0.02)
    assert expected_speed_up(0.3, 1, 0.5) < 1


def test_vllm_is_told_method_draft_and_count(tmp_path: Path) -> None:
    """A draft's folder goes in full, and the standard sampler, whose output distribution is the model's."""
    big, small = (checkpoint(tmp_path / n, ["a", "b"], size) for n, size in (("big", 200), ("small", 20)))
    options = EngineOptions(speculative=Speculative(draft=f"file://{small}", tokens=3))
    found = dict(pairwise(engine_command(big, "m", options, "127.0.0.1", 1)))
    assert json.loads(found["--speculative-config"]) == {
        "method": "draft_model",
        "model": small,
        "num_speculative_tokens": 3,
        "draft_sample_method": "greedy",
    }
    ngram = EngineOptions(speculative=Speculative(method="ngram", tokens=5, ngram_min=1, ngram_max=3))
    said = json.loads(dict(pairwise(engine_command(big, "m", ngram, "h", 1)))["--speculative-config"])
    assert said == {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }


@pytest.mark.parametrize(
    ("words", "size", "says"),
    [
        (["a", "b", "c"], 20, "vocabulary of 3 tokens, the model one of 2"),
        (["b", "a"], 20, "2 tokens mean something else"),
        (["a", "b"], 200, "no smaller than the model"),
    ],
)
def test_a_draft_that_cannot_draft_is_refused_before_vllm_starts(
    tmp_path: Path, words: list[str], size: int, says: str
) -> None:
    """vLLM looks at the number of tokens alone; a draft of other tokens would only ever be refused."""
    big, draft = checkpoint(tmp_path / "big", ["a", "b"], 200), checkpoint(tmp_path / "d", words, size)
    with pytest.raises(ConfigError, match=says):
        check_draft(big, Speculative(draft=draft))


def test_a_draft_that_is_not_there_or_not_resolved_is_named(tmp_path: Path) -> None:
    """A wrong path is said with its field; a registry's reference is resolved where there is a registry."""
    with pytest.raises(ConfigError, match=r"speculative\.draft: there is no folder"):
        check_draft(str(tmp_path), Speculative(draft=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="was not resolved"):
        check_draft(str(tmp_path), Speculative(draft="registry:support:3"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        check_draft(checkpoint(tmp_path / "big", ["a"], 9), Speculative(draft=str(broken)))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"method": "ngram", "draft": "x"},
        {"draft": "x", "tokens": 0},
        {"draft": "x", "tokens": 17},
        {"method": "ngram", "ngram_min": 5, "ngram_max": 2},
    ],
)
def test_settings_that_contradict_themselves_are_refused(wrong: dict[str, object]) -> None:
    """A draft without a model, n-grams with one, and counts out of bounds are no setting."""
    with pytest.raises(ConfigError):
        parse_config(wrong, Speculative)


def test_engine_settings_reach_command_line_and_environment(tmp_path: Path) -> None:
    """What tune chooses is what vLLM is started with."""
    options = EngineOptions(
        max_num_batched_tokens=256, block_size=32, prefix_caching=False, chunked_prefill=True, bind="0-1"
    )
    command = engine_command("org/m", "m", options, "h", 1)
    found = dict(pairwise(command))
    assert (found["--max-num-batched-tokens"], found["--block-size"]) == ("256", "32")
    assert {"--no-enable-prefix-caching", "--enable-chunked-prefill"} <= set(command)
    assert engine_environment("org/m", options, {})["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"


def test_a_settings_file_lies_under_what_is_said_beside_it(tmp_path: Path) -> None:
    """What a person wrote wins; a second run keeps what the first one set; a replica needs no file."""
    file = tmp_path / "support.yaml"
    write_settings(file, {"max_num_seqs": 8, "threads": 2}, "tuned\non a Friday")
    write_settings(file, {"speculative": Speculative(method="ngram").model_dump()}, "speculated")
    options = EngineOptions.model_validate({"settings": str(file), "threads": 1})
    assert (options.max_num_seqs, options.threads) == (8, 1)
    assert options.speculative == Speculative(method="ngram")
    file.unlink()
    assert EngineOptions.model_validate(options.model_dump(mode="json")) == options


@pytest.mark.parametrize(
    "text", [None, "- 1", "engine: 3", "engine: {settings: a.yaml}", "{", "engine: {a: 1}"]
)
def test_a_settings_file_that_is_none_is_named(tmp_path: Path, text: str | None) -> None:
    """Missing, another form, one that names another, and unknown fields: the error says which field."""
    file = tmp_path / "settings.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"settings|unknown key"):
        parse_config({"settings": str(file)}, EngineOptions)
    if text and text.startswith("engine: {a"):
        assert read_settings(file) == {"a": 1}


def test_shared_mass_is_the_probability_that_a_draw_is_kept() -> None:
    """Σ min(p, q) by hand where lists are whole, and what both list where they are not."""
    p, q = np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.3, 0.2]])
    assert shared_mass(np.array([[4, 5, 6]]), p, np.array([[5, 4, 6]]), q)[0] == pytest.approx(
        0.3 + 0.2 + 0.1
    )
    assert shared_mass(np.array([[4, 5, 6]]), p, np.array([[4, 8, 9]]), q) == pytest.approx([0.5])


def test_a_refused_student_is_offered_as_its_teachers_draft(tmp_path: Path) -> None:
    """The gate's record and its message say what would be kept, how fast it should be, and the command."""
    metrics = {"student.agreement": 0.9, "student.acceptance": 0.8, "student.tokens_per_s": 1000.0,
               "teacher.tokens_per_s": 100.0, "quantized.accuracy": 0.5}  # fmt: skip
    evaluated = Manifest.model_construct(metrics=metrics, intervals={}, outputs={}, config={})
    gate = Gate(metric="quantized.accuracy", at_least=0.9)
    with pytest.raises(GateError, match="may serve as its teacher's draft") as refused:
        check([gate], evaluated, tmp_path / "gates.json", None, None, tmp_path / "a student")
    told = json.loads((tmp_path / "gates.json").read_text())["draft"]
    assert told["tokens"] == best_tokens(0.9, 0.1)
    assert told["expected_speed_up"] == pytest.approx(expected_speed_up(0.9, told["tokens"], 0.1))
    assert told["command"] in str(refused.value)
    assert told["command"] == f"stillhouse speculate ROUTE --draft '{tmp_path}/a student'"


@pytest.mark.parametrize(
    "changed", [{"student.agreement": None}, {"student.agreement": 0.1}, {"student.tokens_per_s": 90.0}]
)
def test_a_student_that_would_gain_nothing_is_not_offered(tmp_path: Path, changed: dict[str, float]) -> None:
    """Another tokenizer (no agreement), a bad student, and one as slow as its teacher."""
    good = {"student.agreement": 0.9, "student.tokens_per_s": 1000.0, "teacher.tokens_per_s": 100.0}
    assert offer(good, tmp_path) is not None
    assert offer({**good, **changed}, tmp_path) is None
