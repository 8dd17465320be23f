"""Depth-nested students: what their loss is, where tokens leave, and that the curve counts what it says."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.compression.early_exit import draw
from benchmarks.compression.nested import Exiting, NestedStep, confidence, depths, shares
from distill_jobs.training.config import LossConfig, TrainConfig
from distill_jobs.training.data import Rows
from distill_jobs.training.loop import count
from distill_jobs.training.prefixes.generate import Sampling, generate
from distill_jobs.training.step import DistillStep
from tests.unit.teacher_world import STOP, model, rows_folder

LAYERS = 4
CONFIG = TrainConfig(loss=LossConfig(kd_weight=0.0, hard_weight=1.0), dtype="float32", max_length=32)
HOW = Sampling(0.0, 12, (STOP,))


def truncated(whole: Any, depth: int) -> Any:
    """The model of the first blocks alone, with the same norm and head."""
    short = copy.deepcopy(whole)
    short.model.layers = short.model.layers[:depth]
    short.config.num_hidden_layers = depth
    return short


def answers(of: Any) -> list[list[int]]:
    prompts = [np.arange(2, 2 + size) for size in (3, 5, 8, 4)]
    return [one.tolist() for one in generate(of, prompts, torch.zeros(4, HOW.max_new_tokens), HOW)]


def step_loss(step: DistillStep, rows: Rows) -> Tensor:
    indices = np.arange(len(rows))
    step.rows(0, 1, indices, rows)
    return step.loss(rows.micro_batch(indices, False, True), count(rows, indices))[0]


def test_the_loss_is_the_weighted_sum_of_the_depths_losses(tmp_path: Path) -> None:
    """Each depth is the model cut there, through the same norm and head; deeper ones count more; the
    gradient reaches every block, and the last depth alone is the plain training."""
    rows, whole = Rows(rows_folder(tmp_path / "rows"), 32, False), model(1, layers=LAYERS)
    assert shares((2, 4)) == pytest.approx([1 / 3, 2 / 3])
    single = [step_loss(DistillStep(truncated(whole, depth), CONFIG), rows).item() for depth in (2, 4)]
    nested = step_loss(NestedStep(whole, CONFIG, (2, 4)), rows)
    assert nested.item() == pytest.approx(single[0] / 3 + 2 * single[1] / 3, rel=1e-5)
    nested.backward()
    assert all(block.mlp.up_proj.weight.grad.abs().sum() > 0 for block in whole.model.layers)
    alone = step_loss(NestedStep(whole, CONFIG, (4,)), rows)
    assert alone.item() == pytest.approx(single[1], rel=1e-6)


def test_confidence_is_one_where_a_token_is_certain_and_low_where_all_are_alike() -> None:
    """By the largest probability and by entropy, both between 0 and 1."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -1e9, -1e9]])
    assert confidence(logits, "probability").tolist() == pytest.approx([0.25, 1.0, 0.75])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = [0.0, 1.0, 1 - entropy / math.log(4)]
    assert confidence(logits, "entropy").tolist() == pytest.approx(expected, abs=1e-6)


def test_who_is_never_sure_answers_as_the_whole_model_and_who_is_always_sure_as_the_first_depth() -> None:
    """The two ends of the curve, with the layers that they count."""
    whole = model(7, layers=LAYERS).eval()
    never = Exiting(whole, (2, 4), 1.1)
    assert answers(never) == answers(whole)
    assert never.mean_layers == 4
    always = Exiting(whole, (2, 4), 0.0)
    first = answers(always)
    assert first == answers(truncated(whole, 2))
    assert always.mean_layers == 2
    assert always.used == {2: sum(map(len, first))}
    assert first != answers(whole), "the depths differ, else this shows nothing"


def test_in_between_each_token_leaves_where_it_is_sure() -> None:
    """Every token is the argmax of the depth that the count says, and that depth is the first sure one."""
    whole = model(7, layers=LAYERS).eval()
    ids = torch.arange(2, 26).reshape(6, 4)
    head = whole.get_output_embeddings().weight
    with torch.no_grad(), depths(whole.get_decoder(), (2, 4)) as seen:
        whole.get_decoder()(input_ids=ids)
    with torch.no_grad():
        early, late = (whole.model.norm(seen[depth][:, -1]) for depth in (2, 4))
        sure = confidence(early @ head.T, "probability")
        threshold = float(sure.sort().values[3])  # three stay, three leave
        exiting = Exiting(whole, (2, 4), threshold)
        out = exiting.get_decoder()(input_ids=ids).last_hidden_state[:, 0]
    assert exiting.used == {2: 3, 4: 3}
    assert exiting.mean_layers == 3
    assert torch.equal(out, torch.where((sure >= threshold)[:, None], early, late))


def test_the_hooks_are_gone_after_a_pass() -> None:
    """A model that decoded with exits is a model like any other."""
    whole = model(7, layers=2).eval()
    answers(Exiting(whole, (1, 2), 0.5))
    assert not any(block._forward_hooks for block in whole.model.layers)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    """A line a student and rule."""
    rows = [
        {"student": s, "rule": r, "at": 0.5, "accuracy": a, "mean_layers": m}
        for s in ("nested", "last depth only")
        for r, a, m in (("fixed depth", 0.1, 2), ("probability", 0.5, 3), ("entropy", 0.6, 4))
    ]
    draw(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
