"""Worlds that several integration tests share: router and engine processes, a console and its browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.router_rig import World

if TYPE_CHECKING:  # only tests of the console need a browser's driver
    from playwright.sync_api import Browser

    from tests.integration.console_rig import ConsoleStack, Watched


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A state store, a log folder, two fake engines and as many routers as the test starts."""
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; of a module, because its driver's event loop keeps others out."""
    from tests.integration.console_rig import chromium

    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleStack]:
    """One admin process and controller for a module's tests; each has routes of its own."""
    from tests.integration.console_rig import ConsoleStack

    made = ConsoleStack(tmp_path_factory.mktemp("console"))
    yield made
    made.close()


@pytest.fixture
def own_console(tmp_path: Path) -> Iterator[ConsoleStack]:
    """A stack for a test that breaks it."""
    from tests.integration.console_rig import ConsoleStack

    made = ConsoleStack(tmp_path)
    yield made
    made.close()


@pytest.fixture
def watched(browser: Browser, console: ConsoleStack) -> Iterator[Watched]:
    """A page that must say nothing on its console and talk to its server only."""
    from tests.integration.console_rig import watch

    made = watch(browser, console)
    yield made
    made.check()
    made.page.context.close()
