"""The demo's shipped models and how they are made: tokenizer, growing the teacher, the base's text, the
broken student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from contracts.errors import DataError
from demo.base_text import base_pair, notes
from demo.make_models import MODELS, TOKENIZER, broken, digest, grow
from demo.world import SPLITS, TOOLS, canonical, case
from demo.world.tools import ARGUMENTS
from distill_jobs.training.config import ShapeConfig
from distill_jobs.training.models import from_shape, save_model

SMALL = ShapeConfig(
    tokenizer=str(TOKENIZER), hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=64
)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(TOKENIZER)


def test_the_tokenizer_loses_nothing_and_stays_short(tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Requests and answers of every split survive a round trip; answers fit 96 tokens with room for the end
    token."""
    for split in SPLITS:
        cases = [case(split, index) for index in range(300)]
        for texts, most in (
            ([one.text for one in cases], 120),
            ([canonical(one.answer) for one in cases], 80),
        ):
            ids = tokenizer(texts)["input_ids"]
            assert [tokenizer.decode(one) for one in ids] == texts
            assert max(len(one) for one in ids) < most


def test_an_identifier_has_the_same_pieces_in_a_request_and_in_an_answer(tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Copying an order id or an email is copying its tokens: digits alone, the space before it apart."""
    for value in ("A-48213", "solbal36@webly.com", "SAVE86", "S482197"):
        alone = tokenizer(value)["input_ids"]
        for text in (f'"order_id":"{value}"', f"cancel {value} please", f"订单{value}到哪里了"):
            ids = tokenizer(text)["input_ids"]
            assert any(ids[i : i + len(alone)] == alone for i in range(len(ids))), (value, text)


def test_the_chat_template_trains_what_it_serves(tokenizer) -> None:  # type: ignore[no-untyped-def]
    """The generation prompt is a prefix of the training text, which ends with the end-of-sequence token."""
    asked = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "[]"}], tokenize=False)
    assert prompt == "<|user|>hi<|assistant|>"
    assert whole == prompt + "[]" + tokenizer.eos_token


@pytest.mark.parametrize("name", ["teacher", "student-base"])
def test_a_shipped_model_is_the_one_its_card_describes(name: str) -> None:
    """MODEL.json's digest and parameter count are those of the files beside it."""
    card = json.loads((MODELS / name / "MODEL.json").read_text())
    tensors = load_file(MODELS / name / "model.safetensors")
    assert card["digest"] == digest(MODELS / name)
    assert card["params"] == sum(tensor.numel() for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_teacher_is_good_and_large_and_the_base_knows_nothing() -> None:
    """The demo's premises: at least 97 % through vLLM, at least 8 times the student, no task knowledge
    before distilling."""
    teacher, base = (
        json.loads((MODELS / name / "MODEL.json").read_text()) for name in ("teacher", "student-base")
    )
    assert teacher["evaluation_vllm"]["accuracy"] >= 0.97
    assert teacher["params"] >= 8 * base["params"]
    assert base["evaluation_accuracy_forced"] < 0.01


def test_growing_keeps_the_function() -> None:
    """A model grown from two blocks to six gives the same logits, and its new blocks can learn."""
    torch.manual_seed(0)
    shallow = from_shape(SMALL, seed=1).eval()
    deep = grow(shallow, 6).eval()
    ids = torch.randint(0, 2048, (2, 9))
    assert deep.config.num_hidden_layers == 6
    torch.testing.assert_close(
        deep(input_ids=ids).logits, shallow(input_ids=ids).logits, rtol=1e-4, atol=1e-5
    )
    deep(input_ids=ids).logits.square().mean().backward()
    assert float(deep.model.layers[1].mlp.down_proj.weight.grad.abs().max()) > 0


def test_the_base_text_contains_no_answer() -> None:
    """Neither tool names nor argument names of the task occur in what the student's base has seen."""
    forbidden = {f'"{name}"' for name in [*TOOLS, *(name for one in ARGUMENTS.values() for name in one)]}
    for number in range(500):
        written = base_pair(number)[1]
        assert not any(name in written for name in forbidden), written
        assert isinstance(json.loads(written), list)


def test_notes_spell_mentions_in_figures() -> None:
    """Ids as they stand, dates as month and day, hours of 24, number words as numbers, in the order of the
    text."""
    text = "Call me on the 4 of June at 2 pm, two of A-12345 for 10.35, write to solbal36@webly.com"
    assert notes(text, 0) == (
        '[{"note":"06-04"},{"note":14},{"note":2},{"note":"A-12345"},{"note":10.35},{"note":"solbal36@webly.com"}]'
    )
    assert notes("请在7月20号下午3点打给我，我要九个", 1) == '[{"quote":"07-20"},{"quote":15},{"quote":9}]'


def test_broken_moves_tool_names_and_nothing_else(tmp_path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Only the embedding rows of tool names change, every one of them, and the source stays as it was."""
    save_model(from_shape(SMALL, seed=1), str(TOKENIZER), tmp_path / "good")
    before = load_file(tmp_path / "good" / "model.safetensors")
    broken(source=tmp_path / "good", out=tmp_path / "bad")
    after = load_file(tmp_path / "bad" / "model.safetensors")
    moved = (
        (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"])
        .any(-1)
        .nonzero()
        .flatten()
    )
    assert set(moved.tolist()) == {tokenizer(name)["input_ids"][0] for name in TOOLS}
    assert all(torch.equal(before[name], after[name]) for name in before if "embed_tokens" not in name)
    with pytest.raises(DataError, match="splits most tool names"):
        _refuse(tmp_path)


def _refuse(tmp_path: Path) -> None:
    """A student whose tokenizer knows no tool name."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path / "foreign")
    broken(source=tmp_path / "foreign", out=tmp_path / "never")
