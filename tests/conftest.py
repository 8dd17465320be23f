"""Fixtures shared by all tests, and the order in which the expensive ones run.

The stack (Ray, vLLM, router, controller) is started once a session, by the first test that asks for it; tests
that use it run together and after the others, and before the demo, which brings a stack of its own.
"""

from __future__ import annotations

import atexit
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from tests.integration.postgres import Postgres


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cheap tests first, then those that share the stack, then the demo."""
    items.sort(key=_cost)


def pytest_configure() -> None:
    """Let pytest's summary be the last word.

    Native libraries (triton's nanobind) print hundreds of lines about references when the interpreter ends.
    Everything printed before that, and the exit code, are untouched.
    """
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))


def _cost(item: pytest.Item) -> tuple[int, str]:
    if item.get_closest_marker("e2e"):
        return 2, ""
    if "stack" in getattr(item, "fixturenames", ()):
        return 1, item.path.name  # the last file by name takes the stack down
    return 0, ""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whatever ran before it in its process."""
    random.seed(0)
    for name, seed in (("numpy.random", "seed"), ("torch", "manual_seed")):
        if module := sys.modules.get(name):
            getattr(module, seed)(0)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A running stack with a tiny random teacher; see tests/integration/stack_rig.py."""
    from tests.integration.stack_rig import LiveStack

    live = LiveStack(tmp_path_factory.mktemp("stack"))
    try:
        live.up()
        yield live
    finally:
        live.down()


@pytest.fixture(scope="session")
def prometheus() -> Path:
    """A real Prometheus server's program."""
    from tests.tools import debian_binary

    return debian_binary("prometheus", "prometheus")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL server; see tests/integration/postgres.py."""
    from tests.integration.postgres import Postgres

    server = Postgres()
    yield server
    server.close()


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """URL of an empty PostgreSQL database of this test's own."""
    return postgres.new_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def state_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty state store, on every database that may hold one."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/deep/er/state.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def engine(state_url: str) -> Iterator[Engine]:
    """An empty state store, on every database that may hold one."""
    from serve.state.tables import open_state

    opened = open_state(state_url)
    yield opened
    opened.dispose()
