"""Packed rows: the same loss and gradients as padded ones, and nothing passes from a row to its neighbour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from contracts.errors import TrainingError
from distill_jobs.training import attention
from distill_jobs.training.data import MicroBatch, Rows
from distill_jobs.training.loop import count
from distill_jobs.training.step import make_step
from tests.unit.test_training_loop import config, tiny_model, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return Rows(write_rows(tmp_path_factory.mktemp("packing") / "rows"), 64, True)


def gradients(rows: Rows, indices: np.ndarray, packed: bool, **changes: object) -> tuple[Tensor, Tensor]:
    """[loss, kd, ce] and all gradients as one vector."""
    model, one = tiny_model().double(), config(**changes)
    step = make_step(model, one)
    batch = rows.micro_batch(indices, one.loss.prompt_weight > 0, packed)
    loss, parts = step.loss(batch, count(rows, indices))
    loss.backward()  # type: ignore[no-untyped-call]
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.cat([loss.detach()[None], parts]), flat


def hidden(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    with torch.no_grad():
        return model.get_decoder()(**batch.model_inputs(), use_cache=False).last_hidden_state  # type: ignore[operator]


@pytest.mark.parametrize("prompt_weight", [0.0, 0.7])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(rows: Rows, prompt_weight: float) -> None:
    """Eleven rows of 4 to 20 tokens, in any order: all of it equal within 1e-9 in float64."""
    indices = np.random.default_rng(1).permutation(len(rows))[:11]
    loss = config().loss.model_copy(update={"prompt_weight": prompt_weight})
    values, slopes = gradients(rows, indices, packed=False, loss=loss)
    for order in (indices, indices[::-1]):
        packed_values, packed_slopes = gradients(rows, order, packed=True, loss=loss)
        torch.testing.assert_close(packed_values, values, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(packed_slopes, slopes, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_a_row_does_not_see_its_neighbours(rows: Rows, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens in the first row change its own states and not one bit of the other rows'; each row's
    states are those it has alone. So with the two matrix products and with the fused kernel of GPUs."""
    monkeypatch.setattr(attention, "FUSED", {"cpu"} if fused else set())
    model, indices = tiny_model(), np.array([3, 8, 1])
    batch = rows.micro_batch(indices, False, packed=True)
    first = int(rows.lengths[3])
    states = hidden(model, batch)
    changed = batch.input_ids.clone()
    changed[0, :first] = (changed[0, :first] + 7) % 40
    batch.input_ids.copy_(changed)
    again = hidden(model, batch)
    assert not torch.equal(again[0, :first], states[0, :first])
    end = int(rows.lengths[indices].sum())
    assert torch.equal(again[0, first:end], states[0, first:end])
    start = first
    for index in indices[1:]:
        alone = hidden(model, rows.micro_batch(np.array([index]), False))
        stop = start + int(rows.lengths[index])
        torch.testing.assert_close(states[0, start:stop], alone[0], rtol=1e-5, atol=1e-6)
        start = stop


def test_packing_works_with_the_attention_of_transformers(rows: Rows) -> None:
    """A model that keeps its own attention (sdpa) sees the same boundaries, from the position ids alone."""
    batch = rows.micro_batch(np.arange(6), False, packed=True)
    ours, theirs = tiny_model(), tiny_model()
    theirs.set_attn_implementation("sdpa")
    tokens = int(rows.lengths[:6].sum())
    states = (hidden(model, batch)[0, :tokens] for model in (theirs, ours))
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_a_packed_batch_says_which_sample_a_position_belongs_to(rows: Rows) -> None:
    """Labels, weights and teacher rows follow the samples in order, packed as padded."""
    indices = np.array([5, 2, 9])
    packed, padded = (rows.micro_batch(indices, True, one) for one in (True, False))
    assert packed.input_ids[0, : rows.lengths[indices].sum()].tolist() == [
        token for index in indices for token in rows.tokens(index)
    ]
    assert torch.equal(packed.samples, padded.rows)
    for name in ("labels", "in_prompt", "topk_ids", "topk_logprobs", "weights", "samples"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)), name


def test_packed_batches_share_few_shapes(rows: Rows) -> None:
    """What is packed is filled up to 64 tokens (or its layout's room), rows to 16 positions, many rows to
    even numbers; the filling lies behind the rows' ends, every token in a place of its own."""
    for size in (1, 2, 3, 7, 12):
        batch = rows.micro_batch(np.arange(size), False, packed=True)
        assert batch.packing is not None
        assert batch.position_ids is not None
        lengths, layout = rows.lengths[:size], batch.packing
        tokens, longest = int(lengths.sum()), -(-int(lengths.max()) // 16) * 16
        assert layout.longest == longest
        assert layout.rows == size
        assert batch.input_ids.shape == (1, min(-(-tokens // 64) * 64, size * longest))
        assert batch.position_ids.shape == batch.input_ids.shape
        owners, places = layout.places // longest, layout.places % longest
        assert owners[:tokens].tolist() == np.repeat(np.arange(size), lengths).tolist()
        assert torch.equal(places[:tokens], batch.position_ids[0, :tokens])
        assert bool((places[tokens:] >= torch.from_numpy(lengths)[owners[tokens:]]).all())
        assert len(set(layout.places.tolist())) == batch.input_ids.shape[1]
    thirteen = rows.micro_batch(np.arange(13), False, packed=True).packing
    assert thirteen is not None
    assert thirteen.rows == 14


def test_a_sliding_window_is_kept(rows: Rows) -> None:
    """A window of 4 tokens: attention as by an explicit mask, packed or not."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    mixed, _ = attention.causal_attention(torch.nn.Identity(), query, key, value, None, 0.3, sliding_window=4)
    apart = torch.arange(9)[:, None] - torch.arange(9)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=(apart >= 0) & (apart < 4), scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(mixed, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_attention_that_it_does_not_compute_is_refused() -> None:
    """Soft caps, sinks and dropout are an error, not another model."""
    one = torch.zeros(1, 1, 2, 8)
    with pytest.raises(TrainingError, match="soft caps"):
        attention.causal_attention(torch.nn.Identity(), one, one, one, None, 1.0, softcap=30.0)


def test_attention_that_plans_for_every_shape_is_off_in_trainings() -> None:
    """cuDNN's, which PyTorch prefers on Hopper: there nothing else of the step took as long."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    attention.register()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
