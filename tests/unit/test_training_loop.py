"""The plain loop: neither accumulation, padding nor the number of workers changes a step, and a resumed run
is the run."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill_jobs.training.attention import register
from distill_jobs.training.config import LossConfig, OptimizerConfig, TrainConfig
from distill_jobs.training.data import MicroBatch, Rows
from distill_jobs.training.loop import Trainer, writing
from distill_jobs.training.optim import schedule
from distill_jobs.training.order import Order, split_for_worker
from distill_jobs.training.parallel import Workers
from distill_jobs.training.step import Counts, DistillStep

K, VOCAB = 4, 40


def write_rows(folder: Path, count: int = 24, seed: int = 3, extra: bool = False) -> Path:
    """Random rows in the teach stage's format, lengths 4 to 20, over two parts; with the optional columns
    when `extra`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        lengths = rng.integers(4, 21, count // 2)
        prompts = np.array([rng.integers(1, n - 1) for n in lengths])
        answers = lengths - prompts
        kept = [np.stack([rng.permutation(VOCAB)[:K] for _ in range(n)]) for n in answers]
        logprobs = [np.log(rng.dirichlet(np.ones(K + 1), n)[:, :K]) for n in answers]
        columns = {
            "sample_digest": [f"{part}-{i}" for i in range(len(lengths))],
            "input_ids": pa.array(
                [rng.integers(0, VOCAB, n).tolist() for n in lengths], pa.list_(pa.int32())
            ),
            "prompt_len": pa.array(prompts, pa.int32()),
            "topk_ids": pa.array([one.reshape(-1).tolist() for one in kept], pa.list_(pa.int32())),
            "topk_logprobs": pa.array(
                [one.reshape(-1).astype(np.float16) for one in logprobs], pa.list_(pa.float16())
            ),
        }
        if extra:
            columns["weight"] = pa.array(rng.uniform(0.2, 3, len(lengths)), pa.float32())
            columns["task"] = ["rationale" if i % 3 == 0 else "answer" for i in range(len(lengths))]
            columns["difficulty"] = pa.array(rng.uniform(0, 1, len(lengths)), pa.float32())
        pq.write_table(pa.table(columns), folder / f"part-{part:05d}.parquet")
    return folder


def tiny_model() -> Qwen3ForCausalLM:
    """A two-block model of a few thousand parameters, the same at every call."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
            max_position_embeddings=64,
        )
    )
    model.set_attn_implementation(register())
    return model


def config(**changes: object) -> TrainConfig:
    base = {
        "dtype": "float32",
        "batch_rows": 8,
        "epochs": 2,
        "optimizer": OptimizerConfig(lr=1e-2),
        "loss": LossConfig(kd_weight=0.8, hard_weight=0.3, temperature=2.0),
    }
    return TrainConfig.model_validate({**base, **changes})


def trained(folder: Path, **changes: object) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    one = config(**changes)
    trainer = Trainer(tiny_model(), Rows(folder, 64, one.loss.kd_weight > 0), one)
    history = list(trainer.run())
    return trainer.model.state_dict(), history


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


def test_a_pass_is_small_on_a_cpu_and_as_long_as_one_says() -> None:
    """1024 tokens on a CPU, 8192 on a GPU, unless the configuration names a number."""
    assert [TrainConfig().pass_tokens(one) for one in ("cpu", "cuda")] == [1024, 8192]
    assert TrainConfig(micro_tokens=99).pass_tokens("cpu") == 99


@pytest.mark.parametrize("micro_tokens", [16, 45, 100])
def test_accumulation_does_not_change_training(folder: Path, micro_tokens: int) -> None:
    """Six steps in micro-batches of any size (and so any padding) end in the same weights and losses."""
    whole, history = trained(folder)
    split, again = trained(folder, micro_tokens=micro_tokens)
    assert [h["kd"] for h in again] == pytest.approx([h["kd"] for h in history], rel=1e-4)
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=1e-3, atol=1e-5)


def test_two_workers_train_the_same_model_as_one(folder: Path) -> None:
    """Workers with unequal shares of the tokens, summed, take the step of a single worker."""
    alone, history = trained(folder)
    barrier, slots, result = threading.Barrier(2), [None, None], {}

    def run(rank: int) -> None:
        def add(tensor: Tensor) -> None:
            slots[rank] = tensor.clone()  # type: ignore[call-overload]
            barrier.wait()
            total = slots[0] + slots[1]  # type: ignore[operator]
            barrier.wait()
            tensor.copy_(total)

        trainer = Trainer(models[rank], Rows(folder, 64, True), config(), Workers(rank, 2, add))
        result[rank] = (list(trainer.run()), trainer.model.state_dict())

    models = [tiny_model(), tiny_model()]
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for rank in range(2):
        assert [h["ce"] for h in result[rank][0]] == pytest.approx([h["ce"] for h in history], rel=1e-4)
        for name, tensor in alone.items():
            torch.testing.assert_close(result[rank][1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_run_ends_in_the_same_weights(folder: Path, tmp_path: Path, kind: str) -> None:
    """Stopped after step 4 and continued by a new trainer, the run equals one that was never stopped."""
    one = config(optimizer=OptimizerConfig(kind=kind, lr=1e-2))
    straight = Trainer(tiny_model(), Rows(folder, 64, True), one)
    history = list(straight.run())
    first = Trainer(tiny_model(), Rows(folder, 64, True), one)
    for metrics in first.run():
        if metrics["step"] == 4:
            break
    first.save(tmp_path / "state")
    second = Trainer(tiny_model(), Rows(folder, 64, True), one)
    second.load(tmp_path / "state")
    rest = list(second.run())
    assert [h["step"] for h in rest] == [5, 6]
    assert [h["kd"] for h in rest] == pytest.approx([h["kd"] for h in history[4:]], rel=1e-6)
    for name, tensor in straight.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)


def test_training_lowers_both_losses(folder: Path) -> None:
    """Memorising 24 rows works: the divergence falls by a quarter alone, the cross entropy by half alone."""
    _, soft = trained(folder, epochs=25, loss=LossConfig(kd_weight=1.0, hard_weight=0.0))
    assert soft[-1]["kd"] < soft[0]["kd"] * 0.75
    _, hard = trained(folder, epochs=25, loss=LossConfig(kd_weight=0.0, hard_weight=1.0))
    assert hard[-1]["ce"] < hard[0]["ce"] / 2
    assert hard[-1]["kd"] == 0.0


def test_the_loss_is_that_of_the_unpadded_rows(folder: Path) -> None:
    """The reported cross entropy is the mean over answer tokens of rows run one at a time through the
    model's own forward."""
    rows, model = Rows(folder, 64, True), tiny_model()
    indices = next(iter(Order(rows.lengths, 0, 8, 1).steps(0, 1)))[1]
    total, count = 0.0, 0
    for index in indices:
        ids = torch.from_numpy(rows.tokens(index).astype(np.int64))[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        first = int(rows.prompt_len[index])
        for place in range(first, ids.shape[1]):
            total -= float(logprobs[place - 1, ids[0, place]])
            count += 1
    metrics = next(iter(Trainer(tiny_model(), rows, config()).run()))
    assert metrics["ce"] == pytest.approx(total / count, rel=1e-4)


def test_order_is_the_same_for_any_start_and_covers_an_epoch() -> None:
    """Starting at step 5 gives step 5's rows; an epoch shows every row once; epochs differ."""
    order = Order(np.arange(4, 44), seed=1, batch_rows=8, bucket_window=2)
    steps = dict(order.steps(0, 10))
    assert np.array_equal(dict(order.steps(5, 6))[5], steps[5])
    assert sorted(np.concatenate([steps[i] for i in range(5)])) == list(range(40))
    assert not np.array_equal(steps[0], steps[5])


def test_workers_share_a_step_without_loss_or_repetition() -> None:
    """Every row of a step goes to exactly one micro-batch of one worker, none above the token budget."""
    lengths = np.random.default_rng(0).integers(4, 60, 37)
    parts = [part for rank in range(3) for part in split_for_worker(np.arange(37), lengths, rank, 3, 128)]
    assert sorted(np.concatenate(parts)) == list(range(37))
    assert all(len(part) * lengths[part].max() <= 128 for part in parts)


def test_schedule_rises_holds_and_falls_to_zero() -> None:
    """Warm-up never starts at zero, the plateau is the peak, the end is (almost) zero."""
    one = OptimizerConfig(warmup=0.1, decay=0.5)
    factors = [schedule(step, 100, one) for step in range(100)]
    assert 0 < factors[0] < factors[9] <= 1
    assert factors[10:50] == [1.0] * 40
    assert factors[99] < 0.01
    assert factors[50:] == sorted(factors[50:], reverse=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.5, 1 / 90]),
        ("cosine", [1.0, 0.5, 0.5 * (1 - np.cos(np.pi / 90))]),
    ],
)
def test_schedules_after_the_warm_up(name: str, expected: list[float]) -> None:
    """100 steps, 10 of warm-up: the factor right after it, half way down and at the last step."""
    one = OptimizerConfig(warmup=0.1, schedule=name)
    assert [schedule(step, 100, one) for step in (10, 55, 99)] == pytest.approx(expected)
    assert [schedule(step, 100, one) for step in (0, 9)] == pytest.approx([1 / 11, 10 / 11])


def test_gradient_checkpointing_does_not_change_gradients(folder: Path) -> None:
    """Recomputed activations give the same six steps, and are recomputed indeed."""
    plain, history = trained(folder)
    model = tiny_model()
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    one = config(gradient_checkpointing=True)
    again = list(Trainer(model, Rows(folder, 64, True), one).run())
    assert len(calls) == 2 * len(again)
    assert [h["grad_norm"] for h in again] == pytest.approx([h["grad_norm"] for h in history], rel=1e-6)
    for name, tensor in plain.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_bf16_keeps_fp32_masters_gradients_and_rotary_frequencies(folder: Path) -> None:
    """Compute is in bf16; steps too small for bf16 add up in the masters; accumulation over micro-batches is
    fp32; buffers keep their precision."""
    one = config(dtype="bfloat16", micro_tokens=16, optimizer=OptimizerConfig(lr=1e-6))
    trainer = Trainer(tiny_model(), Rows(folder, 64, True), one)
    trainer.accumulate(0, np.arange(8))
    assert all(p.grad is None for p in trainer.model.parameters())
    assert {m.grad.dtype for m in trainer.optimizer.masters.values() if m.grad is not None} == {torch.float32}
    before = {n: m.clone() for n, m in trainer.optimizer.masters.items()}
    trainer.optimizer.step(1.0)
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, trainer.optimizer.masters[name].bfloat16())
        moved = (trainer.optimizer.masters[name] - before[name]).abs().max()
        assert 0 < float(moved) < 1e-4
    frequencies = trainer.model.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, tiny_model().model.rotary_emb.inv_freq)
    assert frequencies.dtype == torch.float32


def test_extra_parameters_of_an_objective_are_trained_and_saved(folder: Path, tmp_path: Path) -> None:
    """A projection that belongs to the objective gets gradients, steps and comes back on resuming; the
    exported model does not hold it; the objective's own state comes back, too."""

    class Projected(DistillStep):
        def __init__(self, model: Qwen3ForCausalLM) -> None:
            super().__init__(model, config())
            self.projection, self.seen = torch.nn.Parameter(torch.ones(3)), 0

        def loss(self, batch: MicroBatch, counts: Counts) -> tuple[Tensor, Tensor]:
            total, parts = super().loss(batch, counts)
            self.seen += len(batch.labels)
            return total + self.projection.square().sum() * len(batch.labels) / counts.answers, parts

        def extra_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
            return [("projection", self.projection)]

        def state_dict(self) -> dict[str, int]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

    def make() -> tuple[Trainer, Projected]:
        model = tiny_model()
        step = Projected(model)
        return Trainer(model, Rows(folder, 64, True), config(), objective=step), step

    first, step = make()
    list(first.run())
    assert float(step.projection.detach().abs().max()) < 1
    first.save(tmp_path / "state")
    second, other = make()
    second.load(tmp_path / "state")
    assert torch.equal(other.projection, step.projection)
    assert other.seen == step.seen > 0
    assert "projection" not in second.weights()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """A failure while writing leaves the old folder as it was and no temporary one."""
    with writing(tmp_path / "model") as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(FileNotFoundError), writing(tmp_path / "model") as temporary:
        (temporary / "a").write_bytes((temporary / "missing").read_bytes())
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
