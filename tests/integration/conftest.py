"""The world of the router's tests: real processes of router and fake engines, one state store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.router_rig import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A state store, a log folder, two fake engines and as many routers as the test starts."""
    made = World(tmp_path)
    yield made
    made.close()
