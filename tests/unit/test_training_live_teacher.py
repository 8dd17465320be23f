"""Live teachers in the step: their loss is the full one, whatever the batching; terms, stages and routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

from contracts.errors import ConfigError
from distill_jobs.training.config import LossConfig, OptimizerConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer, Workers
from tests.unit.teacher_world import model, rows_folder, teacher_folder

ROWS = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two teachers and rows that name them by turns."""
    place = tmp_path_factory.mktemp("live")
    return {
        "teacher": teacher_folder(place / "teacher"),
        "other": teacher_folder(place / "other", seed=8, layers=2, width=32),
        "rows": rows_folder(place / "rows", ROWS, teacher=["a" if i % 2 else "b" for i in range(ROWS)]),
    }


def config(world: dict[str, Path], names: tuple[str, ...] = ("teacher",), **changes: Any) -> TrainConfig:
    models = [
        {"model": str(world[n]), "dtype": "float32", "weight": i + 1.0, "tag": "ab"[i]}
        for i, n in enumerate(names)
    ]
    teacher = {"models": models, **changes.pop("teacher", {})}
    base = {
        "dtype": "float32",
        "batch_rows": ROWS,
        "epochs": 1,
        "optimizer": OptimizerConfig(lr=1e-2),
        "loss": LossConfig(kd_weight=0.7, hard_weight=0.2),
        "teacher": teacher,
    }
    return TrainConfig.model_validate({**base, **changes})


def gradient(world: dict[str, Path], one: TrainConfig, world_size: int = 1) -> tuple[Tensor, Tensor]:
    """Sums of parts and of gradients (student and projections) of one step over all rows."""
    total: list[Tensor] = []
    for rank in range(world_size):
        torch.manual_seed(11)  # projections start alike on every worker
        trainer = Trainer(model(0), Rows(world["rows"], 64, False), one, Workers(rank, world_size))
        sums = trainer.accumulate(0, np.arange(ROWS))
        named = [p for _, p in trainer.optimizer.named]
        total.append(torch.cat([sums, *[(p * 0 if p.grad is None else p.grad).flatten() for p in named]]))
    parts = len(trainer.step.parts)
    whole = torch.stack(total).sum(0).detach()
    return whole[:parts], whole[parts:]


def textbook(world: dict[str, Path], names: tuple[str, ...], kl: Any) -> tuple[float, float]:
    """Mean of `kl(teachers' log-probabilities, student's)` and cross entropy, row by row in plain torch."""
    student = model(0)
    teachers = [AutoModelForCausalLM.from_pretrained(world[n], dtype=torch.float32) for n in names]
    rows = Rows(world["rows"], 64, False)
    sums, count = torch.zeros(2), 0
    with torch.no_grad():
        for i in range(ROWS):
            ids, first = torch.from_numpy(rows.tokens(i).astype(np.int64)), int(rows.prompt_len[i])
            q = student(ids[None]).logits[0, first - 1 : -1].log_softmax(-1)
            p = [t(ids[None]).logits[0, first - 1 : -1].log_softmax(-1) for t in teachers]
            labels = ids[first:]
            sums += torch.stack([kl(i, p, q).sum(), -q.gather(-1, labels[:, None]).sum()])
            count += len(labels)
    return float(sums[0]) / count, float(sums[1]) / count


def test_a_live_teacher_gives_the_full_divergence(world: dict[str, Path]) -> None:
    """KL over the whole vocabulary and the cross entropy are those of two plain forward passes."""
    parts, _ = gradient(world, config(world))
    expected = textbook(world, ("teacher",), lambda _, p, q: (p[0].exp() * (p[0] - q)).sum(-1))
    assert parts.tolist() == pytest.approx(expected, rel=1e-4)


def test_several_teachers_average_their_probabilities(world: dict[str, Path]) -> None:
    """Weights 1 and 2 mix probabilities (not logits) by thirds."""

    def mixed(_: int, p: list[Tensor], q: Tensor) -> Tensor:
        m = p[0].exp() / 3 + 2 * p[1].exp() / 3
        return (m * (m.log() - q)).sum(-1)

    parts, _ = gradient(world, config(world, ("teacher", "other")))
    assert parts.tolist() == pytest.approx(textbook(world, ("teacher", "other"), mixed), rel=1e-4)


def test_rows_are_routed_to_the_teacher_they_name(world: dict[str, Path]) -> None:
    """With combine: route, a row of tag a asks the first teacher only and one of tag b the second."""

    def routed(row: int, p: list[Tensor], q: Tensor) -> Tensor:
        mine = p[0 if row % 2 else 1]
        return (mine.exp() * (mine - q)).sum(-1)

    one = config(world, ("teacher", "other"), teacher={"combine": "route"})
    for micro_tokens in (20, 8192):
        parts, _ = gradient(world, one.model_copy(update={"micro_tokens": micro_tokens}))
        assert parts.tolist() == pytest.approx(textbook(world, ("teacher", "other"), routed), rel=1e-4)


def test_a_row_that_asks_an_unknown_teacher_is_an_error(world: dict[str, Path], tmp_path: Path) -> None:
    """Routing needs tags: rows without them, or with another, are refused before any step."""
    one = config(world, ("teacher", "other"), teacher={"combine": "route"})
    for number, columns in enumerate(({}, {"teacher": ["a", "c"] * 8})):
        rows = Rows(rows_folder(tmp_path / str(number), ROWS, **columns), 64, False)
        with pytest.raises(ConfigError, match="teacher"):
            Trainer(model(0), rows, one).accumulate(0, np.arange(ROWS))


def test_rows_seen_before_are_not_asked_again(world: dict[str, Path]) -> None:
    """The second visit takes the teacher's states from memory, in any batching, with the same gradient."""
    trainer = Trainer(model(0), Rows(world["rows"], 64, False), config(world))
    first = trainer.accumulate(0, np.arange(ROWS))
    before = [p.grad.clone() for _, p in trainer.optimizer.named]  # type: ignore[union-attr]
    trainer.model.zero_grad()
    trainer.step.teachers.first.model = None  # type: ignore[attr-defined]
    trainer.config = trainer.config.model_copy(update={"micro_tokens": 40, "packing": False})
    again = trainer.accumulate(0, np.arange(ROWS)[::-1])
    torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-6)
    for (_, p), known in zip(trainer.optimizer.named, before, strict=True):
        torch.testing.assert_close(p.grad, known, rtol=1e-3, atol=1e-6)


def reads(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens (without padding) of every forward pass of the trainer's teacher from now on."""
    read: list[int] = []
    decoder = trainer.step.teachers.first.model.get_decoder()  # type: ignore[attr-defined]
    forward = type(decoder).forward

    def counting(self: Any, input_ids: Tensor, **others: Any) -> Any:
        if self is decoder:
            read.append(int((input_ids != 0).sum()))
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(type(decoder), "forward", counting)
    return read


def written(trainer: Trainer, rows: list[int]) -> list[int]:
    """Tokens of each row, counted as `reads` does."""
    return [int((trainer.rows.tokens(i) != 0).sum()) for i in rows]  # type: ignore[attr-defined]


def test_of_a_batch_only_the_unknown_rows_are_read(
    world: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed answers beside fresh ones: the teacher reads the fresh ones' tokens alone, and the loss and
    gradient are those of a teacher that reads all."""
    trainer = Trainer(model(0), Rows(world["rows"], 64, False), config(world))
    fresh = Trainer(model(0), Rows(world["rows"], 64, False), config(world))
    trainer.accumulate(0, np.arange(0, ROWS, 3))
    trainer.optimizer.step(0.0)  # nothing moves, and the gradients are gone
    read = reads(trainer, monkeypatch)
    sums = trainer.accumulate(1, np.arange(ROWS))
    assert sum(read) == sum(written(trainer, [i for i in range(ROWS) if i % 3]))
    torch.testing.assert_close(sums, fresh.accumulate(1, np.arange(ROWS)), rtol=1e-6, atol=1e-8)
    for (name, mine), (_, other) in zip(trainer.optimizer.named, fresh.optimizer.named, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("packing", [True, False])
def test_a_teacher_reads_several_passes_at_once(
    world: dict[str, Path], monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """Passes of a row or two: the teacher reads as many rows as `read_tokens` holds, each row once, without
    remembering any, and nothing of the loss or the gradient changes; a row longer than that is read alone."""
    found = []
    for most in (1, 60, 8192):
        teacher = {"cache_rows": 0, "read_tokens": most}
        one = config(world, ("teacher", "other"), teacher=teacher, micro_tokens=16, packing=packing)
        trainer = Trainer(model(0), Rows(world["rows"], 64, False), one)
        read = reads(trainer, monkeypatch)
        sums = trainer.accumulate(0, np.arange(ROWS))
        grad = torch.cat([p.grad.flatten() for _, p in trainer.optimizer.named])  # type: ignore[union-attr]
        found.append((read, sums, grad, trainer.rows.lengths))
        monkeypatch.undo()
    (alone, sums, grad, lengths), (some, *_), (whole, *_) = found
    assert len(alone) > ROWS // 2, lengths
    assert len(whole) == 1
    assert sum(alone) == sum(some) == sum(whole)
    assert 1 < len(some) < len(alone) - 2, lengths
    assert max(some) <= 60
    for _, others, other, _ in found[1:]:
        torch.testing.assert_close(others, sums, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(other, grad, rtol=1e-4, atol=1e-6)


TERMS: dict[str, Any] = {
    "hidden": {"hidden": {"weight": 0.5}},
    "cosine": {"hidden": {"distance": "cosine"}, "positions": "all"},
    "attention": {"attention": {"distance": "kl"}},
    "scores": {"attention": {"distance": "mse"}, "positions": "all"},
    "value": {"relation": {"kind": "value"}},
    "distance": {"relation": {"kind": "distance"}},
    "contrastive": {"contrastive": {}},
}


@pytest.mark.parametrize("name", TERMS)
def test_terms_do_not_depend_on_how_a_step_is_cut(world: dict[str, Path], name: str) -> None:
    """Padded in one batch, packed, in small micro-batches and over three workers: one gradient."""
    one = config(world, terms=TERMS[name], packing=False)
    parts, whole = gradient(world, one)
    assert whole.abs().sum() > 0
    assert parts[2] > 0
    for changes, workers in (({"packing": True}, 1), ({"packing": True, "micro_tokens": 30}, 3)):
        again, cut = gradient(world, one.model_copy(update=changes), workers)
        torch.testing.assert_close(again, parts, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(cut, whole, rtol=1e-3, atol=2e-6)


def test_every_term_trains_in_bfloat16(world: dict[str, Path]) -> None:
    """With weights in bf16 the projections stay in fp32 and the losses are near those of fp32."""
    terms = {"hidden": {}, "attention": {}, "relation": {}, "contrastive": {}}
    exact, _ = gradient(world, config(world, terms=terms))
    trainer = Trainer(model(0), Rows(world["rows"], 64, False), config(world, terms=terms, dtype="bfloat16"))
    rough = next(iter(trainer.run()))
    for name, value in zip(trainer.step.parts, exact.tolist(), strict=True):
        assert rough[name] == pytest.approx(value, rel=0.1), name
    assert {p.dtype for _, p in trainer.step.extra_parameters()} == {torch.float32}


@pytest.mark.parametrize("inner", ["eager", "sdpa"])
def test_terms_see_the_same_inside_under_any_attention(world: dict[str, Path], inner: str) -> None:
    """Attention maps are those of our implementation under eager and SDPA, too."""
    one = config(world, terms={"attention": {}, "relation": {}}, packing=False)
    parts, whole = gradient(world, one)
    student = model(0)
    student.set_attn_implementation(inner)
    trainer = Trainer(student, Rows(world["rows"], 64, False), one)
    torch.testing.assert_close(trainer.accumulate(0, np.arange(ROWS)), parts, rtol=1e-4, atol=1e-6)
    flat = torch.cat([p.grad.flatten() for _, p in trainer.optimizer.named])  # type: ignore[union-attr]
    torch.testing.assert_close(flat, whole, rtol=1e-3, atol=2e-6)


def test_projections_resume_and_are_not_exported(world: dict[str, Path], tmp_path: Path) -> None:
    """A resumed run continues with the trained projections; the model that leaves has none."""
    one = config(world, terms=TERMS["hidden"], epochs=4)
    rows = Rows(world["rows"], 64, False)
    torch.manual_seed(1)
    whole = Trainer(model(0), rows, one)
    steps = whole.run()
    next(steps)
    whole.save(tmp_path / "state")
    start = whole.step.terms.parts["hidden"].projection.maps[0].weight.detach().clone()  # type: ignore
    list(steps)
    torch.manual_seed(2)
    resumed = Trainer(model(0), rows, one)
    resumed.load(tmp_path / "state")
    list(resumed.run())
    for (name, p), (_, q) in zip(whole.optimizer.named, resumed.optimizer.named, strict=True):
        torch.testing.assert_close(q, p, msg=name)
    assert (whole.step.terms.parts["hidden"].projection.maps[0].weight - start).abs().max() > 0  # type: ignore
    assert not any("terms" in name for name in whole.model.state_dict())


def test_the_first_of_two_stages_leaves_the_head_alone(world: dict[str, Path]) -> None:
    """TinyBERT: intermediate terms first (blocks move, the output head does not, weight decay included),
    then the prediction alone (the head moves, projections do not)."""
    one = config(world, terms={"hidden": {}, "two_stage": 0.5}, epochs=4)
    student = model(0, tied=False)
    trainer = Trainer(student, Rows(world["rows"], 64, False), one)
    head, block = student.lm_head.weight, student.model.layers[0].mlp.up_proj.weight
    start_head, start_block = head.detach().clone(), block.detach().clone()
    history = []
    for metrics in trainer.run():
        history.append(metrics)
        if metrics["step"] == 2:
            torch.testing.assert_close(head, start_head, rtol=0, atol=0)
            assert (block - start_block).abs().max() > 0
            projection = trainer.step.terms.parts["hidden"].projection.maps[0].weight.detach().clone()  # type: ignore
    assert [m["kd"] > 0 for m in history] == [False, False, True, True]
    assert [m["hidden"] > 0 for m in history] == [True, True, False, False]
    assert (head - start_head).abs().max() > 0
    torch.testing.assert_close(
        trainer.step.terms.parts["hidden"].projection.maps[0].weight,  # type: ignore
        projection,
        rtol=0,
        atol=0,
    )


def test_parts_that_do_not_fit_are_refused(world: dict[str, Path]) -> None:
    """Terms without a teacher, stages without terms, routing without tags: each names its field."""
    live = config(world).teacher
    for wrong, word in (
        ({"terms": {"hidden": {}}}, "train.teacher"),
        ({"prefix": {"student": [[0, 1]]}}, "train.teacher"),
        ({"terms": {"two_stage": 0.5}, "teacher": live}, "two_stage"),
        ({"terms": {"hidden": {}}, "teacher": live, "compile": True}, "compile"),
        ({"teacher": {"models": [{"model": "x"}, {"model": "y"}], "combine": "route"}}, "tag"),
    ):
        with pytest.raises(ValidationError, match=word):
            TrainConfig.model_validate(wrong)
    rows = Rows(world["rows"], 64, False)
    broken = config(world, terms={"hidden": {"layers": [[9, 1]]}})
    with pytest.raises(ConfigError, match="block 9"):
        Trainer(model(0), rows, broken)
    absent = TrainConfig.model_validate({"teacher": {"models": [{"model": "./nowhere"}]}})
    with pytest.raises(ConfigError, match="nowhere"):
        Trainer(model(0), rows, absent)
