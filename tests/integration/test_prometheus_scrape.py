"""Counts that Prometheus sees are the requests that were sent, exactly, with two router replicas."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.held_port import held_port
from tests.integration.stack_rig import LiveStack, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.whole, pytest.mark.timeout(600)]

SENT = 40


@pytest.fixture
def server(stack: LiveStack, prometheus: Path, tmp_path: Path) -> Iterator[str]:
    """A Prometheus server that scrapes the stack every second; its base URL."""
    port = held_port()
    target = f"127.0.0.1:{stack.config.http.port}"
    (tmp_path / "prometheus.yml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
                "scrape_configs": [{"job_name": "stillhouse", "static_configs": [{"targets": [target]}]}],
            }
        )
    )
    command = [str(prometheus), f"--config.file={tmp_path / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until("a first scrape", lambda: query(url, 'up{job="stillhouse"}') == 1.0, 60)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def query(url: str, promql: str) -> float | None:
    """The value of an instant query with one sample, None when there is none (or no server yet)."""
    try:
        with urllib.request.urlopen(
            f"{url}/api/v1/query?query={urllib.parse.quote(promql)}", timeout=5
        ) as reply:
            result = json.load(reply)["data"]["result"]
    except OSError:
        return None
    return float(result[0]["value"][1]) if result else None


def counted(text: str, **labels: str) -> float:
    """Sum of stillhouse_requests_total over the samples with these labels."""
    return sum(
        sample.value
        for metric in text_string_to_metric_families(text)
        for sample in metric.samples
        if sample.name == "stillhouse_requests_total" and labels.items() <= sample.labels.items()
    )


def send(stack: LiveStack, count: int) -> None:
    """`count` requests, eight at a time, half of them streamed."""
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: stack.ask(f"count me {i}", stream=bool(i % 2)), range(count)))
    assert len(texts) == count


def test_one_scrape_is_all_of_it(stack: LiveStack) -> None:
    """Any replica answers a scrape for both, right after the last answer and every time."""
    before = counted(stack.metrics(), route="support", arm="stable", outcome="ok")
    send(stack, SENT)
    after = [counted(stack.metrics(), route="support", arm="stable", outcome="ok") for _ in range(6)]
    assert set(after) == {before + SENT}


def test_promql_says_what_was_sent(stack: LiveStack, server: str) -> None:
    """A real Prometheus server, asked by PromQL, has the requests of the test and not one more or less."""
    total = 'sum(stillhouse_requests_total{route="support",arm="stable",outcome="ok"})'
    before = counted(stack.metrics(), route="support", arm="stable", outcome="ok")
    wait_until("the counts so far", lambda: query(server, total) == before)
    send(stack, SENT)
    wait_until(f"{SENT} more requests", lambda: query(server, total) == before + SENT)
    by_arm = query(server, 'sum(stillhouse_e2e_seconds_count{route="support",arm="stable"})')
    assert by_arm == before + SENT
    assert (query(server, 'sum(stillhouse_in_flight{route="support"})') or 0.0) == 0.0
