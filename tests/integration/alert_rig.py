"""A real Prometheus with the rules of k8s/monitoring, a real Alertmanager, and whoever it notifies."""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from k8s.monitoring.rules import read_groups, scale, write_rules
from tests.integration.held_port import held_port
from tests.integration.stack_rig import wait_until
from tests.tools import debian_binary

LIMIT_S = 240.0
"""Longest wait for a notification."""
_TEMPLATES = Path("/usr/share/prometheus/alertmanager")


def alertmanager_program(folder: Path) -> Path:
    """An Alertmanager that starts without being installed.

    Debian's opens its templates in a folder that only an installation has. In a copy of the program that path
    is replaced by one of the same length, which is the folder it is started in.
    """
    program = debian_binary("prometheus-alertmanager", "prometheus-alertmanager")
    if (_TEMPLATES / "default.tmpl").exists():
        return program
    path = str(_TEMPLATES).encode()
    text = program.read_bytes()
    assert path in text
    copy = folder / "alertmanager"
    copy.write_bytes(text.replace(path, b"./" * (len(path) // 2)))
    copy.chmod(0o755)
    for name in ("default.tmpl", "email.tmpl"):
        source = program.parents[1] / "share" / "prometheus" / "alertmanager" / name
        (folder / name).write_bytes(source.read_bytes())
    return copy


class Receiver:
    """The webhook at the end: every alert it was told of, in order."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                receiver.alerts += body["alerts"]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def told(self, name: str, **labels: str) -> dict[str, Any] | None:
        """The first notification of a firing alert with these labels."""
        wanted = {"alertname": name, **labels}
        firing = (a for a in list(self.alerts) if a["status"] == "firing")
        return next((a for a in firing if wanted.items() <= a["labels"].items()), None)

    def wait(self, name: str, **labels: str) -> dict[str, Any]:
        """Wait for it; fails with what came instead."""
        try:
            found: dict[str, Any] = wait_until(name, lambda: self.told(name, **labels), LIMIT_S)
        except AssertionError as err:
            raise AssertionError(f"{err}; told of: {[a['labels'] for a in self.alerts]}") from err
        return found

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class Monitoring:
    """Prometheus and Alertmanager over one target, with every duration of the rules divided by `factor`."""

    def __init__(self, folder: Path, target: str, factor: float) -> None:
        self.receiver = Receiver()
        self._processes: list[subprocess.Popen[bytes]] = []
        alerts, metrics = held_port(), held_port()
        self.url = f"http://127.0.0.1:{metrics}"
        route = {"receiver": "hook", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s"}
        hook = {"url": self.receiver.url, "send_resolved": False}
        files = {
            "alertmanager.yml": {"route": route, "receivers": [{"name": "hook", "webhook_configs": [hook]}]},
            "prometheus.yml": {
                "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"},
                "rule_files": ["rules.yml"],
                "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alerts}"]}]}]},
                "scrape_configs": [{"job_name": "stillhouse", "static_configs": [{"targets": [target]}]}],
            },
        }
        for name, content in files.items():
            (folder / name).write_text(yaml.safe_dump(content))
        write_rules(folder / "rules.yml", scale(read_groups(), factor))
        manager = [f"--web.listen-address=127.0.0.1:{alerts}", "--cluster.listen-address="]
        self._start(
            folder,
            alertmanager_program(folder),
            "--config.file=alertmanager.yml",
            "--storage.path=a",
            *manager,
        )
        wait_until("Alertmanager is ready", lambda: _answers(f"http://127.0.0.1:{alerts}/-/ready"), LIMIT_S)
        prometheus = debian_binary("prometheus", "prometheus")
        listen = f"--web.listen-address=127.0.0.1:{metrics}"
        self._start(folder, prometheus, "--config.file=prometheus.yml", "--storage.tsdb.path=p", listen)
        wait_until("Prometheus is ready", lambda: _answers(f"{self.url}/-/ready"), LIMIT_S)

    def value(self, promql: str) -> float | None:
        """The value of an instant query with one sample; None without any."""
        with urllib.request.urlopen(f"{self.url}/api/v1/query?query={urllib.parse.quote(promql)}") as reply:
            result = json.load(reply)["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    def broken_rules(self) -> list[str]:
        """What Prometheus says of rules that it could not evaluate."""
        with urllib.request.urlopen(f"{self.url}/api/v1/rules") as reply:
            groups = json.load(reply)["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return [f"{r['name']}: {r['lastError']}" for r in rules if r["health"] == "err"]

    def close(self) -> None:
        """End both processes."""
        for process in reversed(self._processes):
            process.terminate()
            process.wait(60)
        self.receiver.close()

    def _start(self, folder: Path, *command: str | Path) -> None:
        with (folder / f"{Path(command[0]).name}.log").open("wb") as log:
            words = [str(word) for word in command]
            self._processes.append(subprocess.Popen(words, stdout=log, stderr=log, cwd=folder))


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:  # not up yet
        return False
