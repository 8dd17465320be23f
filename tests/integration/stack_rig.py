"""A real stack for tests: `stillhouse up` with tiny random models, driven by commands and the public URL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from serve.config import ServeConfig, load_serve_config
from serve.stack.record import StackRecord, read_record
from serve.state.rollouts import RolloutState, StoredRollout
from serve.state.tables import open_state
from serve.state.traffic import TrafficState
from tests.integration.held_port import held_port

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "demo" / "models" / "tokenizer"
ENGINE = {"dtype": "bfloat16", "max_model_len": 512, "kv_cache_bytes": 67108864, "enforce_eager": True}
ROOM = {"max_loras": 2, "max_lora_rank": 8}
POLICY = {
    "steps": [
        {"weight": 0.3, "min_samples": 10, "min_dwell_s": 4},
        {"weight": 0.6, "min_samples": 10, "min_dwell_s": 2},
    ],
    "metrics": [{"kind": "errors", "margin": 0.3}],
    "look_s": 1,
    "no_data_deadline_s": 120,
    "warm_timeout_s": 240,
    "drain_timeout_s": 30,
}


class LiveStack:
    """One run folder with a configuration, two tiny models and, between up() and down(), a stack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher, self.student = folder / "teacher", folder / "student"
        self.make_models()
        self.config_path = folder / "stack.yaml"
        self.config_path.parent.mkdir(parents=True, exist_ok=True)
        self.config_path.write_text(yaml.safe_dump(self.settings()))
        self.config: ServeConfig = load_serve_config(self.config_path)
        engine = open_state(self.config.state_url)
        self.traffic, self.rollouts = TrafficState(engine), RolloutState(engine)

    def make_models(self) -> None:
        """The two checkpoints."""
        make_model(self.teacher, seed=1)
        make_model(self.student, seed=2)

    def settings(self) -> dict[str, Any]:
        """What its configuration file says."""
        return {
            "run_dir": str(self.folder / "run"),
            "http": {"port": held_port()},
            "upstreams": {
                "teacher": {
                    "engine": {"model": str(self.teacher), "num_replicas": 2, "lora": ROOM, **ENGINE},
                    "cost": {"prompt_per_million": 2, "completion_per_million": 8},
                }
            },
            "routes": {"support": "teacher", "adapted": "teacher"},
            "router": {"replicas": 2},
            "students": {**ENGINE, "drain_timeout_s": 20, "cost": {"per_hour": 0.5}},
            "policies": {"default": POLICY},
        }

    @property
    def url(self) -> str:
        """Public address, without /v1."""
        return f"http://127.0.0.1:{self.config.http.port}"

    @property
    def record(self) -> StackRecord:
        """stack.json of the running stack."""
        record = read_record(self.config)
        assert record is not None, "the stack is not up"
        return record

    def cli(
        self, *arguments: str, check: bool = True, timeout_s: float = 400
    ) -> subprocess.CompletedProcess[str]:
        """Run `stillhouse …` on this stack's configuration."""
        env = {**os.environ, "STILLHOUSE_CONFIG": str(self.config_path), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def up(self) -> str:
        """`stillhouse up --detach`; returns what it printed."""
        return self.cli("up", "--detach").stdout

    def down(self) -> str:
        """`stillhouse down`."""
        return self.cli("down").stdout

    def client(self, **changes: Any) -> Any:
        """The official client, without retries so that nothing is hidden."""
        from openai import OpenAI

        return OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "-", "max_retries": 0, "timeout": 60, **changes}
        )

    def ask(self, text: str = "hello there", stream: bool = False, **more: Any) -> str:
        """One chat completion; returns the text."""
        # Random weights may end at once or say nothing but special tokens; no text would prove nothing.
        engine = {"min_tokens": 6, "skip_special_tokens": False}
        arguments: dict[str, Any] = {"model": "support", "max_tokens": 6, "extra_body": engine} | more
        messages = [{"role": "user", "content": text}]
        completions = self.client().chat.completions
        if not stream:
            return completions.create(messages=messages, **arguments).choices[0].message.content or ""
        chunks = completions.create(messages=messages, stream=True, **arguments)
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    def ready(self) -> bool:
        """Whether a router says that the next request will be answered."""
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=10) as reply:
                return bool(reply.status == 200)
        except OSError:  # 503, or nobody there
            return False

    def metrics(self) -> str:
        """The text of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            return str(reply.read().decode())

    def processes(self) -> dict[int, str]:
        """Ray worker processes of the stack: pid → title."""
        return {p.pid: title(p) for p in psutil.Process(self.record.pid).children(recursive=True)}

    def replica_pids(self, app: str) -> list[int]:
        """The pids of an application's Ray Serve replicas."""
        return [pid for pid, name in self.processes().items() if name.startswith(f"ray::ServeReplica:{app}:")]

    def replica_pid(self, app: str) -> int:
        """The pid of the only Ray Serve replica of an application."""
        found = self.replica_pids(app)
        assert len(found) == 1, f"{app}: {found}"
        return found[0]

    def _haproxies(self) -> dict[int, list[str]]:
        """Every HAProxy, in one look (one that ends between two looks would seem another's): pid → its
        command line."""
        lines = {pid: name.split(" ") for pid, name in self.processes().items()}
        return {p: line for p, line in lines.items() if Path(line[0]).name == "haproxy"}

    def _is_front(self, line: list[str]) -> bool:
        return any(f"{self.config.ray_dir}/front/" in word for word in line)

    def front_pids(self) -> list[int]:
        """The pids of the two in front of the routers."""
        return sorted(pid for pid, line in self._haproxies().items() if self._is_front(line))

    def rays_haproxy_pids(self) -> list[int]:
        """The pids of Ray Serve's own: one, and for a while another one that finishes its streams."""
        return sorted(pid for pid, line in self._haproxies().items() if not self._is_front(line))

    def last_rollout(self) -> StoredRollout:
        """The latest rollout."""
        return self.rollouts.history()[-1]

    def publish_student(self, name: str = "tiny", folder: Path | None = None) -> str:
        """Put a student into the registry as one that passed its gates; returns its reference."""
        from contracts.gates import Gate, judge
        from contracts.model import Artifact, EvalReport, ModelRecord
        from registry.adapter import is_adapter, read_adapter
        from registry.digest import digest_folder
        from registry.mlflow_store import MlflowRegistry

        student = folder or self.student
        size = sum(f.stat().st_size for f in student.iterdir())
        artifact = Artifact(
            uri=str(student),
            digest=digest_folder(student),
            precision="bf16",
            bytes=size,
            params=1,
            adapter=read_adapter(student) if is_adapter(student) else None,
        )
        gates = judge([Gate(metric="accuracy", at_least=0.5)], {"accuracy": 1.0})
        report = EvalReport(
            metrics={"accuracy": 1.0}, samples=1, dataset_digest="-", engine="none", gates=gates
        )
        record = ModelRecord(name=name, artifact=artifact, evaluation=report, created_at=time.time())
        return MlflowRegistry(self.config.registry_uri).publish(record, student).ref


def make_model(folder: Path, seed: int) -> None:
    """A Qwen3-shaped checkpoint of 0.2 M random weights with the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(str(TOKENIZER))
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def marked_processes(stack_id: str) -> list[str]:
    """Titles of living processes that carry a stack's marker."""
    from serve.stack.processes import stack_processes

    return [title(p) for p in stack_processes(stack_id)]


def family(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def title(process: psutil.Process) -> str:
    """Its command line, or '' when it is gone."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def wait_until(what: str, happened: Callable[[], Any], timeout_s: float = 60.0, every_s: float = 0.2) -> Any:
    """Wait for a truthy answer and return it; fails naming what did not happen."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        answer = happened()
        if answer:
            return answer
        time.sleep(every_s)
    raise AssertionError(f"{what}: did not happen within {timeout_s:.0f} s")


def request_rows(config: ServeConfig) -> list[dict[str, Any]]:
    """All rows of the request log, closed segments and open ones."""
    folder = config.run_dir / "requests"
    lines = [line for f in sorted(folder.glob("requests-*.jsonl")) for line in f.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]
