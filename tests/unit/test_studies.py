"""Studies: which trials there are, nested rows, the fit and its sentence, the report (training replaced)."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import ttest_1samp
from typer.testing import CliRunner

from cli.main import app
from contracts.config import load_config, parse_config
from contracts.errors import ConfigError, DataError
from distill_jobs.keys import output_file
from distill_jobs.stage import Result
from distill_jobs.studies import study as study_module
from distill_jobs.studies.config import StudyConfig
from distill_jobs.studies.learning_curve import Gain, Worth, doubling, fit, sentence
from distill_jobs.studies.run_trial import TrialJob, run_trial
from distill_jobs.studies.study import run_study
from distill_jobs.studies.subsets import write_subset
from distill_jobs.studies.summary import interval_of, summarise
from distill_jobs.studies.trials import Setting, settings_of, trial_key, trials_of
from distill_jobs.studies.validation import validation_losses
from tests.integration.pipeline_world import config_of, write_logs, write_model

ROOT = Path(__file__).resolve().parents[2]
SHARES = [0.25, 0.5, 0.75, 1.0]


def law(rows: np.ndarray) -> np.ndarray:
    """A learning curve: 0.2 + 3 / sqrt(rows)."""
    return 0.2 + 3 * rows**-0.5


def test_the_fit_finds_the_law_that_made_the_points() -> None:
    """Exactly without noise, in either direction of the metric, and with what doubling brings."""
    rows = np.array([100.0, 200, 400, 800, 1600])
    curve = fit(rows, law(rows), minimise=True)
    beyond = np.array([3200.0])
    assert curve.at(beyond)[0] == pytest.approx(law(beyond)[0], rel=0.002)
    gain = doubling(curve, 0.95, 0.01)
    assert gain.expected == pytest.approx(float(law(rows[-1:])[0] - law(beyond)[0]), rel=0.03)
    upward = fit(rows, 1 - law(rows), minimise=False)
    assert upward.at(beyond)[0] == pytest.approx(1 - law(beyond)[0], rel=0.002)
    assert doubling(upward, 0.95, 0.01).expected == pytest.approx(gain.expected, rel=0.01)


def test_the_fits_interval_covers_what_it_says() -> None:
    """Over 100 noisy studies of four shares and three seeds, the true gain of doubling is held by about as
    many intervals as the level says (the residual bootstrap is a little short with 12 points).
    """
    rng = np.random.default_rng(0)
    rows = np.repeat([100.0, 200, 400, 800], 3)
    true = float(law(np.array([800.0]))[0] - law(np.array([1600.0]))[0])
    held = 0
    for seed in range(100):
        curve = fit(rows, law(rows) + rng.normal(0, 0.01, 12), minimise=True, seed=seed)
        low, high = doubling(curve, 0.95, 0.01).interval or (0, 0)
        held += low <= true <= high
    assert held / 100 >= 0.85


def test_more_data_that_only_harms_is_a_flat_curve() -> None:
    """b is never negative: a metric that got worse with data promises nothing from more."""
    rows = np.array([100.0, 200, 400, 800])
    gain = doubling(fit(rows, np.array([0.1, 0.2, 0.3, 0.4]), minimise=True), 0.95, 0.01)
    assert gain.expected == 0.0
    assert gain.interval is None, "four points for three parameters leave one over: no interval"
    assert gain.worth is Worth.UNKNOWN


@pytest.mark.parametrize(
    ("interval", "worth"),
    [((0.02, 0.05), "is"), ((0.001, 0.009), "isn't"), ((0.005, 0.05), "may be"), (None, "may be")],
)
def test_the_sentence_says_what_the_interval_says(interval: tuple[float, float] | None, worth: str) -> None:
    """Worth it only when the whole interval is at or above the threshold; not when all of it is below."""
    said = sentence(Gain(1200, 0.02, interval, 0.01), "validation.kl", 0.95)
    assert said.startswith(f"More data {worth} worth it: doubling the 1,200 training rows")
    assert "0.01 is asked for" in said
    if interval is not None:
        assert f"95% interval {interval[0]:.3g} to {interval[1]:.3g}" in said


def write_rows(folder: Path, parts: int = 3, size: int = 40, k: int = 4) -> Path:
    """Rows as teach writes them, with a file beside the parts."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for part in range(parts):
        rows = []
        for i in range(size):
            logits = torch.tensor(rng.normal(size=(2, 32)), dtype=torch.float32).log_softmax(-1)
            top = logits.topk(k)
            rows.append(
                {
                    "sample_digest": f"{part:02d}-{i:03d}",
                    "input_ids": rng.integers(0, 32, 5).tolist(),
                    "prompt_len": 3,
                    "topk_ids": top.indices.flatten().tolist(),
                    "topk_logprobs": top.values.flatten().tolist(),
                    "weight": 0.5,
                }
            )
        pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{part:05d}.parquet")
    (folder / "head.safetensors").write_text("head")
    (folder / "manifest.json").write_text(json.dumps({"k": k, "rows": parts * size, "vocab_size": 32}))
    return folder


def digests(folder: Path) -> set[str]:
    """The samples of a folder of rows."""
    return {d for p in folder.glob("part-*") for d in pq.read_table(p)["sample_digest"].to_pylist()}


def test_shares_are_nested_and_as_large_as_they_say(tmp_path: Path) -> None:
    """A larger share holds the smaller one's rows; another seed takes others; columns and files come too."""
    rows = write_rows(tmp_path / "rows")
    found = {s: digests(write_subset(rows, s, 7, tmp_path / f"s{s}")) for s in (0.1, 0.5, 0.9)}
    assert [len(found[s]) for s in (0.1, 0.5, 0.9)] == [12, 60, 108]
    assert found[0.1] < found[0.5] < found[0.9] < digests(rows)
    assert digests(write_subset(rows, 0.5, 8, tmp_path / "other")) != found[0.5]
    assert write_subset(rows, 1.0, 7, tmp_path / "all") == rows
    assert len(digests(write_subset(rows, 0.0001, 7, tmp_path / "one"))) == 1
    half = tmp_path / "s0.5"
    assert set(pq.read_table(half / "part-00001.parquet").column_names) >= {"topk_ids", "weight"}
    assert (half / "head.safetensors").read_text() == "head"
    about = json.loads((half / "manifest.json").read_text())
    assert (about["rows"], about["k"], about["subset"]) == (60, 4, {"share": 0.5, "seed": 7})


def test_validation_losses_are_the_textbooks(tmp_path: Path) -> None:
    """Cross entropy and KL with one bucket for the rest, a completion token, computed again here in float64
    from the model's own logits; a cache without a top k has no KL.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path / "m")
    rows = write_rows(tmp_path / "rows", parts=2, size=5)
    found = validation_losses(tmp_path / "m", rows)
    entropy, divergence, tokens = 0.0, 0.0, 0
    for row in (r for p in sorted(rows.glob("part-*")) for r in pq.read_table(p).to_pylist()):
        with torch.inference_mode():
            q = model(torch.tensor([row["input_ids"]])).logits[0, 2:4].double().softmax(-1).numpy()
        ids = np.array(row["topk_ids"]).reshape(2, -1)
        p = np.exp(np.array(row["topk_logprobs"])).reshape(2, -1)
        for j in range(2):
            entropy -= math.log(q[j, row["input_ids"][3 + j]])
            listed = q[j, ids[j]]
            rest = (1 - p[j].sum(), 1 - listed.sum())
            divergence += float((p[j] * np.log(p[j] / listed)).sum() + rest[0] * math.log(rest[0] / rest[1]))
            tokens += 1
    assert found["validation.ce"] == pytest.approx(entropy / tokens, rel=1e-4)
    assert found["validation.kl"] == pytest.approx(divergence / tokens, rel=1e-4)
    (rows / "manifest.json").write_text(json.dumps({"scheme": "hidden"}))
    assert validation_losses(tmp_path / "m", rows)["validation.kl"] is None


def study_of(root: Path, **changes: Any) -> StudyConfig:
    """A study of the pipeline world's job."""
    job = config_of(root)
    job["collect"]["executor"] = "local"
    (root / "distill.yaml").write_text(json.dumps(job))
    values: dict[str, Any] = {
        "folder": str(root / "study"),
        "distill": str(root / "distill.yaml"),
        "knobs": {"train.optimizer.lr": [0.001, 0.01]},
        "data": {"shares": SHARES, "worth": 0.01},
        "seeds": [0, 1],
        "metric": "validation.ce",
    }
    return parse_config(values | changes, StudyConfig)


def test_a_studys_trials_are_settings_times_seeds(tmp_path: Path) -> None:
    """The base, each smaller share and each knob value; a knob's base value is the base's own trial."""
    write_model(tmp_path / "student", hidden=32, layers=1, seed=1)
    study = study_of(tmp_path, set={"train.epochs": 2})
    assert [s.name for s in settings_of(study)] == [
        "base",
        "25% of the rows",
        "50% of the rows",
        "75% of the rows",
        "train.optimizer.lr = 0.001",
        "train.optimizer.lr = 0.01",
    ]
    trials = trials_of(study)
    assert len(trials) == 12
    assert {t.config.train.seed for t in trials} == {0, 1}
    assert {t.config.train.epochs for t in trials} == {2}
    keys = [trial_key(t, "rows", evaluate=False) for t in trials]
    assert keys[0] == keys[8], "0.001 is the default rate"
    assert len(set(keys)) == 10
    steps = study_of(tmp_path, data={"shares": SHARES, "budget": "steps"})
    assert [t.config.train.epochs for t in trials_of(steps)[::2]] == pytest.approx([1, 4, 2, 4 / 3, 1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knobs": {"train.nosuch": [1]}}, r"train\.nosuch"),
        ({"knobs": {"train.optimizer.lr": [-1]}}, r"train\.optimizer\.lr"),
        ({"knobs": {"publish.name": ["x"]}}, "no knob"),
        ({"knobs": {"train.optimizer.lr": []}}, "at least one value"),
        ({"knobs": {}, "data": None}, "nothing to study"),
        ({"data": {"shares": [0.5, 1.0]}}, "at least four"),
        ({"data": {"shares": [0.1, 0.2, 0.3, 1.5]}}, "at most 1"),
        ({"metric": "quantized.accuracy"}, "evaluate: true"),
        ({"metric": "validation.loss"}, r"validation\.kl and validation\.ce"),
        ({"seeds": [1, 1]}, "differ"),
    ],
)
def test_a_wrong_study_names_the_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Before anything is trained."""
    with pytest.raises(ConfigError, match=message):
        trials_of(study_of(tmp_path, **changes))


def test_the_shipped_study_is_valid() -> None:
    """configs/study-*.yaml, with every trial's configuration."""
    files = sorted((ROOT / "configs").glob("study-*.yaml"))
    assert files
    for file in files:
        study = load_config(file, StudyConfig)
        assert len(trials_of(study)) == len(settings_of(study)) * len(study.seeds)


def metrics(value: float, rows: int = 100) -> dict[str, float | None]:
    """A trial's result."""
    return {"rows": float(rows), "validation.ce": value}


def test_knobs_are_compared_by_seed_with_the_base(tmp_path: Path) -> None:
    """A small gain that every seed shows is seen through the noise between seeds; the interval is Student's
    of the paired differences, at the level of all the knob's values together.
    """
    study = study_of(
        tmp_path, data=None, seeds=[0, 1, 2], knobs={"train.optimizer.lr": [0.001, 0.01], "teach.k": [4]}
    )
    noise = [1.0, 2.0, 3.0]
    gains = [0.10, 0.11, 0.12]
    found = {
        Setting(): [metrics(v) for v in noise],
        Setting("train.optimizer.lr", 0.001): [metrics(v) for v in noise],
        Setting("train.optimizer.lr", 0.01): [metrics(v - g) for v, g in zip(noise, gains, strict=True)],
        Setting("teach.k", 4): [metrics(v) for v in (1.5, 1.5, 3.0)],
    }
    summary = summarise(study, found)
    same, better = summary.knobs["train.optimizer.lr"]
    assert (same.verdict, better.verdict) == ("base", "better")
    assert summary.knobs["teach.k"][0].verdict == "no clear difference"
    expected = ttest_1samp(gains, 0).confidence_interval(1 - 0.05 / 2)
    assert better.gain_interval == pytest.approx((expected.low, expected.high))
    assert interval_of([1.0], 0.95) is None


@dataclass
class FakeTraining:
    """A trainer whose students are the better the more rows they saw; counts its runs."""

    ran: list[tuple[int, float, int]] = field(default_factory=list)

    def __call__(self, config: Any, data: Path, base: str, out: Path, on_progress: Any) -> Any:
        self.ran.append((len(digests(data)), config.optimizer.lr, config.seed))
        shutil.copytree(base, out, dirs_exist_ok=True)
        on_progress({"step": 1.0, "steps": 1.0})
        return type("Trained", (), {"checkpoint_dir": out, "metrics": {"step": 1.0}})()


def fake_losses(training: FakeTraining) -> Any:
    """Validation losses that follow the law in the rows of the last training, worse for a high rate."""

    def losses(student: Path, rows: Path) -> dict[str, float | None]:
        n, lr, seed = training.ran[-1]
        value = float(law(np.array([float(n)]))[0]) + (0.5 if lr > 0.005 else 0) + 0.001 * seed
        return {"validation.ce": value, "validation.kl": None}

    return losses


def test_a_study_goes_from_logs_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real collect and teach once, every distinct trial once, then table, pictures and the sentence; a study
    that is run again, or that gains a value, only runs what is new.
    """
    write_logs(tmp_path / "logs", 120)
    write_model(tmp_path / "teacher", hidden=32, layers=1, seed=0)
    write_model(tmp_path / "student", hidden=32, layers=1, seed=1)
    training = FakeTraining()
    monkeypatch.setattr("distill_jobs.studies.run_trial.validation_losses", fake_losses(training))

    def runner(
        jobs: list[TrialJob], folder: Path, parallel: int, cpus: float, ray: str, on_done: Any
    ) -> None:
        for job in jobs:
            run_trial(job, training)
        on_done(len(jobs), len(jobs))

    said: list[str] = []
    done = run_study(study_of(tmp_path), say=said.append, runner=runner)
    assert len(training.ran) == 10
    assert len({n for n, _, _ in training.ran}) == 4
    worse = done.summary.knobs["train.optimizer.lr"][1]
    assert worse.verdict == "worse"
    assert worse.gain == pytest.approx(-0.5)
    assert done.summary.gain is not None
    assert done.summary.gain.worth is Worth.IS
    text = done.report.read_text()
    assert "More data is worth it: doubling the" in text
    assert "| 0.01 |" in text
    for picture in ("data-size.png", "knob-train.optimizer.lr.png"):
        assert f"({picture})" in text
        assert (tmp_path / "study" / picture).read_bytes().startswith(b"\x89PNG")
    trials = list((tmp_path / "study" / "trials").iterdir())
    assert all(sorted(p.name for p in t.iterdir()) == ["progress.json", "result.json"] for t in trials)
    run_study(
        study_of(tmp_path, knobs={"train.optimizer.lr": [0.001, 0.01, 0.1]}), said.append, runner=runner
    )
    assert len(training.ran) == 12


def test_a_metric_that_was_not_measured_is_told_with_those_that_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than a table of NaN."""
    found = {Setting(): [{"rows": 1.0, "validation.ce": 1.0, "validation.kl": None}]}
    with pytest.raises(DataError, match=r"validation\.kl was not measured \(base\).*validation\.ce"):
        study_module._check(study_of(tmp_path, metric="validation.kl"), found)


def test_a_trial_with_the_evaluate_stage_measures_its_own_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantize and evaluate get the trial's student and the job's evaluation set; their metrics join the
    losses; a finished trial is read, not run.
    """
    job = config_of(tmp_path)
    seen: dict[str, Any] = {}

    def quantize(config: Any, student: Path, splits: Any, folder: Path, progress: Any) -> Any:
        seen["quantized"] = (student, splits)
        (folder / "artifact").mkdir()
        (folder / "artifact" / "w").write_text("w")
        return Result({"artifact": output_file(folder / "artifact")})

    def evaluate(config: Any, subjects: Any, folder: Path, progress: Any) -> Any:
        seen["subjects"] = subjects
        return Result({}, metrics={"quantized.accuracy": 0.75})

    write_model(tmp_path / "student", hidden=32, layers=1, seed=1)
    monkeypatch.setattr("distill_jobs.studies.run_trial.quantize.run", quantize)
    monkeypatch.setattr("distill_jobs.studies.run_trial.evaluate.run", evaluate)
    training = FakeTraining()
    monkeypatch.setattr("distill_jobs.studies.run_trial.validation_losses", fake_losses(training))
    rows = str(write_rows(tmp_path / "rows"))
    folder = tmp_path / "trials" / "t"
    trial = TrialJob(
        folder=str(folder), config=job, share=0.5, seed=0, rows={"train": rows, "validation": rows},
        evaluate=True, collected={"calibration": "c.parquet"}, dataset="d.jsonl", dataset_digest="dd",
        teacher_digest="t", keep_models=True,
    )  # fmt: skip
    found = run_trial(trial, training)
    assert (found["quantized.accuracy"], found["rows"]) == (0.75, 60.0)
    assert seen["quantized"] == (folder / "student", {"calibration": Path("c.parquet")})
    assert seen["subjects"].models == {
        "teacher": tmp_path / "teacher",
        "student": folder / "student",
        "quantized": folder / "quantize" / "artifact",
    }
    assert seen["subjects"].dataset_digest == "dd"
    assert (folder / "student" / "config.json").is_file(), "keep_models"
    assert run_trial(trial, training) == found
    assert len(training.ran) == 1


def test_the_command_shows_its_trials_and_refuses_with_a_reason(tmp_path: Path) -> None:
    """`--dry-run` prints them; a file that is not there is one line and exit code 1."""
    shown = CliRunner().invoke(app, ["study", str(ROOT / "configs/study-support.yaml"), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    for text in ("base", "10% of the rows", "train.loss.temperature = 2.0"):
        assert text in shown.output
    study = {"folder": str(tmp_path), "distill": str(tmp_path / "none.yaml"), "data": {}}
    (tmp_path / "s.yaml").write_text(json.dumps(study))
    refused = CliRunner().invoke(app, ["study", str(tmp_path / "s.yaml")])
    assert refused.exit_code == 1
    assert "distill: there is no file" in " ".join(refused.output.split())
