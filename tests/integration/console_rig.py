"""A console to look at: a real admin process and controller over a real store, simulated routers, a browser.

The routers' traffic is drawn; everything that decides is shipped code. One Chromium serves all tests.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from contracts.metrics import ArmCounts, MetricKind, MetricSpec
from contracts.model import ModelRecord
from contracts.rollout import LedgerEntry, RolloutSpec, Step
from contracts.traffic import Split, Upstream
from serve.rollout.controller import Controller
from serve.rollout.decide import initial
from serve.rollout.deployer import FakeDeployer
from serve.rollout.policy import RolloutPolicy, make_spec
from serve.rollout.simulate import ArmModel, draw_counts
from serve.state.keys import KeyState, new_key
from serve.state.rollouts import RolloutState
from serve.state.tables import open_state
from serve.state.traffic import RouterReport, TrafficState
from tests.integration.held_port import held_port
from tests.integration.router_rig import Server, wait_until
from tests.unit.rollout_world import GOOD, STABLE, record

CHROMIUM = shutil.which("chromium")
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
TICK_S = 0.2
SLOW_MS = 30_000
expect.set_options(timeout=SLOW_MS)  # the default of 5 s is a bet on how busy the machine is
BIG = Upstream(name="big-teacher", model="big", url="http://127.0.0.1:9")


def slow_policy(**changes: object) -> RolloutPolicy:
    """A ramp whose second step is not left within any test."""
    values: dict[str, object] = {
        "steps": (
            Step(weight=0.05, min_dwell_s=1, evidence=0.0),
            Step(weight=0.2, min_dwell_s=3600),
            Step(weight=0.5),
        ),
        "metrics": (
            MetricSpec(kind=MetricKind.ERRORS, margin=0.03),
            MetricSpec(kind=MetricKind.QUALITY, margin=0.06, tolerance=0.03),
            MetricSpec(kind=MetricKind.TTFT, margin=0.10, thresholds_s=(0.1, 0.4)),
        ),
        "look_s": 0.5,
        "no_data_deadline_s": 600.0,
        "drain_timeout_s": 30.0,
    }
    return RolloutPolicy(**{**values, **changes})  # type: ignore[arg-type]


class ConsoleStack:
    """A state store with routes, two routers and a controller that tick in a thread, and an admin process."""

    def __init__(self, folder: Path) -> None:
        self.url_of_state = f"sqlite:///{folder}/state.db"
        self.engine = open_state(self.url_of_state)
        self.traffic, self.rollouts = TrafficState(self.engine), RolloutState(self.engine)
        self.key_id, self.key = self._admin_key()
        self.controller = Controller(self.engine, FakeDeployer(), holder="controller-1", lease_ttl_s=3.0)
        self.canary, self.per_s = GOOD, 120.0
        self._ticking = threading.Lock()
        self._stop = threading.Event()
        self._rng = np.random.default_rng(7)
        self._seq = 0
        self._config = folder / "router.json"
        self._config.write_text(f'{{"state_url": "{self.url_of_state}"}}')
        self._port = held_port()
        self.admin = self.start_admin()
        self._thread = threading.Thread(target=self._tick_until_stopped)
        self._thread.start()

    @property
    def console(self) -> str:
        """Where the page is."""
        return f"{self.admin.url}/console"

    def start_admin(self, *flags: str) -> Server:
        """The admin process, on the same port each time: a page that was open goes on."""
        return Server("-m", "serve.admin", "--config", str(self._config), "--port", str(self._port), *flags)

    def route(self, name: str, stable: Upstream = BIG, **changes: object) -> None:
        """A route."""
        self.traffic.put_split(Split(route=name, version=1, salt="x", stable=stable, **changes))  # type: ignore[arg-type]

    def start(
        self,
        route: str,
        policy: RolloutPolicy | None = None,
        model: ModelRecord | None = None,
        **changes: object,
    ) -> RolloutSpec:
        """Ask for a rollout."""
        spec = make_spec(policy or slow_policy(), route, model or record(), by="ann")
        spec = spec.model_copy(update=changes)
        self.rollouts.create(spec, initial(spec))
        return spec

    def paused(self) -> AbstractContextManager[object]:
        """Nothing ticks in this block, a tick that had begun included."""
        return self._ticking

    def close(self) -> None:
        """End the thread and the process."""
        self._stop.set()
        self._thread.join(20)
        self.admin.stop()
        self.engine.dispose()

    def _admin_key(self) -> tuple[str, str]:
        key, secret = new_key("browser", admin=True)
        KeyState(self.engine).create_key(key)
        return key.id, secret

    def _tick_until_stopped(self) -> None:
        while not self._stop.wait(TICK_S):
            with self._ticking:
                self._serve()
                self.controller.tick()

    def _serve(self) -> None:
        """A tick's worth of traffic, counted and reported as routers do."""
        splits = self.traffic.splits()
        for split in splits.values():
            if split.rollout_id is not None:
                n = int(self._rng.poisson(self.per_s * TICK_S))
                n_canary = int(self._rng.binomial(n, split.weight))
                self._count(split, "stable", STABLE, n - n_canary)
                self._count(split, "canary", self.canary, n_canary)
        versions = {name: split.version for name, split in splits.items()}
        for replica in ("router-a", "router-b"):
            busy = {"big-teacher": int(self._rng.integers(3, 9))}
            self.traffic.report_router(RouterReport(replica=replica, versions=versions, in_flight=busy))

    def _count(self, split: Split, arm: str, model: ArmModel, n: int) -> None:
        self._seq += 1
        counts = draw_counts(self._rng, model, n) if n else ArmCounts()
        entry = LedgerEntry(
            replica="router-a", seq=self._seq, route=split.route, rollout_id=split.rollout_id, arm=arm,
            split_version=split.version, at=time.time(), counts=counts,
        )  # fmt: skip
        self.traffic.append_ledger([entry])


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; skips without one, fails where STILLHOUSE_BROWSER=1 promises it."""
    if CHROMIUM is None:
        if os.environ.get("STILLHOUSE_BROWSER") == "1":
            pytest.fail("STILLHOUSE_BROWSER=1 promises a Chromium, but there is no 'chromium' on the path")
        pytest.skip("no 'chromium' on the path (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        yield browser
        browser.close()


class Watched:
    """A page, and everything it said and asked for."""

    def __init__(self, page: Page, stack: ConsoleStack) -> None:
        self.page, self._stack = page, stack
        self.said: list[str] = []
        self.asked: list[str] = []
        self.refusals_expected = False
        """True in tests in which the server is away or refuses; Chromium reports each such reply."""
        page.on("console", lambda m: self.said.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: self.said.append(f"error: {e}"))
        page.on("request", lambda r: self.asked.append(r.url))

    def open(self, path: str = "") -> Page:
        """The page, not logged in; `path` as in '#/history'."""
        self.page.goto(self._stack.console + path)
        return self.page

    def log_in(self, path: str = "") -> Page:
        """Through the form."""
        self.open(path)
        self.page.get_by_label("Admin key").fill(self._stack.key)
        self.page.get_by_role("button", name="Log in").click()
        self.page.get_by_role("navigation", name="Views").wait_for()
        return self.page

    def check(self) -> None:
        """Nothing was complained about, and nobody else was asked."""
        said = [s for s in self.said if not (self.refusals_expected and "Failed to load resource" in s)]
        assert said == []
        assert self.asked
        assert [u for u in self.asked if not u.startswith(f"{self._stack.admin.url}/")] == []
        assert [u for u in self.asked if self._stack.key in u] == []


def watch(browser: Browser, stack: ConsoleStack, width: int = 1280, **options: object) -> Watched:
    """A fresh page, which knows no key."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)  # type: ignore[arg-type]
    context.set_default_timeout(SLOW_MS)
    return Watched(context.new_page(), stack)


def ramping(stack: ConsoleStack, route: str, **changes: object) -> str:
    """A rollout on its second step, where it stays; its id."""
    stack.route(route)
    spec = stack.start(route, **changes)
    wait_until("it ramps", lambda: stack.rollouts.get(spec.id).status.step == 1)
    return spec.id


def phase(page: Page) -> Locator:
    """The chip in the rollout's heading."""
    return page.locator(".hero .chip")


def active(page: Page) -> str:
    """What has the focus, in words."""
    return str(page.evaluate("(document.activeElement.id || document.activeElement.textContent).trim()"))


def tab_to(page: Page, name: str) -> None:
    """Press Tab until it is there, as somebody without a mouse."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if active(page) == name:
            return
    raise AssertionError(f"Tab never reached {name!r}")


def commands(stack: ConsoleStack, rollout_id: str) -> list[str]:
    """What the audit trail says was asked, and what is still waiting."""
    waiting = [c.verb for c in stack.rollouts.pending_commands(rollout_id)]
    trail = stack.rollouts.audit(rollout_id)
    done = [c["verb"] for e in trail for c in e.body.get("observation", {}).get("commands", [])]
    return done + waiting
