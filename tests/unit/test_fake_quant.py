"""Training on the served grid: what is computed with is what the artifact holds, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from contracts.errors import ConfigError, DataError
from distill_jobs.shrink.blocks import linears
from distill_jobs.training.attention import register
from distill_jobs.training.config import LossConfig, OptimizerConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.fake_quant import RoundedLinear, fake_quantize, grid_for
from distill_jobs.training.loop import Trainer
from distill_jobs.training.method_config import FakeQuantConfig, LoraConfig
from distill_jobs.training.models import save_model
from distill_jobs.training.packed import pack_checkpoint, pack_codes, run
from distill_jobs.training.rounding import encode, rounded
from distill_jobs.training.validation import validate
from tests.integration.pipeline_world import write_tokenizer
from tests.unit.teacher_world import VOCAB, rows_folder

FORMATS = [
    FakeQuantConfig(bits=bits, group_size=32, symmetric=symmetric)  # type: ignore[arg-type]
    for bits in (4, 3)
    for symmetric in (True, False)
]


def student() -> Any:
    """A model whose columns are whole groups of 32, with rows of queries that are no multiple of 8 x 8."""
    torch.manual_seed(2)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, tie_word_embeddings=True, **shape, **heads))
    model.set_attn_implementation(register())
    return model


def trained(rows: Rows, fake_quant: FakeQuantConfig, dtype: str = "bfloat16") -> Trainer:
    """A few steps on the grid."""
    config = TrainConfig(
        max_steps=3,
        epochs=10,
        batch_rows=8,
        dtype=dtype,  # type: ignore[arg-type]
        fake_quant=fake_quant,
        optimizer=OptimizerConfig(lr=1e-2),
        loss=LossConfig(kd_weight=0, hard_weight=1),
    )
    model = student()
    fake_quantize(model, fake_quant)
    trainer = Trainer(model, rows, config)
    list(trainer.run())
    return trainer


def served(layer: str, state: dict[str, Tensor], config: FakeQuantConfig) -> Tensor:
    """A layer's weights as compressed-tensors, which wrote the format's loader, reads them."""
    names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    local = {name: state[f"{layer}.{name}"] for name in names if f"{layer}.{name}" in state}
    return PackedQuantizationCompressor.decompress(local, _scheme(config))["weight"]


def _scheme(config: FakeQuantConfig, bits: int = 4) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=bits, symmetric=config.symmetric, strategy="group", group_size=config.group_size
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """A few random rows."""
    return Rows(rows_folder(tmp_path / "rows"), 32, False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("config", FORMATS, ids=lambda one: one.format)
def test_the_artifact_holds_what_the_student_computed_with(
    tmp_path: Path, rows: Rows, config: FakeQuantConfig, dtype: str
) -> None:
    """After some steps every packed layer, read by compressed-tensors, equals the weights of the student's
    last forward pass bit for bit; everything else is the checkpoint's."""
    write_tokenizer(tmp_path / "words")
    model: Any = trained(rows, config, dtype).model
    save_model(model, str(tmp_path / "words"), tmp_path / "student")
    result = run(config, tmp_path / "student", tmp_path)
    assert result.notes["format"] == config.format
    state, plain = (load_file(tmp_path / one / "model.safetensors") for one in ("artifact", "student"))
    layers = linears(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(served(name, state, config).float(), rounded(layer.weight, layer.grid).float())
    rest = {name for name in plain if name.removesuffix(".weight") not in layers}
    assert all(torch.equal(state[name], plain[name]) for name in rest)
    about = json.loads((tmp_path / "artifact" / "config.json").read_text())["quantization_config"]
    weights = about["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"], weights["group_size"]) == (4, config.symmetric, 32)
    assert QuantizationArgs.model_validate(weights).strategy == "group"
    assert (tmp_path / "artifact" / "tokenizer.json").is_file()


@pytest.mark.parametrize("symmetric", [True, False])
def test_three_bits_use_eight_levels_and_say_where_they_lie(
    tmp_path: Path, rows: Rows, symmetric: bool
) -> None:
    """INT3 in INT4's container: at most eight codes a layer, and the manifest says that it is no smaller."""
    config = FakeQuantConfig(bits=3, group_size=32, symmetric=symmetric)
    weight = torch.randn(64, 96)
    codes, _, zero = encode(weight, grid_for(config))
    assert codes.unique().tolist() == list(range(-4, 4))
    assert set(zero.unique().tolist()) <= ({0} if symmetric else set(range(-4, 4)))
    write_tokenizer(tmp_path / "words")
    save_model(student(), str(tmp_path / "words"), tmp_path / "student")
    notes = run(config, tmp_path / "student", tmp_path).notes
    assert "no smaller than int4" in notes["container"]
    assert notes["format"].startswith("qad-w3a16")


@pytest.mark.parametrize("config", FORMATS, ids=lambda one: one.format)
def test_the_grid_is_compressed_tensors_own(config: FakeQuantConfig) -> None:
    """Scales and zero points are its min-max observer's, to the rounding of bf16; every weight goes to the
    nearest level within reach."""
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    codes, scale, zero = encode(weight, grid_for(config))
    groups = weight.bfloat16().float().unflatten(1, (-1, 32))
    args = _scheme(config, config.bits).weights
    expected, points = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    torch.testing.assert_close(scale.float(), expected, rtol=2**-8, atol=0)
    assert (zero.float() - points.float()).abs().max() <= 1
    assert (zero == points).float().mean() > 0.9
    levels = torch.arange(grid_for(config).lowest, grid_for(config).highest + 1)
    reach = (levels[None, None] - zero[..., None].float()) * scale[..., None].float()
    nearest = (groups[..., None] - reach[:, :, None]).abs().amin(-1)
    off = (groups - (codes.unflatten(1, (-1, 32)) - zero[..., None].float()) * scale[..., None].float()).abs()
    torch.testing.assert_close(off, nearest, rtol=1e-5, atol=1e-6)


def test_a_group_of_zeros_stays_zero() -> None:
    """No division by zero, and pruned weights survive a symmetric grid."""
    weight = torch.zeros(2, 64)
    weight[0, :32] = torch.linspace(-1, 1, 32)
    weight[0, 5] = 0
    for config in FORMATS:
        found = rounded(weight, grid_for(config))
        assert torch.isfinite(found).all()
        assert found[0, 5] == 0
        assert (found[weight == 0] == 0).all()


def test_gradients_pass_the_rounding_unchanged() -> None:
    """The gradient of a rounded weight is the plain layer's at the rounded value, which inputs see, too."""
    torch.manual_seed(0)
    config = FakeQuantConfig(group_size=32)
    plain, states = nn.Linear(32, 8), torch.randn(5, 32, requires_grad=True)
    ours = nn.Linear(32, 8)
    ours.load_state_dict(plain.state_dict())
    ours.__class__ = RoundedLinear
    ours.grid = grid_for(config)  # type: ignore[assignment]
    plain.weight.data = rounded(plain.weight, grid_for(config))
    outs = []
    for one in (plain, ours):
        out = one(states).square().sum()
        outs.append((out, *torch.autograd.grad(out, [one.weight, one.bias, states])))
    for expected, found in zip(*outs, strict=True):
        torch.testing.assert_close(found, expected)
    assert not torch.equal(ours.weight, plain.weight)


def test_training_on_the_grid_lowers_its_loss(rows: Rows) -> None:
    """The loss of the rounded student falls, though it starts rounded; a plain student rounded afterwards
    would not have been trained for it."""
    config = TrainConfig(
        max_steps=40,
        epochs=99,
        batch_rows=16,
        dtype="float32",
        fake_quant=FakeQuantConfig(bits=3, group_size=32),
        optimizer=OptimizerConfig(lr=1e-2),
        loss=LossConfig(kd_weight=0, hard_weight=1),
    )
    model = student()
    fake_quantize(model, config.fake_quant)  # type: ignore[arg-type]
    history = list(Trainer(model, rows, config).run())
    assert history[-1]["ce"] < 0.8 * history[0]["ce"]


def test_validation_measures_the_rounded_student(tmp_path: Path, rows: Rows) -> None:
    """A validated checkpoint holds whole weights; its loss is that of the grid, not of them."""
    write_tokenizer(tmp_path / "words")
    save_model(student(), str(tmp_path / "words"), tmp_path / "model")
    found = {}
    for fake_quant in (None, FakeQuantConfig(bits=3, group_size=32)):
        loss = LossConfig(kd_weight=0, hard_weight=1)
        config = TrainConfig(fake_quant=fake_quant, max_length=32, loss=loss, dtype="float32")
        kept = _Kept()
        validate(_Checkpoint(tmp_path), config.model_dump(), str(tmp_path / "rows"), kept, 1, 2)  # type: ignore[arg-type]
        found[fake_quant is not None] = kept.values["validation_loss"]
    expected = student()
    fake_quantize(expected, FakeQuantConfig(bits=3, group_size=32))
    total = tokens = 0.0
    with torch.no_grad():
        for index in range(len(rows)):
            ids = torch.from_numpy(rows.tokens(index).astype("int64"))
            logprobs = expected.bfloat16().float()(input_ids=ids[None]).logits[0].log_softmax(-1)
            first = int(rows.prompt_len[index])
            total -= float(logprobs[first - 1 : -1].gather(1, ids[first:, None]).sum())
            tokens += len(ids) - first
    assert found[True] == pytest.approx(total / tokens, rel=1e-4)
    assert found[True] != pytest.approx(found[False], rel=1e-4)


@pytest.mark.parametrize("columns", [8, 12, 31])
def test_codes_are_packed_as_compressed_tensors_packs_them(columns: int) -> None:
    """Eight codes in an int32, the first lowest, filled up with zeros at the end of a row."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    codes = torch.randint(-8, 8, (3, columns), dtype=torch.int8)
    assert torch.equal(pack_codes(codes), pack_to_int32(codes, 4))


def test_what_cannot_be_rounded_is_refused_by_name(tmp_path: Path) -> None:
    """Columns that are no whole groups (with the size that fits), adapters, shards, compiled blocks, a folder
    that is no checkpoint."""
    with pytest.raises(ConfigError, match=r"group_size: 128 does not divide .* Set it to 32"):
        fake_quantize(student(), FakeQuantConfig())
    with pytest.raises(ValidationError, match="lora"):
        TrainConfig(fake_quant=FakeQuantConfig(), lora=LoraConfig())
    with pytest.raises(ValidationError, match="ddp"):
        TrainConfig(fake_quant=FakeQuantConfig(), parallel="fsdp2")
    with pytest.raises(ValidationError, match="compile"):
        TrainConfig(fake_quant=FakeQuantConfig(), compile=True)
    with pytest.raises(DataError, match="no checkpoint"):
        pack_checkpoint(tmp_path, tmp_path / "out", FakeQuantConfig())
    with pytest.raises(ValidationError):
        FakeQuantConfig.model_validate({"bits": 2})


class _Checkpoint:
    """What Ray hands a validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def as_directory(self) -> _Checkpoint:
        return self

    def __enter__(self) -> str:
        return str(self.folder)

    def __exit__(self, *_: object) -> None:
        return None


class _Kept:
    """A run's storage."""

    values: dict[str, float]

    def write_json(self, _: str, values: dict[str, float]) -> None:
        self.values = values
