"""A Prometheus that scrapes all that the dashboards show, and what makes it: two arms, keys, graders, runs.

The shared stack has engines, routers, a controller and a running A/B test. A router with keys and graders
over fake engines has what the stack leaves out, and the flywheel's daemon runs a tiny real training.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from serve.state.keys import KeyState, new_key
from serve.state.tables import open_state
from tests.integration.flywheel_world import write_flywheel
from tests.integration.held_port import held_port
from tests.integration.router_rig import Server, World, post
from tests.integration.stack_rig import ROOT, LiveStack, wait_until

CHAT = "/v1/chat/completions"
GRADERS = {
    "grade": {"kind": "function", "function": "tests.integration.graders:says_tick"},
    "broken": {"kind": "function", "function": "tests.integration.graders:fails"},
    "shy": {"kind": "function", "function": "tests.integration.graders:abstains"},
}


class Prometheus:
    """A real server that scrapes every other second; jobs as in docs/guides/monitoring.md."""

    def __init__(self, program: Path, folder: Path, jobs: list[dict[str, Any]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        pace = {"scrape_interval": "2s", "scrape_timeout": "2s"}
        config = {"global": pace, "scrape_configs": jobs}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = held_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [str(program), f"--config.file={folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
        with (folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)

    def ask(self, path: str, **arguments: str) -> Any:
        """`data` of an answer. Raises: AssertionError with Prometheus' words when it refuses the query."""
        body = urllib.parse.urlencode(arguments).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}", data=body or None, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as err:
            raise AssertionError(f"{arguments}: {err.read().decode()}") from err

    def points(self, expr: str, instant: bool) -> int:
        """Samples that are numbers in an answer as a panel gets it; of a range: the last five minutes."""
        if instant:
            found = self.ask("query", query=expr)["result"]
            values = [series["value"][1] for series in found]
        else:
            now = float(self.ask("query", query="time()")["result"][1])
            span = {"start": str(now - 300), "end": str(now), "step": "5"}
            found = self.ask("query_range", query=expr, **span)["result"]
            values = [value for series in found for _, value in series["values"]]
        return sum(not math.isnan(float(value)) for value in values)

    def series(self, selector: str, label: str) -> list[str]:
        """Values of a label of the series that a selector finds: Grafana's label_values()."""
        url = f"{self.url}/api/v1/label/{label}/values?{urllib.parse.urlencode({'match[]': selector})}"
        with urllib.request.urlopen(url, timeout=30) as reply:
            return list(json.load(reply)["data"])

    def up(self) -> dict[str, int]:
        """Job → targets that answer."""
        try:
            found = self.ask("query", query="sum by (job) (up)")["result"]
        except OSError:  # not listening yet
            return {}
        return {one["metric"]["job"]: int(float(one["value"][1])) for one in found}

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)


class Extras(World):
    """A router that wants keys, grades answers and uploads its log, over two fake engines."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        super().__init__(folder)
        key, self._secret = new_key("dashboards")
        KeyState(open_state(self.state_url)).create_key(key)
        self.split(1, weight=0.5)
        log = {"dir": str(folder / "log"), "upload": f"file://{folder / 'remote'}", "rotate_s": 1}
        self.front: Server = self.router(keys=True, graders=GRADERS, log=log)

    def ask(self, number: int) -> None:
        """One answered request, a thumb up or down on it, and one that is refused."""
        body = {"model": "support", "messages": [{"role": "user", "content": f"q{number}"}]}
        chat = f"{self.front.url}{CHAT}"
        status, _, headers = post(chat, body, authorization=f"Bearer {self._secret}")
        assert status == 200
        assert post(chat, body)[0] == 401
        judged = {"request_id": headers["x-request-id"], "good": number % 2 == 0}
        post(f"{self.front.url}/v1/feedback", judged, authorization=f"Bearer {self._secret}")


class Flywheel:
    """`stillhouse flywheel run` over a small log, its run a tiny real training."""

    def __init__(self, folder: Path) -> None:
        self.port = held_port()
        pipeline = [sys.executable, "-m", "tests.integration.flywheel_pipeline", "{workdir}", str(folder)]
        triggers = {"rows": 50, "feedback": {"bad_share": 0.9, "min_judgements": 5}}
        file = write_flywheel(
            folder,
            hold=True,
            route={"command": pipeline, "triggers": triggers},
            metrics_port=self.port,
            poll_s=0.5,
            budget={"nice": 0, "hours_per_day": 8, "teacher_tokens_per_day": 10_000},
        )
        judged = [_judgement(number) for number in range(12)]
        (folder / "logs" / "feedback-1.jsonl").write_text("".join(json.dumps(j) + "\n" for j in judged))
        self._folder = folder
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "cli.main", "flywheel", "run", str(file)]
        with (folder / "daemon.log").open("ab") as log:
            self._daemon = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def said(self) -> str:
        """The end of its log."""
        return (self._folder / "daemon.log").read_text(errors="replace")[-2000:]

    def close(self) -> None:
        """Let the run end; SIGTERM to the daemon, which ends what is left of it."""
        (self._folder / "hold").unlink(missing_ok=True)
        self._daemon.terminate()
        self._daemon.wait(120)


def jobs(stack: LiveStack, extras: Extras, flywheel: Flywheel) -> list[dict[str, Any]]:
    """What the guide says, and the router of the extras."""
    router = f"127.0.0.1:{stack.config.http.port}"
    discovered = [{"url": f"http://{router}/targets", "refresh_interval": "2s"}]

    def fixed(name: str, target: str) -> dict[str, Any]:
        return {"job_name": name, "static_configs": [{"targets": [target]}]}

    return [
        fixed("stillhouse", router),
        {"job_name": "engines", "http_sd_configs": discovered},
        fixed("flywheel", f"127.0.0.1:{flywheel.port}"),
        fixed("extras", extras.front.url.removeprefix("http://")),
    ]


def start_ab_test(stack: LiveStack, folder: Path) -> None:
    """A student of its own in an A/B test at one half, until traffic reaches it."""
    from contracts.rollout import Phase
    from tests.integration.stack_rig import make_model

    make_model(folder, seed=11)
    ref = stack.publish_student("watched", folder)
    stack.cli("rollout", "start", "support", ref, "--ab", "0.5", "--force")
    wait_until("ramping", lambda: stack.last_rollout().status.phase is Phase.RAMPING, 300)


def end_ab_test(stack: LiveStack) -> None:
    """Back to the teacher alone, the student's engine gone, as the other tests want the stack."""
    if not stack.rollouts.history():  # it never began
        return
    mine = stack.last_rollout()
    if not mine.status.phase.terminal:
        stack.cli("rollout", "abort", "support")
    wait_until("the end", lambda: stack.last_rollout().status.phase.terminal, 120)
    wait_until("no student", lambda: mine.spec.candidate.app not in stack.traffic.endpoints(15), 120)


def traffic(stack: LiveStack, extras: Extras, count: int, start: int) -> None:
    """Requests to both, half of them streamed; nobody may see an error."""
    with ThreadPoolExecutor(4) as pool:
        texts = list(
            pool.map(lambda i: stack.ask(f"look at me {start + i}", stream=i % 2 == 0), range(count))
        )
        assert len(texts) == count
        with pytest.raises(openai.BadRequestError):
            stack.ask("this is refused by the engine", max_tokens=-1)
        list(pool.map(extras.ask, range(start, start + count // 4)))


def _judgement(number: int) -> dict[str, Any]:
    said = {"id": f"f{number}", "request_id": f"r{number:05d}", "ts": 1.0, "good": number % 3 > 0}
    return said | {"route": "support", "arm": "stable", "split_version": 1, "log_mode": "full"}
