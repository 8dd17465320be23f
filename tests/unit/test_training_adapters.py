"""LoRA students: what is trained, what the chunked op sees, and what leaves the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from contracts.model import AdapterBase
from distill_jobs.training.adapters import add_lora, save_student
from distill_jobs.training.config import LossConfig, OptimizerConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from distill_jobs.training.method_config import LoraConfig
from registry.adapter import read_adapter
from registry.digest import digest_folder
from tests.unit.teacher_world import model, rows_folder
from tests.unit.tokenizer_world import tokenizer_folder

IDS = torch.tensor([[2, 3, 5, 7, 11]])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a tokenizer and a base model on disk."""
    place = tmp_path_factory.mktemp("lora")
    rows_folder(place / "rows")
    tokenizer_folder(place / "tokenizer")
    model(0).save_pretrained(place / "base")
    return place


def trained(place: Path, lora: LoraConfig) -> Trainer:
    config = TrainConfig(
        dtype="float32",
        batch_rows=8,
        epochs=3,
        optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1),
        loss=LossConfig(kd_weight=0, hard_weight=1),
        lora=lora,
    )
    torch.manual_seed(3)
    trainer = Trainer(add_lora(model(0), lora, str(place / "base")), Rows(place / "rows", 64, False), config)
    history = list(trainer.run())
    assert history[-1]["ce"] < history[0]["ce"]
    return trainer


def test_only_adapters_have_masters_and_move(place: Path) -> None:
    """Masters and optimizer state are the adapters'; every base weight is bit for bit what it was."""
    trainer = trained(place, LoraConfig(r=4))
    assert trainer.optimizer.masters
    assert all("lora_" in name for name in trainer.optimizer.masters)
    before = model(0).state_dict()
    for name, after in trainer.model.base_model.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(after, before[name.replace(".base_layer", "")]), name


def test_the_op_sees_the_adapted_model(place: Path) -> None:
    """The decoder that the step calls carries the adapters: its states are those of the whole peft model."""
    trainer = trained(place, LoraConfig(r=4))
    wrapped = trainer.model.eval()
    with torch.no_grad():
        states = wrapped.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
        logits = states @ wrapped.get_output_embeddings().weight.T
        torch.testing.assert_close(logits, wrapped(input_ids=IDS).logits)
        assert (logits - model(0).eval()(input_ids=IDS).logits).abs().max() > 1e-3


def test_merged_export_is_a_plain_model_that_computes_the_same(place: Path, tmp_path: Path) -> None:
    """A folder that transformers loads without peft, in bf16; the run's own model is left as it was."""
    trainer = trained(place, LoraConfig(r=4))
    names = list(trainer.model.state_dict())
    save_student(trainer.model, str(place / "tokenizer"), tmp_path / "student", LoraConfig(r=4))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    assert json.loads((tmp_path / "student" / "config.json").read_text())["dtype"] == "bfloat16"
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=IDS).logits
        assert (plain(input_ids=IDS).logits - expected).abs().max() < 0.03 * expected.abs().max()
    assert list(trainer.model.state_dict()) == names
    assert not any("lora" in name for name in plain.state_dict())


def test_adapter_export_loads_beside_its_base(place: Path, tmp_path: Path) -> None:
    """adapter_config.json and adapter_model.safetensors with nothing of the base in them; peft puts them
    back together."""
    from peft import PeftModel

    lora = LoraConfig(r=4, alpha=8, target_modules=("q_proj", "v_proj"), export="adapter")
    trainer = trained(place, lora)
    folder = tmp_path / "student"
    save_student(trainer.model, str(place / "tokenizer"), folder, lora)
    card = json.loads((folder / "adapter_config.json").read_text())
    assert (card["r"], card["lora_alpha"], sorted(card["target_modules"])) == (4, 8, ["q_proj", "v_proj"])
    assert card["base_model_name_or_path"] == str(place / "base")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert all("lora_" in name and one.dtype == torch.bfloat16 for name, one in tensors.items())
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    together = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=IDS).logits
        assert (together(input_ids=IDS).logits - expected).abs().max() < 0.03 * expected.abs().max()


def test_an_exported_adapter_says_its_base(place: Path) -> None:
    """Its digest is the base folder's, so that it can be held against the weights of an engine."""
    lora = LoraConfig(r=4, export="adapter")
    wrapped = add_lora(model(0), lora, str(place / "base"))
    save_student(wrapped, str(place / "tokenizer"), place / "told", lora)
    assert read_adapter(place / "told") == AdapterBase(
        ref=str(place / "base"), digest=digest_folder(place / "base"), rank=4
    )
