"""A router's stand-in for tests of the load balancers, as a program: `python front_rig.py NAME`.

Answers completions with its name; a stream of it ends when it is told to; it can be told to drain. And the
world around: a front on a port of its own, its store, and the routers that report themselves to it.
"""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    name: ClassVar[str] = ""
    status: ClassVar[int] = 200
    go: ClassVar[threading.Event] = threading.Event()
    held: ClassVar[list[str]] = []
    """Paths of requests that wait for `go`."""

    def do_GET(self) -> None:
        if self.path in ("/-/healthz", "/health"):
            self._send(Handler.status, {"status": "ok"})
        elif self.path.startswith("/status/"):
            Handler.status = int(self.path.rpartition("/")[2])
            self._send(200, {})
        elif self.path == "/held":
            self._send(200, {"paths": Handler.held})
        elif self.path == "/go":
            Handler.go.set()
            self._send(200, {})
        else:
            self._send(404, {"error": {"message": "There is nothing at this path."}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body.get("stream"):
            return self._stream()
        if body.get("wait") and not Handler.go.is_set():
            Handler.held.append(self.path)
            Handler.go.wait(60)
        message = {"role": "assistant", "content": self.name}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        seen = {"headers": {k.lower(): v for k, v in self.headers.items()}, "bytes": len(json.dumps(body))}
        self._send(200, {"id": "1", "object": "chat.completion", "choices": [choice], "seen": seen})
        return None

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._event(self.name)
        Handler.go.wait(60)
        self._event("the end", "stop")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, text: str, finish: str | None = None) -> None:
        choice = {"index": 0, "finish_reason": finish, "delta": {"content": text}}
        line = f"data: {json.dumps({'id': '1', 'choices': [choice]})}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()

    def _send(self, status: int, body: dict[str, Any]) -> None:
        raw = self.name.encode() if self.name == "ray" else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "text/plain" if self.name == "ray" else "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


class FakeRouter:
    """One such program."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, name],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a health check hangs up once it has the status
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    @property
    def replica(self) -> str:
        """As routers name themselves."""
        from serve.router.names import host_name

        return f"{host_name()}-{self.process.pid}-{self.name}"

    def tell(self, path: str) -> None:
        """GET it, past the load balancers."""
        from tests.integration.router_rig import get

        assert get(f"http://127.0.0.1:{self.port}{path}")[0] == 200

    def held(self) -> list[str]:
        """Paths of the requests that it has and does not answer."""
        from tests.integration.router_rig import get

        return list(json.loads(get(f"http://127.0.0.1:{self.port}/held")[1])["paths"])

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


STACK = "the-stack"


class FrontWorld:
    """A front with its store; routers report themselves twice a second while they are in `routers`."""

    def __init__(self, folder: Path) -> None:
        from serve.config import ServeConfig
        from serve.stack.front import Front
        from serve.state.tables import open_state
        from serve.state.traffic import TrafficState

        self.config = ServeConfig.model_validate(front_config(folder))
        self.config.log_dir.mkdir(parents=True)
        self.url = f"http://127.0.0.1:{self.config.http.port}"
        self.state = TrafficState(open_state(self.config.state_url))
        self.ray = FakeRouter("ray")
        self.routers = [FakeRouter("one"), FakeRouter("two")]
        self.all = [self.ray, *self.routers]
        self._closed = threading.Event()
        self._report()
        self._reporter = threading.Thread(target=self._keep_reporting)
        self._reporter.start()
        self.front = Front(self.config, self.ray.port, STACK)
        self.front.bind()
        self.front.start()

    def _keep_reporting(self) -> None:
        while not self._closed.wait(0.5):
            self._report()

    def _report(self) -> None:
        from serve.state.traffic import RouterReport

        for router in list(self.routers):
            address, pid = f"127.0.0.1:{router.port}", router.process.pid
            report = RouterReport(replica=router.replica, address=address, pid=pid, stack=STACK)
            self.state.report_router(report)

    def leave(self, router: FakeRouter) -> None:
        """It takes itself off the list, as a router does at its end."""
        self.routers.remove(router)
        self.state.drop_router(router.replica)

    def client(self, **options: Any) -> Any:
        """The official client."""
        from openai import OpenAI

        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "-", "timeout": 30, **options})

    def ask(self, client: Any, **more: Any) -> str:
        """The name of the router that answered."""
        messages = [{"role": "user", "content": "hello"}]
        answer = client.chat.completions.create(model="support", messages=messages, **more)
        return str(answer.choices[0].message.content)

    def known(self, name: str) -> list[str]:
        """The routers that a load balancer has in its list."""
        return sorted(row[3].rpartition("-")[2] for row in self._rows(name))

    def leaving(self, name: str) -> list[str]:
        """Those of them that it gives nothing new to and keeps for what they still do."""
        return sorted(row[3].rpartition("-")[2] for row in self._rows(name) if int(row[6]) & 1)

    def _rows(self, name: str) -> list[list[str]]:
        from serve.stack.balancer import SHOW

        shown = runtime(self.config.ray_dir / "front" / f"{name}.sock", SHOW)
        return [line.split() for line in shown.splitlines() if " routers " in line]

    def pids(self) -> dict[str, int]:
        """The load balancers that live: name → process id."""
        import psutil

        found = {}
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            for name in ("a", "b"):
                config = str(self.config.ray_dir / "front" / f"{name}.cfg")
                if config in line and Path(line[0]).name == "haproxy":
                    found[name] = process.pid
        return found

    def close(self) -> None:
        """End everything."""
        self._closed.set()
        self._reporter.join(10)
        self.front.stop()
        for router in self.all:
            if router.process.poll() is None:
                router.kill()


def front_config(folder: Path) -> dict[str, Any]:
    """A stack's configuration with a free port and a short folder for sockets."""
    import tempfile

    from serve.router.haproxy import free_ports

    short = tempfile.mkdtemp(prefix="sh-", dir="/tmp")
    return {
        "run_dir": str(folder / "run"),
        "http": {"port": free_ports(1)[0]},
        "ray": {"temp_dir": short},
        "upstreams": {"teacher": {"url": "http://127.0.0.1:1/v1", "model": "m"}},
        "routes": {"support": "teacher"},
    }


def runtime(path: Path, command: str) -> str:
    """Ask a HAProxy's runtime API."""
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        connection.sendall(f"{command}\n".encode())
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts).decode()


if __name__ == "__main__":
    Handler.name = sys.argv[1]
    Handler.status = 404 if Handler.name == "ray" else 200
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
