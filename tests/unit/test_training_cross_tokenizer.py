"""Cross-tokenizer distillation: alignment by bytes, the chain rule over groups, and the distance by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from contracts.errors import DataError
from distill_jobs.training.attention import register
from distill_jobs.training.config import LossConfig, TrainConfig
from distill_jobs.training.cross_tokenizer.alignment import Group, align
from distill_jobs.training.cross_tokenizer.spelling import Spelling
from distill_jobs.training.cross_tokenizer.uld import continuation, distance, profile
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer
from tests.unit.tokenizer_world import tokenizer_folder

TEXTS = [("a bc", "abab c"), ("é", "caféab"), ("xx", "b")]


def test_groups_begin_and_end_at_the_same_bytes() -> None:
    """The smallest common groups, one to one where they can be, also across a multi-byte character."""
    assert align([b"ab", b"c", b"d"], [b"a", b"bc", b"d"]) == [Group((0, 2), (0, 2)), Group((2, 3), (2, 3))]
    assert align([b"a", b"b"], [b"a", b"b"]) == [Group((0, 1), (0, 1)), Group((1, 2), (1, 2))]
    assert align([b"\xc3\xa9"], [b"\xc3", b"\xa9"]) == [Group((0, 1), (0, 2))]
    assert align([], []) == []


def test_tokens_that_spell_nothing_do_not_shift_the_groups() -> None:
    """A begin-of-text token on one side only (TRL #5885 collapsed everything into one group) joins a
    neighbour; the rest stays one to one."""
    plain = [b"a", b"b", b"c"]
    assert [g.teacher for g in align(plain, [b"", *plain])] == [(0, 2), (2, 3), (3, 4)]
    assert [g.student for g in align([*plain, b""], plain)] == [(0, 1), (1, 2), (2, 4)]


def test_different_texts_are_refused() -> None:
    """Bytes that differ have no alignment."""
    with pytest.raises(DataError, match="different"):
        align([b"a"], [b"b"])


def test_the_distance_by_hand() -> None:
    """Sorted probabilities, the shorter vocabulary filled with zeros; the order of tokens is nothing."""
    student = profile(torch.ones(1, 1), torch.tensor([[0.2], [0.5], [0.3]]).log(), 1.0, None)
    assert student.tolist() == [pytest.approx([0.5, 0.3, 0.2])]
    teacher = torch.tensor([[0.9, 0.1]])
    assert distance(student, teacher).tolist() == pytest.approx([0.4 + 0.2 + 0.2])
    two = profile(torch.ones(1, 1), torch.tensor([[0.2], [0.5], [0.3]]).log(), 1.0, 2)
    assert distance(two, teacher).tolist() == pytest.approx([0.4 + 0.2])
    assert distance(teacher, teacher).tolist() == [0.0]


def test_a_group_of_tokens_follows_the_chain_rule() -> None:
    """The first token's own probability is not in the factor (its distribution is compared), each further
    one's is, once."""
    logprobs = torch.tensor([0.5, 0.4, 0.3, 0.2]).log()
    groups, first = torch.tensor([0, 0, 0, 1]), torch.tensor([True, False, False, True])
    assert continuation(logprobs, groups, first, 2).tolist() == pytest.approx([0.4 * 0.3, 1.0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student on single bytes, a teacher with merges and a begin-of-text token, and rows of the student."""
    place = tmp_path_factory.mktemp("cross")
    student = tokenizer_folder(place / "student")
    teacher = tokenizer_folder(place / "teacher", merges=(("a", "b"), ("Ã", "©")), bos=True)
    for folder, seed, width in ((student, 0, 16), (teacher, 1, 24)):
        torch.manual_seed(seed)
        size = len(AutoTokenizer.from_pretrained(folder))
        config = Qwen3Config(
            vocab_size=size,
            hidden_size=width,
            num_hidden_layers=1,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.3,
            eos_token_id=1,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder)
    spell = Spelling(AutoTokenizer.from_pretrained(student))
    ids = [spell.ids(p, False) + spell.ids(a, False) + [spell.end] for p, a in TEXTS]
    (place / "rows").mkdir()
    pq.write_table(
        pa.table(
            {
                "input_ids": pa.array(ids, pa.list_(pa.int32())),
                "prompt_len": pa.array([len(spell.ids(p, False)) for p, _ in TEXTS], pa.int32()),
            }
        ),
        place / "rows" / "part-00000.parquet",
    )
    return {"student": student, "teacher": teacher, "rows": place / "rows"}


def _trainer(world: dict[str, Path], **changes: object) -> Trainer:
    config = TrainConfig.model_validate(
        {
            "dtype": "float32",
            "batch_rows": 3,
            "loss": LossConfig(kd_weight=1, hard_weight=0),
            "teacher": {
                "models": [{"model": str(world["teacher"]), "dtype": "float32"}],
                "cross_tokenizer": {},
            },
            **changes,
        }
    )
    student = AutoModelForCausalLM.from_pretrained(world["student"], dtype=torch.float32)
    student.set_attn_implementation(register())
    return Trainer(student, Rows(world["rows"], 64, False), config)


def _spelled_out(world: dict[str, Path]) -> float:
    """The step's distance, group by group, from plain forward passes."""
    folders = world["student"], world["teacher"]
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in folders]
    spells = [Spelling(AutoTokenizer.from_pretrained(f)) for f in folders]
    total, tokens = 0.0, 0
    for prompt, answer in TEXTS:
        sides = []
        for model, spell, start in zip(models, spells, (False, True), strict=True):
            before, after = spell.ids(prompt, start), [*spell.ids(answer, False), spell.end]
            with torch.no_grad():
                logits = model(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
            sides.append((after, logits.softmax(-1), [spell.bytes_of(one) for one in after[:-1]]))
        (mine, p, a), (its, q, b) = sides
        groups = [*align(a, b), Group((len(a), len(a) + 1), (len(b), len(b) + 1))]
        for group in groups:
            merged = []
            for ids, probabilities, (first, last) in ((mine, p, group.student), (its, q, group.teacher)):
                factor = np.prod([float(probabilities[i, ids[i]]) for i in range(first + 1, last)])
                merged.append(probabilities[first].sort(descending=True).values * factor)
            size = group.student[1] - group.student[0]
            total += size * float(distance(merged[0][None], merged[1][None]))
            tokens += size
    return total / tokens


def test_the_step_compares_aligned_groups(world: dict[str, Path]) -> None:
    """The whole way, prompts of different lengths and a begin-of-text token on the teacher's side included,
    is what plain forward passes give: no state is off by one (TRL #4392)."""
    expected = _spelled_out(world)
    for micro_tokens, packing in ((8192, True), (8192, False), (16, True)):
        trainer = _trainer(world, micro_tokens=micro_tokens, packing=packing)
        parts = trainer.accumulate(0, np.arange(3))
        assert float(parts[0]) == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainer.model.parameters())


def test_training_brings_the_student_nearer(world: dict[str, Path]) -> None:
    """The distance falls when it is minimised."""
    history = list(_trainer(world, epochs=30, optimizer={"lr": 1e-2}).run())
    assert history[-1]["kd"] < 0.8 * history[0]["kd"]
