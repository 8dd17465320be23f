"""Models whose logits are not head times hidden state are refused before they train or teach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from contracts.errors import TrainingError
from distill_jobs.training.heads import check_head
from distill_jobs.training.models import load_model


def gemma(cap: float | None) -> Any:
    """A tiny Gemma 2 with large logits, capped or not."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=cap, initializer_range=0.5,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def test_a_student_with_capped_logits_is_refused_by_name(tmp_path: Path) -> None:
    """It would train another function than the one that is served; without the cap it is fine."""
    gemma(2.0).save_pretrained(tmp_path / "capped")
    with pytest.raises(TrainingError, match=r"capped: its logits are not .* scaled or capped"):
        load_model(str(tmp_path / "capped"), None, 0)
    gemma(None).save_pretrained(tmp_path / "plain")
    assert load_model(str(tmp_path / "plain"), None, 0).dtype == torch.float32


def test_a_bias_is_refused_and_rounding_is_not(tmp_path: Path) -> None:
    """A bias of the output layer is no part of the product; bf16 teachers differ by rounding alone."""
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    ).eval()
    model.save_pretrained(tmp_path)
    check_head(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), "rounded")
    model.lm_head.bias = torch.nn.Parameter(torch.ones(64))
    with pytest.raises(TrainingError, match="biased: its logits are not"):
        check_head(model, "biased")
