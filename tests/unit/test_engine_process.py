"""One engine process: ready, drained, stopped, and nothing left behind. With a fake engine, without vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from contracts.errors import EngineError
from serve.engine import process as engine_process
from serve.engine.config import EngineOptions
from serve.engine.http import answers, ask_chat, healthy, requests_in_engine
from serve.engine.process import KEEPER, VllmProcess

FAKE = """
import http.server, json, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # a worker that outlives its server
LOAD = open(sys.argv[2])
class H(http.server.BaseHTTPRequestHandler):
    def say(self, text, code=200):
        body = text.encode()
        self.send_response(code); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        LOAD.seek(0); n = LOAD.read().strip() or "0"
        if self.path == "/metrics":
            busy = f'vllm:num_requests_running{{a="b"}} {n}.0\\nvllm:num_requests_waiting{{a="b"}} 1e0\\n'
            return self.say(busy if n != "0" else "vllm:num_requests_running 0.0\\n")
        self.say("", 200 if self.path == "/health" else 404)
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if asked["model"] != "m": return self.say("no such model", 404)
        text = "hi " + self.headers.get("authorization", "")
        self.say(json.dumps({"choices": [{"message": {"content": text}}]}))
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmProcess:
    """A VllmProcess whose command is the fake; `tmp_path/load` holds its number of running requests."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "load").write_text("0")

    def command(model: str, name: str, options: EngineOptions, host: str, port: int) -> list[str]:
        if model == "bad":
            return [sys.executable, "-c", "raise ValueError('no weights here')"]
        return [sys.executable, str(tmp_path / "fake.py"), str(port), str(tmp_path / "load")]

    monkeypatch.setattr(engine_process, "engine_command", command)
    options = EngineOptions(start_timeout_s=20, drain_timeout_s=0.5)
    return VllmProcess("good", "m", options, "127.0.0.1", tmp_path / "logs" / "engine.log")


def living(processes: list[psutil.Process], within_s: float = 8.0) -> list[psutil.Process]:
    """Those that still run after a while; zombies do not."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        left = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not left:
            return []
        time.sleep(0.05)
    return left


def family(pid: int) -> list[psutil.Process]:
    """The keeper, the engine and its worker."""
    for _ in range(100):
        found = psutil.Process(pid).children(recursive=True)
        if len(found) >= 2:
            break
        time.sleep(0.05)
    return [psutil.Process(pid), *found]


def test_ready_means_answered_and_stop_ends_the_family(engine: VllmProcess) -> None:
    """Readiness needs a completion; stopping ends the worker that would outlive its server."""
    engine.start()
    engine.wait_ready()
    assert healthy(engine.url)
    assert ask_chat(engine.url, "m") == "hi "
    everyone = family(engine.pid)
    assert len(everyone) == 3
    engine.stop()
    assert not engine.running
    assert living(everyone) == []


def test_drain_waits_for_running_and_waiting_requests(engine: VllmProcess, tmp_path: Path) -> None:
    """A busy engine is not idle; the drain gives up only at its timeout."""
    engine.start()
    engine.wait_ready()
    try:
        (tmp_path / "load").write_text("2")
        assert requests_in_engine(engine.url) == 3
        assert engine.drain(settle_s=0) is False
        (tmp_path / "load").write_text("0")
        assert requests_in_engine(engine.url) == 0
        assert engine.drain(settle_s=0) is True
    finally:
        engine.stop()


def test_an_engine_that_ends_says_why(engine: VllmProcess) -> None:
    """The reason is in the error, with the log to read on."""
    engine.model = "bad"
    engine.start()
    with pytest.raises(EngineError, match=r"(?s)no weights here.*engine\.log"):
        engine.wait_ready()
    engine.stop()


def test_waiting_can_be_cancelled(engine: VllmProcess) -> None:
    """A replica that is deleted while it starts does not wait to the end."""
    with pytest.raises(EngineError, match="was stopped while it started"):
        engine.wait_ready(cancelled=lambda: True)


def test_sigkill_of_the_starter_leaves_nothing(tmp_path: Path) -> None:
    """The keeper notices its parent's death and ends the engine and everything below it."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "load").write_text("0")
    port = engine_process.free_port()
    command = [sys.executable, str(KEEPER), "3", "--", sys.executable, str(tmp_path / "fake.py")]
    command += [str(port), str(tmp_path / "load")]
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()",
            *command,
        ]
    )
    deadline = time.monotonic() + 20
    while not healthy(f"http://127.0.0.1:{port}") and time.monotonic() < deadline:
        time.sleep(0.05)
    everyone = psutil.Process(starter.pid).children(recursive=True)
    assert len(everyone) == 3
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    assert living(everyone) == []


def test_the_keeper_passes_the_exit_status_on() -> None:
    """Who starts an engine sees how it ended."""
    for code, status in (("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        done = subprocess.run(
            [sys.executable, str(KEEPER), "1", "--", sys.executable, "-c", code], check=False
        )
        assert done.returncode == status


def test_questions_to_nobody() -> None:
    """A refused connection is 'not healthy', and an error where an answer was needed."""
    url = f"http://127.0.0.1:{engine_process.free_port()}"
    assert healthy(url) is False
    assert answers(url) is False
    with pytest.raises(EngineError, match="did not answer a chat request for model 'm'"):
        ask_chat(url, "m", timeout_s=1)
    with pytest.raises(EngineError, match="/metrics"):
        requests_in_engine(url)


def test_keys_and_wrong_models(engine: VllmProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hosted upstream is probed with its key; an error answer carries its status and text."""
    engine.start()
    engine.wait_ready()
    try:
        monkeypatch.setenv("SOME_KEY", "abc")
        assert ask_chat(engine.url, "m", api_key_env="SOME_KEY") == "hi Bearer abc"
        assert answers(engine.url) is True
        with pytest.raises(EngineError, match=r"404.*no such model"):
            ask_chat(engine.url, "other")
    finally:
        engine.stop()
