"""What the soak runs against: a vLLM student, two router processes, a state store, and the changes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType

import psutil

from contracts.errors import EngineError
from contracts.traffic import Split, Upstream
from serve.engine.config import EngineOptions
from serve.engine.process import VllmProcess
from serve.router.config import RouterConfig
from serve.state.keys import KeyState, new_key
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

MODEL = "demo/models/student-base"
ROUTERS = 2
OPTIONS = EngineOptions(dtype="bfloat16", max_model_len=512, kv_cache_bytes=134217728, enforce_eager=True)


class Rig:
    """A context: everything runs on entering, nothing after leaving."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        state_url = f"sqlite:///{folder}/state.db"
        engine = open_state(state_url)
        self._traffic, self._keys = TrafficState(engine), KeyState(engine)
        self._vllm = VllmProcess(MODEL, "student", OPTIONS, "127.0.0.1", folder / "engine.log")
        self._config = RouterConfig.model_validate(
            {
                "state_url": state_url,
                "keys": True,
                "log": {"dir": str(folder / "log"), "rotate_bytes": 2_000_000, "rotate_s": 60},
            }
        )
        key, self.secret = new_key("soak")
        self._keys.create_key(key)
        self._others: list[str] = []
        self._routers: list[subprocess.Popen[str]] = []
        self.urls: list[str] = []
        self.version = 0
        self.key_changes = 0
        self.segments = 0

    def __enter__(self) -> Rig:
        try:
            self._vllm.start()
            self._vllm.wait_ready()
            self.change_split()
            for _ in range(ROUTERS):
                self._start_router()
        except BaseException:  # also Ctrl-C: nothing may stay running
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def change_split(self) -> None:
        """The next version: another weight for the canary, sometimes another salt."""
        self.version += 1
        arms = [
            Upstream(name=n, model="student", url=self._vllm.url, digest=f"sha256:{n}") for n in ("a", "b")
        ]
        self._traffic.put_split(
            Split(
                route="support",
                version=self.version,
                salt=f"salt-{self.version // 5}",
                stable=arms[0],
                canary=arms[1],
                weight=(self.version * 7 % 11) / 10,
                rollout_id="soak",
            )
        )

    def change_keys(self) -> None:
        """A new key appears, an older one is switched off, then deleted."""
        key, _ = new_key(f"other-{self.version}", requests_per_minute=100)
        self._keys.create_key(key)
        self._others.append(key.id)
        if len(self._others) > 2:
            self._keys.change_key(self._others[-2], disabled=True)
            self._keys.delete_key(self._others.pop(0))
        self.key_changes += 1

    def memory(self) -> dict[str, float]:
        """Resident MiB of every router process."""
        return {
            f"router-{i}": round(psutil.Process(r.pid).memory_info().rss / 2**20, 1)
            for i, r in enumerate(self._routers)
        }

    def log_rows(self) -> int:
        """Rows in all final segments; the routers have stopped."""
        files = list((self._folder / "log").glob("requests-*.jsonl"))
        self.segments = len(files)
        return sum(file.read_bytes().count(b"\n") for file in files)

    def stop_routers(self) -> None:
        """SIGTERM and wait: they finish their rows."""
        for router in self._routers:
            router.terminate()
        for router in self._routers:
            router.wait(60)

    def _start_router(self) -> None:
        path = self._folder / f"router-{len(self._routers)}.json"
        path.write_text(self._config.model_dump_json())
        command = [
            sys.executable,
            "-m",
            "serve.router",
            "--config",
            str(path),
            "--port",
            "0",
            "--workers",
            "1",
        ]
        command += ["--multiproc-dir", str(self._folder / "metrics")]
        router = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        self._routers.append(router)
        assert router.stdout is not None
        said = re.search(r"listens on (http://\S+)", router.stdout.readline())
        if said is None:
            raise EngineError("a router did not start; its error is above.")
        self.urls.append(said[1])
        deadline = time.monotonic() + 30
        while not _ready(said[1]):
            if time.monotonic() > deadline:
                raise EngineError(f"the router at {said[1]} did not become ready within 30 s.")
            time.sleep(0.1)

    def _stop(self) -> None:
        for router in self._routers:
            if router.poll() is None:
                router.terminate()
                try:
                    router.wait(30)
                except subprocess.TimeoutExpired:
                    router.kill()
        self._vllm.stop()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
