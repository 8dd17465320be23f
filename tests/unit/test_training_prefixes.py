"""Prefix sources: what is generated, by whom, when; the same on any worker and after any resume."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distill_jobs.training.config import LossConfig, OptimizerConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import Trainer, Workers
from distill_jobs.training.method_config import PrefixConfig, share_at
from distill_jobs.training.prefixes.generate import Sampling, draw, generate, uniforms
from distill_jobs.training.prefixes.mixture import plan
from distill_jobs.training.prefixes.replay import ReplayBuffer, Written
from tests.unit.teacher_world import STOP, model, rows_folder, teacher_folder

ROWS = 16
PROMPTS = [np.array(p) for p in ([3, 4], [5, 6, 7, 8, 9], [10, 11, 12], [13])]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("prefixes")
    return {"teacher": teacher_folder(place / "teacher"), "rows": rows_folder(place / "rows", ROWS)}


def config(world: dict[str, Path], prefix: dict[str, Any], **changes: Any) -> TrainConfig:
    base = {
        "dtype": "float32",
        "batch_rows": 8,
        "epochs": 3,
        "optimizer": OptimizerConfig(lr=1e-2),
        "loss": LossConfig(kd_weight=1, hard_weight=0.3, divergence="reverse_kl"),
        "teacher": {"models": [{"model": str(world["teacher"]), "dtype": "float32"}]},
        "prefix": {"max_new_tokens": 6, **prefix},
    }
    return TrainConfig.model_validate({**base, **changes})


def trainer(world: dict[str, Path], one: TrainConfig, workers: Workers | None = None) -> Trainer:
    return Trainer(model(0), Rows(world["rows"], 64, False), one, workers or Workers())


def test_greedy_answers_are_those_of_plain_decoding() -> None:
    """Batched, left-padded and cached decoding picks the tokens that full forward passes pick, and ends at
    the stop id; the model keeps its attention and mode."""
    student = model(4)
    student.train()
    attention = student.config._attn_implementation
    answers = generate(student, PROMPTS, torch.zeros(4, 7), Sampling(0, 7, (STOP,)))
    assert (student.training, student.config._attn_implementation) == (True, attention)
    student.eval()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids: list[int] = []
        while len(ids) < 7 and STOP not in ids:
            with torch.no_grad():
                logits = student(torch.tensor([[*prompt.tolist(), *ids]])).logits[0, -1]
            ids.append(int(logits.argmax()))
        assert answer.tolist() == ids


def test_sampled_answers_do_not_depend_on_the_batch() -> None:
    """A row's answer is a function of its prompt and numbers: alone or among others, in any order."""
    student, how = model(4), Sampling(1.0, 8, (STOP,))
    numbers = uniforms(7, 3, [0, 1, 2, 3], 8)
    together = generate(student, PROMPTS, numbers, how)
    backwards = generate(student, PROMPTS[::-1], numbers.flip(0), how)[::-1]
    alone = [generate(student, [p], n[None], how)[0] for p, n in zip(PROMPTS, numbers, strict=True)]
    for a, b, c in zip(together, backwards, alone, strict=True):
        assert a.tolist() == b.tolist() == c.tolist()
    assert len({tuple(a.tolist()) for a in together}) > 1


def test_draws_follow_the_distribution() -> None:
    """The inverse CDF: numbers spread evenly give tokens their tempered probabilities, never one without
    mass."""
    logits = torch.tensor([[0.5, 0.2, 0.0, 0.3]]).log().expand(1000, 4)
    numbers = (torch.arange(1000) + 0.5) / 1000
    counts = torch.bincount(draw(logits, numbers, 1.0), minlength=4) / 1000
    assert counts.tolist() == pytest.approx([0.5, 0.2, 0.0, 0.3], abs=0.002)
    squared = torch.tensor([0.25, 0.04, 0.0, 0.09])
    tempered = torch.bincount(draw(logits, numbers, 0.5), minlength=4) / 1000
    assert tempered.tolist() == pytest.approx((squared / squared.sum()).tolist(), abs=0.002)
    assert draw(logits[:2], torch.tensor([0.0, 1 - 1e-12]), 1.0).tolist() == [0, 3]


def test_shares_follow_their_schedule() -> None:
    """Linear between points, flat outside; whole numbers of rows with the right mean."""
    points = ((0.0, 0.0), (0.5, 1.0))
    assert [share_at(points, x) for x in (0.0, 0.25, 0.5, 0.9)] == [0.0, 0.5, 1.0, 1.0]
    one = PrefixConfig(student=((0.0, 0.3),), teacher=((0.0, 0.5), (1.0, 0.0)), replay=0.5)
    sizes = np.array(
        [
            [len(p.teacher), len(p.student), len(p.replay)]
            for p in (plan(one, 0, step, 400, 10, 99) for step in range(400))
        ]
    )
    assert sizes.mean(0).tolist() == pytest.approx([2.5, 1.5, 1.5], abs=0.1)
    assert sizes[0, 0] == 5
    assert sizes[-1, 0] == 0
    assert len(plan(one, 0, 5, 400, 10, 0).replay) == 0  # an empty buffer: the student writes anew


def test_a_step_replays_or_writes() -> None:
    """Every fifth step of replay 0.8 is written anew, whole; a buffer that is too small is filled up."""
    one = PrefixConfig(student=((0.0, 1.0),), replay=0.8)
    plans = [plan(one, 0, step, 100, 8, 64) for step in range(100)]
    assert [len(p.student) for p in plans[:10]] == [0, 0, 0, 0, 8, 0, 0, 0, 0, 8]
    assert sum(len(p.student) for p in plans) == 160
    assert all(len(p.student) + len(p.replay) == 8 for p in plans)
    short = plan(one, 0, 0, 100, 8, 3)
    assert (len(short.student), len(short.replay)) == (5, 3)
    assert not set(short.student.tolist()) & set(short.replay.tolist())
    never = PrefixConfig(student=((0.0, 1.0),))
    assert [len(plan(never, 0, step, 100, 8, 64).student) for step in range(3)] == [8, 8, 8]


def test_impossible_shares_are_refused() -> None:
    """More than everything, replay of nothing, and points out of order."""
    for wrong in (
        {"student": [[0, 0.7]], "teacher": [[0, 0.2], [1, 0.4]]},
        {"replay": 0.5},
        {"student": [[0.5, 1], [0, 0]]},
        {"student": [[0, 1.5]]},
    ):
        with pytest.raises(ValidationError):
            PrefixConfig.model_validate(wrong)


def test_the_buffer_forgets_the_oldest_and_survives_a_checkpoint(tmp_path: Path) -> None:
    """Capacity 3 keeps the last three; the state is what a weights-only load accepts."""
    buffer = ReplayBuffer(3)
    buffer.add([Written(i, i * 10, np.arange(i + 2), 1) for i in range(5)])
    assert [row.uid for row in buffer.rows] == [2, 3, 4]
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    again = ReplayBuffer(3)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [(r.uid, r.source, r.ids.tolist(), r.prompt_len) for r in again.rows] == [
        (i, i * 10, list(range(i + 2)), 1) for i in (2, 3, 4)
    ]
    taken = again.take(9, np.random.default_rng(0))
    assert sorted(row.uid for row in taken) == [2, 3, 4]


def test_losses_are_divided_by_the_generated_tokens(world: dict[str, Path]) -> None:
    """The step counts the answers that were written, not those that the dataset holds (TRL #6449)."""
    one = trainer(world, config(world, {"student": [[0, 1]]}))
    indices, rows = one.step.rows(0, 6, np.arange(8), one.rows)
    logged = int((one.rows.lengths - one.rows.prompt_len)[:8].sum())
    generated = int((rows.lengths - rows.prompt_len)[indices].sum())
    assert generated != logged
    assert one.step.metrics()["generated_tokens"] == generated
    with torch.no_grad():
        student, teacher = one.model, one.step.teachers.first.model  # type: ignore[attr-defined]
        total = 0.0
        for i in indices:
            ids, first = torch.from_numpy(rows.tokens(i).astype(np.int64)), int(rows.prompt_len[i])
            q, p = (m(ids[None]).logits[0, first - 1 : -1].log_softmax(-1) for m in (student, teacher))
            total += float((q.exp() * (q - p)).sum())
    again = trainer(world, config(world, {"student": [[0, 1]]}))
    parts = again.accumulate(0, np.arange(8))
    assert float(parts[0]) == pytest.approx(total / generated, rel=1e-4)
    assert again.position.tokens == int(rows.lengths[indices].sum())


def test_own_answers_are_no_labels(world: dict[str, Path]) -> None:
    """Rows that the student wrote get the divergence alone: a larger hard weight changes nothing there, and
    does change rows of the logs."""

    def gradient(prefix: dict[str, Any], hard: float) -> Tensor:
        loss = LossConfig(kd_weight=1, hard_weight=hard)
        one = trainer(world, config(world, prefix, loss=loss))
        one.accumulate(0, np.arange(8))
        return torch.cat([p.grad.flatten() for _, p in one.optimizer.named])  # type: ignore[union-attr]

    own = {"student": [[0, 1]]}
    torch.testing.assert_close(gradient(own, 0.0), gradient(own, 9.0))
    by_teacher = {"teacher": [[0, 1]]}
    assert (gradient(by_teacher, 0.0) - gradient(by_teacher, 9.0)).abs().max() > 1e-3


def test_own_answers_may_have_their_own_divergence(world: dict[str, Path]) -> None:
    """student_divergence applies to rows that the student wrote, and to no other."""

    def kd(prefix: dict[str, Any], divergence: str) -> float:
        loss = LossConfig(kd_weight=1, hard_weight=0, divergence=divergence)  # type: ignore[arg-type]
        return float(trainer(world, config(world, prefix, loss=loss)).accumulate(0, np.arange(8))[0])

    own = {"student": [[0, 1]]}
    other = kd(own | {"student_divergence": "skew_reverse_kl"}, "skew_kl")
    assert other == pytest.approx(kd(own, "skew_reverse_kl"), rel=1e-6)
    assert other != pytest.approx(kd(own, "skew_kl"), rel=1e-2)
    teacher = {"teacher": [[0, 1]], "student_divergence": "skew_reverse_kl"}
    assert kd(teacher, "skew_kl") == pytest.approx(kd({"teacher": [[0, 1]]}, "skew_kl"), rel=1e-6)


MIXED = {
    "teacher": [[0, 0.25]],
    "student": [[0, 0.0], [0.5, 0.75]],
    "replay": 0.5,
    "capacity": 5,
    "batch_rows": 3,
}


def test_a_resumed_run_with_every_source_is_the_run(world: dict[str, Path], tmp_path: Path) -> None:
    """Killed after three of six steps, with a replay buffer half full: same losses, same weights."""
    whole = trainer(world, config(world, MIXED))
    history = []
    for metrics in whole.run():
        history.append(metrics)
        if metrics["step"] == 3:
            whole.save(tmp_path / "state")
    assert len(history) == 6
    resumed = trainer(world, config(world, MIXED))
    resumed.load(tmp_path / "state")
    rest = list(resumed.run())
    assert [m["kd"] for m in rest] == pytest.approx([m["kd"] for m in history[3:]], rel=1e-5)
    assert rest[-1]["tokens"] == history[-1]["tokens"]
    for (name, p), (_, q) in zip(whole.optimizer.named, resumed.optimizer.named, strict=True):
        torch.testing.assert_close(q, p, msg=name)


def test_two_workers_write_and_train_what_one_does(world: dict[str, Path]) -> None:
    """Generation is shared among workers; rows, buffers, losses and weights are those of a single worker."""
    alone = trainer(world, config(world, MIXED))
    history = list(alone.run())
    barrier, slots, seen = threading.Barrier(2), [None, None], {}
    made = [trainer(world, config(world, MIXED)) for _ in range(2)]  # here: threads share torch's seed

    def run(rank: int) -> None:
        def add(tensor: Tensor) -> None:
            slots[rank] = tensor.clone()  # type: ignore[call-overload]
            barrier.wait()
            total = slots[0] + slots[1]  # type: ignore[operator]
            barrier.wait()
            tensor.copy_(total)

        made[rank].workers = Workers(rank, 2, add)
        made[rank].step.prefixes.group = made[rank].workers  # type: ignore[attr-defined]
        try:
            seen[rank] = (made[rank], list(made[rank].run()))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        one, lines = seen[rank]
        assert [m["kd"] for m in lines] == pytest.approx([m["kd"] for m in history], rel=1e-3)
        assert [m["tokens"] for m in lines] == [m["tokens"] for m in history]
        mine, its = (t.step.prefixes.buffer.rows for t in (one, alone))  # type: ignore[attr-defined]
        assert [r.ids.tolist() for r in mine] == [r.ids.tolist() for r in its]
