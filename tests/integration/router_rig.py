"""Real processes for the router's integration tests: fake engines, routers and a state store between them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openai import OpenAI

from contracts.metrics import ArmCounts
from contracts.traffic import Split, Upstream
from serve.router.config import RouterConfig
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

ROOT = Path(__file__).resolve().parents[2]
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str) -> tuple[int, str]:
    """GET whatever the status."""
    try:
        with _OPENER.open(url, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


def post(url: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """POST JSON whatever the status: (status, body, headers)."""
    lines = {"content-type": "application/json", **{n.replace("_", "-"): v for n, v in headers.items()}}
    request = urllib.request.Request(url, json.dumps(body).encode(), lines)
    try:
        with _OPENER.open(request, timeout=30) as reply:
            return reply.status, json.loads(reply.read()), dict(reply.headers)
    except urllib.error.HTTPError as err:
        return err.code, json.loads(err.read()), dict(err.headers)


def wait_until(what: str, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll until it is so; fails with its name."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)


class Server:
    """A process that prints the URL it listens on."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *args], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"listens on (http://\S+)", line):
                self.url = found.group(1)
                return
        raise AssertionError(f"{args} did not start")

    def stop(self, timeout_s: float = 60.0) -> None:
        """SIGTERM, and wait for a clean end."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout_s)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)


class Fake(Server):
    """A fake engine in a process of its own."""

    def __init__(self, **behaviour: Any) -> None:
        super().__init__("-m", "serve.engine.fake")
        self.control(**behaviour)

    def control(self, **behaviour: Any) -> dict[str, Any]:
        """Change its behaviour."""
        return post(f"{self.url}/control", behaviour)[1]

    def status(self) -> dict[str, Any]:
        """What it saw."""
        return dict(json.loads(get(f"{self.url}/status")[1]))


class World:
    """A state store, a log folder, two fake engines and as many routers as a test wants."""

    def __init__(self, folder: Path, state_url: str | None = None) -> None:
        self.folder = folder
        self.state_url = state_url or f"sqlite:///{folder}/state.db"
        self.state = TrafficState(open_state(self.state_url))
        self.stable = Fake(text="tick ")
        self.canary = Fake(text="tock ")
        self.routers: list[Server] = []
        self.others: list[Server] = []

    def split(self, version: int, weight: float = 0.0, **changes: Any) -> Split:
        """Write the next split of route `support`, evidence for rollout r1."""
        split = Split(
            **{
                "route": "support",
                "version": version,
                "salt": "s",
                "stable": Upstream(name="teacher", model="big", url=self.stable.url),
                "canary": Upstream(name="student", model="small", url=self.canary.url, digest="sha256:abc"),
                "weight": weight,
                "rollout_id": "r1",
                **changes,
            }
        )
        self.state.put_split(split)
        return split

    def router(self, multiproc: bool = False, workers: int = 1, **config: Any) -> Server:
        """Start a router and wait until it is ready."""
        path = self.settings(**config)
        extra = ["--multiproc-dir", str(self.folder / "metrics")] if multiproc else []
        extra += ["--workers", str(workers)]
        router = Server("-m", "serve.router", "--config", str(path), "--port", "0", *extra)
        self.routers.append(router)
        wait_until("the router is ready", lambda: get(f"{router.url}/ready")[0] == 200)
        return router

    def settings(self, **config: Any) -> Path:
        """A file with a router's configuration."""
        settings = RouterConfig.model_validate(
            {"state_url": self.state_url, "log": {"dir": str(self.folder / "log")}, **config}
        )
        path = self.folder / f"router-{len(self.routers)}.json"
        path.write_text(settings.model_dump_json())
        return path

    def rows(self) -> list[dict[str, Any]]:
        """All log rows, open segments included."""
        files = sorted((self.folder / "log").glob("requests-*.jsonl"))
        return [json.loads(line) for f in files for line in f.read_text().splitlines()]

    def evidence(self) -> dict[str, ArmCounts]:
        """Summed evidence by arm."""
        found: dict[str, ArmCounts] = {}
        for entry in self.state.read_ledger("support", "r1", {}):
            found[entry.arm] = found.get(entry.arm, ArmCounts()).plus(entry.counts)
        return found

    def close(self) -> None:
        """Stop everything."""
        for server in [*self.routers, *self.others, self.stable, self.canary]:
            server.stop()


def openai_client(router: Server) -> OpenAI:
    """The official client; it must not retry, or failures would hide."""
    return OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=30)


def samples(text: str, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """Samples of one metric in a scrape, by sorted labels."""
    found = {}
    for line in text.splitlines():
        match = re.match(rf"^{name}(?:\{{(.*)\}})? (\S+)$", line)
        if match:
            labels = tuple(sorted(re.findall(r'(\w+)="([^"]*)"', match[1] or "")))
            found[labels] = float(match[2])
    return found


def total(text: str, name: str, **labels: str) -> float:
    """Sum of a metric over every sample with these labels."""
    return sum(v for k, v in samples(text, name).items() if labels.items() <= dict(k).items())
