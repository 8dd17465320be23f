"""Students cut out of their teacher: what must stay exact stays exact, what is least important goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from contracts.errors import ConfigError
from distill_jobs.shrink.config import ShrinkConfig
from distill_jobs.shrink.importance import Importance, measure
from distill_jobs.shrink.structured import cut, plan
from distill_jobs.shrink.student import REPORT, build, build_folder
from distill_jobs.training.config import ShapeConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.method_config import LoraConfig
from tests.integration.pipeline_world import write_tokenizer
from tests.unit.teacher_world import VOCAB, rows_folder

LAYERS, WIDTH, HEADS, KV, DIM, INNER = 3, 24, 4, 2, 8, 20
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
KINDS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=DIM, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=DIM, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**{**SHAPE, "num_attention_heads": 3, "num_key_value_heads": 3})
    ),
}
IDS = torch.arange(2, 14)[None]


def teacher(kind: str = "qwen3") -> Any:
    """A small random model whose norms and biases are no ones and zeros."""
    torch.manual_seed(4)
    model = KINDS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """A few random rows."""
    return Rows(rows_folder(tmp_path / "rows"), 32, False)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def cut_to(model: Any, rows: Rows, **sizes: int) -> Any:
    wanted = ShrinkConfig.model_validate(sizes)
    return cut(model, plan(model.config, wanted, measure(model, rows, 8)))


@pytest.mark.parametrize("kind", KINDS)
def test_cut_to_its_own_shape_it_is_the_same_model(kind: str, rows: Rows) -> None:
    """Nothing is scaled, averaged or reordered where nothing is left out."""
    model = teacher(kind)
    same = cut_to(
        model,
        rows,
        layers=LAYERS,
        hidden=WIDTH,
        intermediate=INNER,
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_parts_that_do_nothing_are_found_and_their_removal_changes_nothing(kind: str, rows: Rows) -> None:
    """A block that adds nothing, dead neurons, muted heads and empty channels, all at once and in different
    places: the student has none of them and answers alike."""
    model, width = teacher(kind), DIM
    dead_neurons, dead_heads = {0: [1, 7], 2: [3, 4]}, {0: [0, 3], 2: [1, 2]}
    dead_channels = [2, 5, 11, 19]
    with torch.no_grad():
        layers = model.get_decoder().layers
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            for tensor in layers[1].get_submodule(name).parameters():
                tensor.zero_()
        for block, neurons in dead_neurons.items():
            layers[block].mlp.down_proj.weight[:, neurons] = 0
        for block, heads in dead_heads.items():
            for head in heads:
                layers[block].self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
        model.get_decoder().embed_tokens.weight[:, dead_channels] = 0
        for layer in layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight[dead_channels] = 0
                if part.bias is not None:
                    part.bias[dead_channels] = 0
    found = measure(model, rows, 8)
    wanted = ShrinkConfig(layers=2, hidden=WIDTH - 4, intermediate=INNER - 2, heads=2)
    kept = plan(model.config, wanted, found)
    assert kept.layers == [0, 2]
    assert not set(kept.channels.tolist()) & set(dead_channels)
    assert {block: one.tolist() for block, one in kept.heads.items()} == {0: [1, 2], 2: [0, 3]}
    assert all(not set(kept.neurons[block].tolist()) & set(dead) for block, dead in dead_neurons.items())
    smaller = cut(model, kept)
    assert torch.allclose(logits(smaller), logits(model), atol=2e-4)
    assert smaller.config.num_hidden_layers == 2
    assert smaller.config.head_dim == DIM


def test_key_heads_that_are_alike_become_one_without_a_change(rows: Rows) -> None:
    """MHA to GQA by mean pooling is exact for identical key and value heads, and the mean otherwise."""
    model = teacher()
    attention = model.get_decoder().layers[0].self_attn
    different = attention.k_proj.weight.detach().clone()
    pooled = cut_to(model, rows, kv_heads=1).get_decoder().layers[0].self_attn.k_proj.weight
    assert torch.allclose(pooled, different.view(2, DIM, WIDTH).mean(0), atol=1e-6)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for part in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight[DIM:] = part.weight[:DIM]
    fewer = cut_to(model, rows, kv_heads=1)
    assert fewer.config.num_key_value_heads == 1
    assert torch.allclose(logits(fewer), logits(model), atol=1e-5)


def test_heads_are_left_out_of_every_group_alike() -> None:
    """Query heads keep the key head that they were trained with: each group gives up equally many."""
    found = _flat()
    found.heads[:] = torch.tensor([9.0, 8, 7, 6, 0.1, 0.2, 0.4, 0.3])
    config = Qwen3Config(**{**SHAPE, "num_attention_heads": 8, "num_key_value_heads": 4})
    assert plan(config, ShrinkConfig(heads=4), found).heads[0].tolist() == [0, 2, 5, 6]
    assert plan(config, ShrinkConfig(heads=4, kv_heads=2), found).heads[0].tolist() == [0, 1, 6, 7]


def test_block_influence_is_one_minus_the_cosine(rows: Rows) -> None:
    """A block that turns its input around has influence 2, one that only lengthens it none: 1 - cos."""
    model = teacher()
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.zero_()
    layers = model.get_decoder().layers
    layers[1].register_forward_hook(lambda _, __, out: 3 * out)
    layers[2].register_forward_hook(lambda _, __, out: -out)
    influence = measure(model, rows, 8).influence
    assert torch.allclose(influence, torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64), atol=1e-6)


def test_importance_is_of_real_tokens_only_and_however_rows_are_packed(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fills a packed pass up counts nothing: one row a pass measures the same."""
    together = measure(teacher(), rows, 8)
    monkeypatch.setattr("distill_jobs.shrink.calibration.tokens_of_a_pass", lambda _: 1)
    apart = measure(teacher(), rows, 8)
    for name in ("influence", "heads", "neurons", "channels"):
        assert torch.allclose(getattr(together, name), getattr(apart, name), rtol=1e-4), name


def test_a_neuron_counts_what_it_adds_to_the_stream(rows: Rows) -> None:
    """The mean squared norm of activation times outgoing weights, against a plain forward of each row."""
    model, sums, tokens = teacher(), torch.zeros(INNER, dtype=torch.float64), 0
    found = measure(model, rows, 4)
    down = model.get_decoder().layers[1].mlp.down_proj

    def watch(_: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal sums, tokens
        added = args[0][0][:, :, None].double() * down.weight.T.double()
        sums, tokens = sums + added.square().sum((0, 2)), tokens + len(args[0][0])

    down.register_forward_pre_hook(watch)
    for index in range(4):
        model(input_ids=torch.from_numpy(rows.tokens(index).astype("int64"))[None])
    assert torch.allclose(found.neurons[1], sums / tokens, rtol=1e-4)


def test_a_built_student_is_an_ordinary_checkpoint(tmp_path: Path, rows: Rows) -> None:
    """Any combination of sizes loads as a plain model of that shape, and the report says what was kept; a
    finished folder is not built again, an unfinished one is."""
    base, out = tmp_path / "base", tmp_path / "start"
    teacher().save_pretrained(base)
    write_tokenizer(base)
    wanted = ShrinkConfig(layers=2, hidden=16, intermediate=12, heads=2, kv_heads=1)
    report = build_folder(str(base), wanted, tmp_path / "rows", 32, out)
    config = AutoModelForCausalLM.from_pretrained(out).config
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    assert (*sizes, config.num_attention_heads, config.num_key_value_heads) == (2, 16, 12, 2, 1)
    assert len(config.layer_types) == 2
    assert report["params"] < report["params_before"]
    assert json.loads((out / REPORT).read_text())["layers"] == report["layers"]
    assert build_folder(str(base), wanted, tmp_path / "gone", 32, out)["params"] == report["params"]
    (out / REPORT).unlink()
    build_folder(str(base), wanted, tmp_path / "rows", 32, out)
    assert (out / REPORT).is_file()


def test_shapes_that_cannot_be_are_refused_by_name(rows: Rows) -> None:
    """The message names the field and what the checkpoint has."""
    model, found = teacher(), _flat()
    for sizes, says in (
        ({"layers": 9}, r"shrink\.layers: 9 is more than the checkpoint's 3"),
        ({"hidden": 64}, r"shrink\.hidden"),
        ({"heads": 3}, r"shrink\.heads: 3 is no multiple of the 2"),
    ):
        with pytest.raises(ConfigError, match=says):
            plan(model.config, ShrinkConfig.model_validate(sizes), found)
    six = Qwen3Config(**{**SHAPE, "num_attention_heads": 6, "num_key_value_heads": 3})
    with pytest.raises(ConfigError, match=r"shrink\.kv_heads: 2 does not divide"):
        plan(six, ShrinkConfig(kv_heads=2), found)
    with pytest.raises(ConfigError, match="heads x 8 = hidden"):
        plan(teacher("qwen2").config, ShrinkConfig(hidden=16), found)
    model.config.model_type = "gpt2"
    with pytest.raises(ConfigError, match="gpt2"):
        build(model, ShrinkConfig(layers=1), rows)


@pytest.mark.parametrize(
    "given", [{}, {"heads": 3, "kv_heads": 2}, {"layers": 0}, {"layer": 2}, {"sparsify": {"pattern": "4:2"}}]
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, object]) -> None:
    """An empty section, impossible sizes and misspelt ones."""
    with pytest.raises(ValidationError):
        ShrinkConfig.model_validate(given)


def test_a_training_refuses_what_shrinking_cannot_go_with() -> None:
    """From scratch and from a teacher at once; adapters for a base that is served nowhere."""
    shrink = ShrinkConfig(layers=1)
    with pytest.raises(ValidationError, match="shape"):
        TrainConfig(shrink=shrink, shape=ShapeConfig(tokenizer="x"))
    with pytest.raises(ValidationError, match="merged"):
        TrainConfig(shrink=shrink, lora=LoraConfig(export="adapter"))


def _flat() -> Importance:
    """Importance that prefers nothing."""
    ones = [torch.ones(*shape, dtype=torch.float64) for shape in ((LAYERS,), (LAYERS, 8), (LAYERS, INNER))]
    return Importance(*ones, torch.ones(WIDTH, dtype=torch.float64))
