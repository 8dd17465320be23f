"""Bounds on what a client may send: depth of JSON, size of a head, time for a body."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.router.config import RouterConfig
from serve.router.errors import RequestRefused
from serve.router.intake import Intake, _parse
from serve.router.keys import KeyTable
from serve.router.metrics import Metrics
from serve.router.table import RouteTable

JSON = st.recursive(
    st.none() | st.booleans() | st.text('[]{}"\\ab'),
    lambda c: st.lists(c) | st.dictionaries(st.text("[{"), c),
)


def intake(**config: Any) -> Intake:
    metrics = Metrics()
    return Intake(
        RouterConfig(state_url="sqlite://", **config), RouteTable(metrics), KeyTable(False, metrics)
    )


def depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(JSON, st.integers(1, 8))
def test_depth_is_what_is_bounded_and_nothing_else(inner: object, limit: int) -> None:
    """Brackets in strings, and many brackets side by side, are no depth; one level too many is refused."""
    body = {"x": inner, "wide": [[]] * 20}
    if depth(body) <= limit:
        assert _parse(json.dumps(body).encode(), limit) == body
    else:
        with pytest.raises(RequestRefused, match=f"more than {limit} levels"):
            _parse(json.dumps(body).encode(), limit)


def test_a_large_head_is_refused_where_somebody_else_listens_too() -> None:
    """The bound holds behind Ray Serve's server, which has none of its own."""
    scope = {"headers": [(b"x", b"y" * 900)], "query_string": b"z" * 200}
    with pytest.raises(RequestRefused) as refused:
        intake(max_header_bytes=1024).check_head(scope)
    assert refused.value.status == 431
    intake(max_header_bytes=2048).check_head(scope)


async def test_a_body_that_drips_has_one_deadline() -> None:
    """A client cannot keep a request open by sending a byte now and then."""

    async def drip() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(RequestRefused) as refused:
        async with asyncio.timeout(20):
            await intake(timeouts={"body_s": 0.1}).read_body({}, drip)
    assert refused.value.status == 408
