"""Metrics of kind `query` on a real Prometheus server: exact counts, and the sentences for what goes
wrong."""

from __future__ import annotations

import http.server
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from contracts.errors import ConfigError
from contracts.grading import PrometheusConfig
from contracts.metrics import MetricKind, MetricSpec, QuerySpec
from contracts.rollout import RolloutSpec, RolloutStatus, Step
from contracts.traffic import Split, Upstream
from serve.rollout.observation import QueryReading
from serve.rollout.prometheus import Problem, Prometheus
from serve.rollout.queries import CURSOR, QueryReader, check_queries
from tests.integration.held_port import held_port
from tests.integration.stack_rig import wait_until

pytestmark = pytest.mark.integration

STABLE = Upstream(name="teacher", model="m", url="http://t:1")
CANARY = Upstream(name="student-v2", model="m", url="http://s:1")
SPLIT = Split(route="support", version=2, salt="s", stable=STABLE, canary=CANARY, weight=0.1, rollout_id="r")
BOUNCED = QuerySpec(
    bad='sum(shop_bounced_total{model="{{upstream}}"})', total='sum(shop_visits_total{model="{{upstream}}"})'
)


class Shop:
    """A business system with metrics of its own, and a Prometheus that scrapes it."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.counts = {("bounced", m): 0 for m in ("teacher", "student-v2")}
        self.counts |= {("visits", m): 0 for m in ("teacher", "student-v2")}
        shop = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                lines = [f'shop_{k}_total{{model="{m}"}} {n}' for (k, m), n in sorted(shop.counts.items())]
                body = ("\n".join(lines) + "\n").encode()
                self.send_response(200)
                self.send_header("content-type", "text/plain; version=0.0.4")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        target = f"127.0.0.1:{self._server.server_address[1]}"
        scrape = {"job_name": "shop", "static_configs": [{"targets": [target]}]}
        every = {"scrape_interval": "200ms", "scrape_timeout": "200ms"}
        (folder / "p.yml").write_text(yaml.safe_dump({"global": every, "scrape_configs": [scrape]}))
        port = held_port()
        self.config = PrometheusConfig(url=f"http://127.0.0.1:{port}", lag_s=1.0)
        command = [
            str(program),
            f"--config.file={folder / 'p.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
        ]
        self._process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
        )  # fmt: skip
        wait_until("Prometheus scrapes", self._scrapes, 60)

    def _scrapes(self) -> bool:
        try:
            # Asked afresh each time: one that was down is left alone for a while.
            return Prometheus(self.config).number("up{job='shop'}", time.time()) == 1.0
        except Problem:
            return False

    def sell(self, model: str, visits: int, bounced: int) -> None:
        self.counts["visits", model] += visits
        self.counts["bounced", model] += bounced

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def shop(prometheus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        made = Shop(prometheus, tmp_path_factory.mktemp("prometheus"))
        yield made
        made.close()


def spec(query: QuerySpec = BOUNCED) -> RolloutSpec:
    metric = MetricSpec(kind=MetricKind.QUERY, name="bounced", margin=0.02, query=query)
    return RolloutSpec(
        id="r", route="support", model_ref="m:1", candidate=CANARY, steps=(Step(weight=0.1),),
        metrics=(metric,), created_at=0.0,
    )  # fmt: skip


def settle() -> float:
    """Wait until every scrape so far is older than the lag; the time of a look that sees them all."""
    time.sleep(2.0)
    return time.time()


def look(shop: Shop, status: RolloutStatus, now: float) -> tuple[QueryReading, RolloutStatus]:
    reader = QueryReader(shop.config)
    readings, cursor = reader.read(spec(), status, SPLIT, now)
    reader.close()
    return readings["bounced"], status.model_copy(update={"cursor": cursor})


def test_counts_are_exact_over_looks_and_restarts(shop: Shop) -> None:
    """What the shop sold between two looks, to the last visit, by a reader that is made anew for each look;
    then its process begins again at zero, which costs one look and invents nothing.
    """
    status = RolloutStatus(id="r", step_since=settle() - 1.0)
    sold = [(90, 3, 10, 2), (0, 0, 0, 0), (1000, 10, 111, 40)]
    for visits, bounced, mine, mine_bounced in sold:
        shop.sell("teacher", visits, bounced)
        shop.sell("student-v2", mine, mine_bounced)
        reading, status = look(shop, status, settle())
        assert reading == QueryReading(
            stable_total=visits, stable_bad=bounced, canary_total=mine, canary_bad=mine_bounced
        )
    shop.counts = dict.fromkeys(shop.counts, 0)
    reading, status = look(shop, status, settle())
    assert "a counter was reset; this look is left out" in str(reading.problem)
    shop.sell("teacher", 7, 1)
    reading, status = look(shop, status, settle())
    assert (reading.problem, reading.stable_total, reading.stable_bad) == (None, 7, 1)
    assert set(status.cursor) == {CURSOR}


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("sum(shop_visit_total)", "returned nothing: is every metric and label in it named right"),
        ("sum(shop_visits_total", "was refused: bad_data: invalid parameter"),
        ("shop_visits_total", "returned 2 series; make it one"),
        ("shop_visits_total[5m]", "gives a matrix, not one number"),
        ("'words'", "gives a string, not one number"),
    ],
)
def test_a_real_prometheus_refuses_in_our_words(shop: Shop, query: str, why: str) -> None:
    """What it answers to queries that are wrong is what the sentences were written for."""
    metrics = spec(QuerySpec(value=query, at_most=1.0)).metrics
    with pytest.raises(ConfigError, match=r"metric bounced, query\.value: ") as refused:
        check_queries(metrics, shop.config, SPLIT, time.time())
    assert why in str(refused.value)


def test_right_queries_may_start(shop: Shop) -> None:
    """Counters, a share of nothing (NaN: no traffic yet), and `or vector(0)` for what has no series yet."""
    nothing = "sum(shop_visits_total) * 0 / 0"
    for query in (
        BOUNCED,
        QuerySpec(value=nothing, at_most=1.0),
        QuerySpec(bad="(sum(shop_lost_total) or vector(0))", total="sum(shop_visits_total)"),
    ):
        check_queries(spec(query).metrics, shop.config, SPLIT, time.time())
