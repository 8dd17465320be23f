"""The chunked linear-plus-divergence op against plain float64 autograd, and its normalisation against
splitting."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contracts.errors import TrainingError
from distill_jobs.training.config import LossConfig
from distill_jobs.training.divergence import (
    DenseTeacher,
    Divergence,
    HiddenTeacher,
    LossWeights,
    MixtureTeacher,
    SampledTeacher,
    SparseTeacher,
    Teacher,
    linear_divergence,
    loss_weights,
)
from distill_jobs.training.divergence.formulas import Kind
from tests.unit.losses_oracle import apart, draw_world, eager, ours, top

N, H, V, K = 37, 16, 50, 6
KINDS = get_args(Kind)
TEACHERS = [
    "sparse",
    "dense",
    "dense_longer",
    "dense_shorter",
    "dense_masked",
    "hidden",
    "hidden_longer",
    "mixture",
]


@pytest.fixture(scope="module")
def world() -> dict[str, Tensor]:
    """A student and a teacher of 37 rows over 50 tokens."""
    return draw_world(N, H, V)


def make_teacher(world: dict[str, Tensor], kind: str) -> Teacher | None:
    logits = world["teacher"]
    extra = torch.randn(9, 2 * H, generator=torch.Generator().manual_seed(1))
    masked = logits.masked_fill(torch.arange(V) % 7 == 3, -torch.inf)
    w = torch.tensor([0.5, 0.25, 0.25, 0.0]).log().expand(N, 4)
    return {
        "none": lambda: None,
        "sparse": lambda: top(logits, K),
        "sampled": lambda: SampledTeacher(torch.multinomial(torch.softmax(logits, -1), 4), w),
        "dense": lambda: DenseTeacher(logits),
        "dense_longer": lambda: DenseTeacher(torch.cat([logits, logits[:, :9]], -1)),
        "dense_shorter": lambda: DenseTeacher(logits[:, : V - 4]),
        "dense_masked": lambda: DenseTeacher(masked),
        "hidden": lambda: HiddenTeacher(world["teacher_hidden"], world["teacher_head"]),
        "mixture": lambda: MixtureTeacher(
            (
                HiddenTeacher(world["teacher_hidden"], world["teacher_head"]),
                HiddenTeacher(world["hidden"], world["teacher_head"][: V - 2, :H]),
            ),
            (0.75, 0.25),
        ),
        "hidden_longer": lambda: HiddenTeacher(
            world["teacher_hidden"], torch.cat([world["teacher_head"], extra])
        ),
    }[kind]()


def assert_equal_to_eager(world: dict[str, Tensor], teacher: Teacher | None, weights: LossWeights) -> None:
    """Loss and both gradients within 1e-5 of float64 autograd, in fp32, for a chunk that splits the rows."""
    wanted = eager(world, teacher, weights)
    for chunk in (5, None):
        for name, got, want in zip(
            ["loss", "hidden", "weight"], ours(world, teacher, weights, chunk), wanted, strict=True
        ):
            assert apart(got, want) <= 1e-5, (name, chunk, weights)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_float64_autograd(
    world: dict[str, Tensor], kind: Kind, teacher: str
) -> None:
    """Every divergence from every kind of teacher is its paper's formula, with and without T, T^2 and the
    hard label."""
    for temperature, t_squared, hard in itertools.product([1.0, 2.0], [True, False], [0.0, 0.4]):
        one = Divergence(kind, beta=0.3, alpha=0.2, temperature=temperature, t_squared=t_squared)
        assert_equal_to_eager(world, make_teacher(world, teacher), LossWeights(0.7, hard, one))


@pytest.mark.parametrize(("teacher", "hard"), [("sampled", 0.0), ("sampled", 0.4), ("none", 0.4)])
def test_draws_and_plain_labels_equal_float64_autograd(
    world: dict[str, Tensor], teacher: str, hard: float
) -> None:
    """Draws are a weighted cross entropy; without a teacher only the labels count."""
    assert_equal_to_eager(world, make_teacher(world, teacher), LossWeights(0.7, hard))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_jsd_is_gkds(world: dict[str, Tensor], beta: float) -> None:
    """beta 0 and 1 are the forward and the reverse KL (TRL's convention), 0.5 is symmetric."""
    teacher = make_teacher(world, "dense")
    assert_equal_to_eager(world, teacher, LossWeights(1.0, 0.0, Divergence("jsd", beta=beta)))
    assert_equal_to_eager(world, teacher, LossWeights(1.0, 0.0, Divergence("jsd", beta=beta, over_beta=True)))


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_jsd_over_beta_tends_to_its_endpoints(world: dict[str, Tensor], beta: float, limit: Kind) -> None:
    """Divided by beta (1 - beta) the divergence has no jump at 0 and 1; undivided it vanishes there."""
    teacher = make_teacher(world, "dense")
    wide = {k: v.double() if v.is_floating_point() else v for k, v in world.items()}

    def loss(one: Divergence) -> float:
        return float(ours(wide, teacher, LossWeights(1.0, 0.0, one), dtype=torch.float64)[0])

    end = loss(Divergence(limit))
    assert loss(Divergence("jsd", beta=beta, over_beta=True)) == pytest.approx(end, rel=2e-3)
    assert loss(Divergence("jsd", beta=beta)) < end * 1e-3


def test_sampling_is_refused_where_it_is_no_estimate(world: dict[str, Tensor]) -> None:
    """Only the forward KL at temperature 1 is linear in what was drawn; the error names the setting."""
    teacher = make_teacher(world, "sampled")
    for kind in KINDS:
        if kind != "forward_kl":
            with pytest.raises(TrainingError, match=r"loss\.divergence"):
                ours(world, teacher, LossWeights(1.0, 0.0, Divergence(kind)))
    with pytest.raises(TrainingError, match=r"loss\.temperature"):
        ours(world, teacher, LossWeights(1.0, 0.0, Divergence(temperature=2.0)))
    with pytest.raises(TrainingError, match="unknown"):
        Divergence("kl")  # type: ignore[arg-type]


def test_draws_are_unbiased_where_the_top_is_not(world: dict[str, Tensor]) -> None:
    """Over many draws the gradient is the dense one; the renormalised top-k of as many tokens stays off."""
    weights, draws = LossWeights(1.0, 0.0), 10_000
    dense = ours(world, make_teacher(world, "dense"), weights)[1]
    p = torch.softmax(world["teacher"], -1)
    generator = torch.Generator().manual_seed(5)
    ids = torch.multinomial(p, draws, replacement=True, generator=generator)
    even = torch.full((N, draws), 1 / draws).log()
    kept = p.topk(12)
    renormalised = SampledTeacher(kept.indices, (kept.values / kept.values.sum(-1, keepdim=True)).log())
    assert apart(ours(world, SampledTeacher(ids, even), weights)[1], dense) < 0.04
    assert apart(ours(world, renormalised, weights)[1], dense) > 0.08


def test_all_tokens_kept_equals_the_dense_divergence(world: dict[str, Tensor]) -> None:
    """With k = V there is no tail, and every sparse divergence is the exact one, gradients included."""
    for kind in KINDS:
        weights = LossWeights(1.0, 0.2, Divergence(kind, temperature=2.0))
        sparse = ours(world, top(world["teacher"], V), weights, 8)
        for left, right in zip(sparse, eager(world, make_teacher(world, "dense"), weights), strict=True):
            assert apart(left, right) <= 1e-5, kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_teacher_has_no_divergence(world: dict[str, Tensor], kind: Kind) -> None:
    """D(p, p) is zero and pushes nowhere, tail included."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in world.items()}
    logits = wide["hidden"] @ wide["weight"].T
    weights = LossWeights(1.0, 0.0, Divergence(kind, temperature=2.0))
    for teacher in (top(logits, K), DenseTeacher(logits)):
        loss, grad_hidden, _ = ours(wide, teacher, weights, 8, torch.float64)
        assert float(loss) == pytest.approx(0, abs=1e-7)
        if kind != "total_variation":  # |p - q| has a kink there
            assert float(grad_hidden.abs().max()) < 1e-7


@given(
    kind=st.sampled_from(KINDS),
    k=st.integers(1, 12),
    rows=st.integers(0, 3),
    sure=st.sampled_from([0.0, 5.0, 60.0]),
    over=st.sampled_from([0.0, 0.002]),
    unused=st.integers(0, 3),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_awkward_sparse_teachers_stay_finite(
    kind: Kind, k: int, rows: int, sure: float, over: float, unused: int, temperature: float, seed: int
) -> None:
    """k = V, one-hot teachers, probabilities that round to more than one, unused slots, ids beyond the
    student's vocabulary, no rows at all: loss and gradients are finite, the divergence never negative."""
    world = draw_world(rows, 4, 12, seed)
    teacher = top(world["teacher"] + sure * (torch.arange(12) == seed % 12), k)
    logprobs = (teacher.logprobs.half() + over).float()
    ids = teacher.ids.clone()
    if k > unused > 0:
        logprobs[:, -unused:] = -torch.inf
        ids[:, -unused:] = 99
    weights = LossWeights(1.0, 0.0, Divergence(kind, temperature=temperature))
    found = ours(world, SparseTeacher(ids, logprobs), weights, 2)
    assert all(bool(torch.isfinite(one).all()) for one in found)
    assert float(found[0]) >= -1e-5


@given(
    kind=st.sampled_from(KINDS),
    cut=st.integers(-5, 5),
    masked=st.integers(0, 11),
    sure=st.sampled_from([0.0, 200.0]),
    rows=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_awkward_dense_teachers_stay_finite(
    kind: Kind, cut: int, masked: int, sure: float, rows: int, seed: int
) -> None:
    """Vocabularies of different length, tokens that either side cannot take, certainty of 200 nats, no rows:
    finite, never negative, and no gradient from the divergence on the student's padding."""
    world = draw_world(rows, 4, 12, seed)
    logits = world["teacher"] + sure * (torch.arange(12) == (masked + 1) % 7)
    logits = torch.cat([logits, logits[:, :cut]], -1) if cut > 0 else logits[:, : 12 + cut]
    never = torch.arange(logits.shape[1]) == masked
    weights = LossWeights(1.0, 0.0, Divergence(kind))
    loss, grad_hidden, grad_weight = ours(
        world, DenseTeacher(logits.masked_fill(never, -torch.inf)), weights, 2
    )
    assert torch.isfinite(grad_hidden).all()
    assert torch.isfinite(grad_weight).all()
    assert float(loss) >= -1e-5
    assert not grad_weight[min(12, logits.shape[1]) :].any()
    if masked < min(12, logits.shape[1]):
        assert not grad_weight[masked].any()


@pytest.mark.parametrize("teacher", ["sparse", "sampled", "hidden"])
def test_the_sum_over_parts_is_the_global_mean(world: dict[str, Tensor], teacher: str) -> None:
    """Unequal micro-batches in any order, each divided by the global count, add up to the loss and gradient
    of the whole."""
    weights, known = LossWeights(1.0, 1.0), make_teacher(world, teacher)
    assert known is not None
    whole, _, whole_grad = ours(world, known, weights)
    weight, total = world["weight"].clone().requires_grad_(), torch.zeros(())
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    for part in order.split([3, 20, 1, 13]):
        loss, _ = linear_divergence(
            world["hidden"][part],
            weight,
            world["labels"][part],
            known.rows(part),  # type: ignore[arg-type]
            weights,
            torch.full((len(part),), 1 / N),
            4,
        )
        loss.backward()
        total += loss.detach()
    assert apart(total, whole) <= 1e-5
    assert apart(weight.grad, whole_grad) <= 1e-5


def test_row_weights_scale_rows(world: dict[str, Tensor]) -> None:
    """A row of weight zero counts for nothing, one of weight two counts twice, and reports follow."""
    teacher, weights = make_teacher(world, "dense"), LossWeights(1.0, 0.5)
    assert teacher is not None
    scale = torch.zeros(N)
    scale[:2] = torch.tensor([1.0, 2.0])
    hidden = world["hidden"].clone().requires_grad_()
    loss, parts = linear_divergence(hidden, world["weight"], world["labels"], teacher, weights, scale)
    loss.backward()
    alone = [
        linear_divergence(
            world["hidden"][i : i + 1],
            world["weight"],
            world["labels"][i : i + 1],
            teacher.rows(slice(i, i + 1)),
            weights,
            torch.ones(1),
        )[0]
        for i in range(2)
    ]
    assert apart(loss.detach(), alone[0] + 2 * alone[1]) <= 1e-5
    assert apart(parts[0] + 0.5 * parts[1], loss.detach()) <= 1e-5
    assert not hidden.grad[2:].any()  # type: ignore[index]


@pytest.mark.parametrize("teacher", ["sparse", "hidden", "sampled"])
def test_bf16_inputs_lose_only_their_own_precision(world: dict[str, Tensor], teacher: str) -> None:
    """With bf16 hidden states and matrices, the loss is that of the rounded inputs within 1e-5, gradients
    within bf16's rounding; the sum over 37 chunks is no worse than over one."""
    names = ("hidden", "weight", "teacher_hidden", "teacher_head")
    low = {k: v.bfloat16() if k in names else v for k, v in world.items()}
    known, weights = make_teacher(low, teacher), LossWeights(0.7, 0.4)
    wanted = eager(low, known, weights)
    for chunk in (1, None):
        got = ours(low, known, weights, chunk, torch.bfloat16)
        assert got[1].dtype == got[2].dtype == torch.bfloat16
        assert apart(got[0], wanted[0]) <= 1e-5
        assert apart(got[1], wanted[1]) <= 0.01
        assert apart(got[2], wanted[2]) <= 0.01


def test_a_frozen_head_gets_no_gradient_and_measuring_needs_none(world: dict[str, Tensor]) -> None:
    """LoRA students keep their output matrix: none is made for it; under no_grad none at all."""
    teacher, weights, scale = make_teacher(world, "dense"), LossWeights(), torch.full((N,), 1 / N)
    hidden = world["hidden"].clone().requires_grad_()
    loss, _ = linear_divergence(hidden, world["weight"], world["labels"], teacher, weights, scale)
    loss.backward()
    wanted = eager(world, teacher, weights)
    assert apart(hidden.grad, wanted[1]) <= 1e-5
    with torch.no_grad():
        measured, _ = linear_divergence(hidden, world["weight"], world["labels"], teacher, weights, scale)
    assert apart(measured, wanted[0]) <= 1e-5
    assert not measured.requires_grad


def test_full_logits_never_exist(world: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """No block that the losses see is longer than the chunk, and the buffer is no longer either."""
    from distill_jobs.training.divergence import chunked

    seen: list[int] = []
    real = chunked.row_losses
    monkeypatch.setattr(chunked, "row_losses", lambda z, *rest: seen.append(len(z)) or real(z, *rest))
    ours(world, make_teacher(world, "hidden"), LossWeights(), 5)
    assert sum(seen) == N
    assert max(seen) <= 5
    assert chunked._Chunks(world["hidden"], world["weight"], None, 5).head.buffer.shape == (5, V)
    assert chunked.chunk_rows(128_000, "cpu") * 128_000 * 4 <= 33 * 2**20


def test_the_configuration_names_every_divergence() -> None:
    """LossConfig accepts exactly the op's divergences and passes every setting on."""
    for kind in KINDS:
        config = LossConfig(
            divergence=kind,
            beta=0.2,
            alpha=0.3,
            temperature=3.0,
            t_squared=False,
            over_beta=True,
            kd_weight=2.0,
        )
        assert loss_weights(config) == LossWeights(
            2.0, config.hard_weight, Divergence(kind, 0.2, 0.3, 3.0, False, True)
        )
    with pytest.raises(ValueError, match="divergence"):
        LossConfig.model_validate({"divergence": "kl"})
