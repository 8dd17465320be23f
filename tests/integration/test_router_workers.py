"""The router on its own with several processes on one port: they count together, one may die, all drain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from tests.integration.router_rig import ROOT, Server, World, get, total, wait_until

pytestmark = pytest.mark.integration
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.split(1)
    yield made
    made.close()


def workers(router: Server) -> list[psutil.Process]:
    return psutil.Process(router.process.pid).children()


def ask(router: Server, retries: int = 0) -> str:
    """One request over a connection of its own, so that the kernel chooses a process for it."""
    with OpenAI(base_url=f"{router.url}/v1", api_key="-", max_retries=retries, timeout=30) as client:
        answer = client.chat.completions.create(model="support", messages=MESSAGES, max_tokens=4)
        return answer.choices[0].message.content or ""


def test_processes_share_a_port_and_count_together(world: World) -> None:
    """Requests reach both processes; a scrape of either has them all, and so has the log."""
    router = world.router(workers=2)
    replicas = {get(f"{router.url}/health")[1] for _ in range(64)}
    assert len(replicas) == 2
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(router), range(60)))
    assert set(answers) == {"tick " * 8}
    scrapes = [get(f"{router.url}/metrics")[1] for _ in range(8)]
    assert {total(s, "stillhouse_requests_total", route="support") for s in scrapes} == {60.0}
    wait_until("every row is written", lambda: len(world.rows()) == 60)


def test_a_killed_process_is_replaced_on_its_socket_and_costs_no_request(world: World) -> None:
    """SIGKILL of one of two under load: what was in it is retried by the official client, what the kernel had
    queued for it is answered by its successor."""
    router = world.router(workers=2)
    before = workers(router)
    time.sleep(max(0.0, 5.2 - (time.time() - before[0].create_time())))
    failed: list[str] = []
    answered = 0
    stop = threading.Event()

    def load() -> None:
        nonlocal answered
        while not stop.is_set():
            try:
                ask(router, retries=2)
                answered += 1
            except Exception as err:  # noqa: BLE001 reason: every failure counts, whatever it is
                failed.append(repr(err))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until("requests are answered", lambda: answered > 20)
    before[0].kill()
    wait_until("another took its place", lambda: len({p.pid for p in workers(router)} - {before[0].pid}) == 2)
    at = answered
    wait_until("requests go on", lambda: answered > at + 40)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert before[1].is_running()


def test_sigterm_drains_every_process_and_leaves_none(world: World) -> None:
    """A stream that runs is finished, then all are gone and the end is clean."""
    router = world.router(workers=2)
    world.stable.control(tpot_s=0.05)
    client = OpenAI(base_url=f"{router.url}/v1", api_key="-", max_retries=0, timeout=30)
    stream = client.chat.completions.create(model="support", messages=MESSAGES, max_tokens=16, stream=True)
    pieces = [next(iter(stream))]
    mine = workers(router)
    router.process.send_signal(signal.SIGTERM)
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason is not None
    assert router.process.wait(30) == 0
    assert not any(p.is_running() for p in mine)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_asked_to_stop_while_it_starts_it_stops(world: World, count: int) -> None:
    """SIGTERM before any process, with one and with all on their way: a clean end, and nobody left."""
    command = [sys.executable, "-m", "serve.router", "--config", str(world.settings()), "--port", "0"]
    process = subprocess.Popen([*command, "--workers", "2"], cwd=ROOT)
    parent = psutil.Process(process.pid)
    try:
        wait_until("its handler is there", lambda: _hears(parent, signal.SIGTERM))
        wait_until("it has started some", lambda: len(parent.children()) >= count)
        mine = parent.children()
        process.terminate()
        assert process.wait(30) == 0
        assert not any(p.is_running() for p in mine)
    finally:
        process.kill()
        process.wait()


def _hears(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a handler of its own is there for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_the_parents_death_ends_its_processes(world: World) -> None:
    """SIGKILL of the parent leaves no orphan that holds the port."""
    router = world.router(workers=2)
    mine = workers(router)
    router.kill()
    _, alive = psutil.wait_procs(mine, timeout=30)
    assert alive == []


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_taken_port_and_a_wrong_file_are_said_in_one_line(world: World, count: str) -> None:
    """Two routers on one port by mistake: the second one says so instead of taking half of the requests."""
    port = world.stable.url.rsplit(":", 1)[1]
    good, bad = world.settings(), world.folder / "bad.json"
    bad.write_text('{"state_url": "sqlite://", "colour": "red"}')

    def run(config: Path) -> tuple[int, str]:
        command = [sys.executable, "-m", "serve.router", "--config", str(config), "--port", port]
        done = subprocess.run(
            [*command, "--workers", count], capture_output=True, text=True, cwd=ROOT, env={**os.environ},
            timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stderr

    code, said = run(good)
    assert (code, "Traceback" in said) == (2, False)
    assert f"cannot listen on 127.0.0.1:{port}" in said
    code, said = run(bad)
    assert (code, "Traceback" in said) == (2, False)
    assert "colour: unknown key" in said
