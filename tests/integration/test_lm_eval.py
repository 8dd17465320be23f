"""lm-eval's tasks offline through the engine, on a random model: the harness's figures against the model's
own log-probabilities (Hugging Face, float32).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from contracts.errors import ConfigError
from distill_jobs.config import EngineConfig, EvaluateConfig
from distill_jobs.measuring.harness import check_tasks, read_tasks, run_tasks, tasks_digest
from tests.integration.pipeline_world import write_model

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
CHOICES = ["yes", "no", "perhaps"]


def write_task(folder: Path, name: str, docs: list[dict[str, object]], **more: object) -> None:
    """A YAML task beside its data."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        **more,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def test_local_tasks_run_offline_through_the_engine(tmp_path: Path) -> None:
    """A generation task and a multiple-choice one, whose gold answers are half what the model itself would
    say: exact match and accuracy are one half each, with a value for every example.
    """
    model = tmp_path / "model"
    write_model(model, hidden=128, layers=1, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def ids(text: str) -> list[int]:
        said = [{"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return tokenizer(shown, add_special_tokens=False)["input_ids"]

    def likelihood(text: str, choice: str) -> float:
        prompt, rest = ids(text), tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logprobs = network(torch.tensor([prompt + rest])).logits[0].log_softmax(-1)
        return float(sum(logprobs[len(prompt) - 1 + j, t] for j, t in enumerate(rest)))

    def best(text: str) -> int:
        return max(range(3), key=lambda i: likelihood(text, CHOICES[i]))

    prompt = torch.tensor([ids("refund")])
    said = network.generate(prompt, max_new_tokens=3, do_sample=False)[0, prompt.shape[1] :]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_task(
        tasks, "says",
        [{"text": "refund", "answer": tokenizer.decode(said, skip_special_tokens=True)},
         {"text": "order", "answer": "never"}],
        output_type="generate_until", doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\u0000"], "do_sample": False, "max_gen_toks": 3},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    write_task(
        tasks, "chooses",
        [{"text": "refund", "gold": best("refund")}, {"text": "order", "gold": (best("order") + 1) % 3}],
        output_type="multiple_choice", doc_to_target="gold", doc_to_choice=CHOICES, target_delimiter="",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    engine = EngineConfig(dtype="float32", max_model_len=128, kv_cache_bytes=16 << 20)
    config = EvaluateConfig(dataset="unused", lm_eval=(str(tasks),), engine=engine)
    run_tasks(config, model, tmp_path / "out")
    means, figures = read_tasks(tmp_path / "out")
    assert {name: s.rows[:, 0].tolist() for name, s in means.items()} == {
        "lm_eval.says.exact_match": [1.0, 0.0],
        "lm_eval.chooses.acc": [1.0, 0.0],
    }
    assert figures == {}


def test_tasks_are_known_by_their_content(tmp_path: Path) -> None:
    """A changed task or its data is another evaluation; a wrong path is told before an engine starts."""
    first = tasks_digest((str(ROOT / "configs/lm_eval"), "arc_easy"))
    (tmp_path / "a.yaml").write_text("task: a\n")
    changed = tasks_digest((str(tmp_path),))
    (tmp_path / "a.yaml").write_text("task: b\n")
    assert len({first, changed, tasks_digest((str(tmp_path),))}) == 3
    check_tasks((str(ROOT / "configs/lm_eval"), "arc_easy"))
    with pytest.raises(ConfigError, match=r"there is no .*none\.yaml"):
        check_tasks((str(tmp_path / "none.yaml"),))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \*\.yaml"):
        check_tasks((str(tmp_path / "empty"),))
