"""Alerts, end to end: what goes wrong with real routers and a real controller reaches a webhook by a real
Prometheus with the rules that go to the cluster, and a real Alertmanager. Durations of the rules are divided
by FACTOR, nothing else is changed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from openai import APIError

from contracts.metrics import ArmCounts, MetricKind, MetricSpec
from contracts.rollout import LedgerEntry, Phase, RolloutSpec, Step
from contracts.routes import RouteLimits, RouteSettings
from contracts.traffic import Split, Upstream
from serve.rollout.decide import initial
from serve.state.rollouts import RolloutState
from serve.state.settings import SettingsState
from serve.state.tables import open_state
from tests.integration.alert_rig import LIMIT_S, Monitoring
from tests.integration.held_port import held_port
from tests.integration.router_rig import ROOT, Fake, World, openai_client
from tests.integration.stack_rig import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

FACTOR = 20.0
"""5 minutes are 15 seconds; an hour is three minutes."""


CONTROLLER = """
import sys, threading
from serve.rollout.controller import Controller
from serve.rollout.deployer import FakeDeployer
from serve.rollout.metrics import ControllerMetrics
from serve.state.tables import open_state
controller = Controller(open_state(sys.argv[1]), FakeDeployer(), metrics=ControllerMetrics())
controller.run_forever(threading.Event())
"""
"""Candidates here are URLs that already run, so there is nothing to deploy."""


class Trouble:
    """Routers, a controller, and routes that go wrong, each in its own way, until it is closed."""

    def __init__(self, world: World) -> None:
        self._world, self._ended = world, threading.Event()
        self._threads: list[threading.Thread] = []
        self.well, self.slow = world.stable, Fake(text="tick ", ttft_s=0.5)
        world.others.append(self.slow)
        self.route("alert-well", self.upstream("well", self.well.url))
        self.router = world.router(multiproc=True, workers=2)
        engine = open_state(world.state_url)
        self.rollouts, self._settings = RolloutState(engine), SettingsState(engine)
        env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(world.folder / "metrics")}
        self._controller = subprocess.Popen(
            [sys.executable, "-c", CONTROLLER, world.state_url], env=env, cwd=ROOT
        )

    def upstream(self, name: str, url: str) -> Upstream:
        """A URL that answers, or not."""
        return Upstream(name=name, model="m", url=url)

    def nobody(self) -> Upstream:
        """An engine that is gone."""
        return self.upstream("gone", f"http://127.0.0.1:{held_port()}")

    def route(self, name: str, stable: Upstream, **fields: Any) -> Split:
        """Put a route into the running stack."""
        split = Split(route=name, version=1, salt="s", stable=stable, **fields)
        self._world.state.put_split(split)
        return split

    def limit(self, route: str) -> None:
        """One request at a time and none waiting."""
        limits = RouteLimits(max_in_flight=1, max_queued=0)
        self._settings.put_settings(RouteSettings(route=route, version=1, limits=limits))

    def rollout(self, route: str, candidate: Upstream, silent_s: float, deadline_s: float) -> Split:
        """A rollout in its first step; its canary was last heard of `silent_s` ago."""
        spec = RolloutSpec(
            id=f"{route}-1", route=route, model_ref="m:1", candidate=candidate, steps=(Step(weight=0.5),),
            metrics=(MetricSpec(kind=MetricKind.ERRORS, margin=0.02),), look_s=1.0,
            no_data_deadline_s=deadline_s, cooldown_s=0.0, created_at=time.time(),
        )  # fmt: skip
        stable = self.upstream("well", self.well.url)
        split = self.route(route, stable, canary=candidate, weight=0.5, rollout_id=spec.id)
        now = time.time()
        status = initial(spec).model_copy(
            update={
                "phase": Phase.RAMPING, "weight": 0.5, "max_weight": 0.5, "stable": stable,
                "step_since": now, "next_look_at": now, "last_canary_at": now - silent_s,
            }
        )  # fmt: skip
        self.rollouts.create(spec, status)
        return split

    def ask(self, route: str, threads: int = 1) -> None:
        """Keep asking, each request a conversation of its own; refusals and failures are the point."""

        def forever() -> None:
            client, n = openai_client(self.router), 0
            while not self._ended.wait(0.05):
                n += 1
                text = f"{threading.get_ident()} {n}"
                with suppress(APIError):
                    client.chat.completions.create(model=route, messages=[{"role": "user", "content": text}])

        for _ in range(threads):
            self._threads.append(threading.Thread(target=forever, daemon=True))
            self._threads[-1].start()

    def miscount(self, split: Split) -> None:
        """Evidence of a router that sends the canary four requests of five instead of one of two."""
        entries = [
            LedgerEntry(
                replica="miscounting", seq=seq, route=split.route, rollout_id=split.rollout_id, arm=arm,
                split_version=split.version, at=time.time(), counts=ArmCounts(n=n, errors=0),
            )
            for seq, (arm, n) in enumerate((("stable", 400), ("canary", 1_600)), start=1)
        ]  # fmt: skip
        self._world.state.append_ledger(entries)

    def close(self) -> None:
        """Stop asking, and the controller."""
        self._ended.set()
        for thread in self._threads:
            thread.join(90)
        self._controller.terminate()
        self._controller.wait(60)


@pytest.fixture
def trouble(world: World) -> Iterator[Trouble]:
    made = Trouble(world)
    yield made
    made.close()


@pytest.fixture
def monitoring(trouble: Trouble, tmp_path: Path) -> Iterator[Monitoring]:
    folder = tmp_path / "monitoring"
    folder.mkdir()
    made = Monitoring(folder, trouble.router.url.removeprefix("http://"), FACTOR)
    yield made
    made.close()


def test_what_goes_wrong_reaches_the_webhook(trouble: Trouble, monitoring: Monitoring) -> None:
    """A dead upstream, a route that turns requests away, a canary without traffic, one that does not get its
    share, and one that fails and is rolled back: five notifications with the right labels and a runbook."""
    trouble.route("alert-dead", trouble.nobody())
    trouble.ask("alert-dead")
    trouble.route("alert-full", trouble.upstream("slow", trouble.slow.url))
    trouble.limit("alert-full")
    trouble.ask("alert-full", threads=6)
    well = trouble.upstream("student", trouble.well.url)
    trouble.rollout("alert-silent", well, silent_s=2_000.0, deadline_s=3_600.0)
    skewed = trouble.rollout("alert-skewed", well, silent_s=0.0, deadline_s=3_600.0)
    trouble.miscount(skewed)
    trouble.rollout("alert-harmful", trouble.nobody(), silent_s=0.0, deadline_s=3_600.0)
    began = 'stillhouse_rollout_decisions_total{route="alert-harmful",decision="rolled_back"}'
    wait_until("Prometheus saw the rollout before its end", lambda: monitoring.value(began) == 0.0, LIMIT_S)
    trouble.ask("alert-harmful", threads=2)

    wait = monitoring.receiver.wait
    told = [
        wait(
            "StillhouseErrorBudgetBurnFast",
            route="alert-dead", arm="stable", slo="errors", severity="critical",
        ),
        wait("StillhouseBackPressure", route="alert-full", severity="warning"),
        wait("StillhouseRolloutNoData", route="alert-silent", severity="warning"),
        wait("StillhouseSampleRatioMismatch", route="alert-skewed", severity="critical"),
        wait("StillhouseRolledBack", route="alert-harmful", decision="rolled_back", severity="info"),
    ]  # fmt: skip
    for alert in told:
        notes = alert["annotations"]
        assert alert["labels"].get("route", "") in notes["summary"]
        assert (ROOT / notes["runbook_url"]).is_file()
    assert monitoring.broken_rules() == []
    assert trouble.rollouts.get("alert-harmful-1").status.decision == "rolled_back"
