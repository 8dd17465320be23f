"""Places, queue and priorities of a route; retries as a share of requests."""

from __future__ import annotations

import asyncio

import pytest

from contracts.routes import Priority, RouteLimits
from serve.router.errors import RequestRefused
from serve.router.limits import Limiter, RetryBudget


def limiter(places: int, queued: int = 10, queue_s: float = 10.0) -> Limiter:
    return Limiter("support", RouteLimits(max_in_flight=places, max_queued=queued, queue_s=queue_s))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_places_are_given_in_order_of_priority_then_arrival() -> None:
    """The queue serves high before normal before low, first come first served within each."""
    gate, order = limiter(1), []
    await gate.enter()

    async def one(name: str, priority: Priority) -> None:
        await gate.enter(priority)
        order.append(name)
        gate.leave(0.01)

    tasks = [
        asyncio.create_task(one(n, p))
        for n, p in (
            ("low", Priority.LOW),
            ("first", Priority.NORMAL),
            ("second", Priority.NORMAL),
            ("high", Priority.HIGH),
        )
    ]
    await settle()
    assert gate.waiting == 4
    gate.leave(0.01)
    await asyncio.gather(*tasks)
    assert order == ["high", "first", "second", "low"]
    assert (gate.running, gate.waiting) == (0, 0)


async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    """429 with Retry-After, naming the route."""
    gate = limiter(1, queued=0)
    await gate.enter()
    with pytest.raises(RequestRefused, match="Route 'support' is at its limit of 1") as refused:
        await gate.enter()
    assert refused.value.status == 429
    assert refused.value.headers == ((b"retry-after", b"1"),)
    assert refused.value.route == "support"


async def test_a_better_priority_takes_the_last_ones_place_in_a_full_queue() -> None:
    """Of a full queue the newest of the worst priority is turned away."""
    gate = limiter(1, queued=1)
    await gate.enter()
    low = asyncio.create_task(gate.enter(Priority.LOW))
    await settle()
    high = asyncio.create_task(gate.enter(Priority.HIGH))
    await settle()
    with pytest.raises(RequestRefused, match="higher priority"):
        await low
    gate.leave(0.1)
    await high
    assert (gate.running, gate.waiting) == (1, 0)


async def test_waiting_ends_after_its_time() -> None:
    """Nobody waits longer than queue_s."""
    gate = limiter(1, queue_s=0.01)
    await gate.enter()
    with pytest.raises(RequestRefused, match="no place became free"):
        await gate.enter()
    assert gate.waiting == 0


async def test_a_client_that_leaves_frees_its_place_in_the_queue_and_the_one_just_given() -> None:
    """Cancelled while waiting, or in the very turn that hands the place over: no place is ever lost."""
    gate = limiter(1)
    await gate.enter()
    waiting = asyncio.create_task(gate.enter())
    await settle()
    waiting.cancel()
    await settle()
    assert gate.waiting == 0
    chosen = asyncio.create_task(gate.enter())
    await settle()
    gate.leave(0.1)  # hands the place to `chosen` ...
    chosen.cancel()  # ... which leaves before it runs
    await settle()
    assert chosen.cancelled()
    assert (gate.running, gate.waiting) == (0, 0)
    await gate.enter()
    assert gate.running == 1


async def test_changed_limits_let_the_waiting_in_at_once() -> None:
    """More places are handed out when the settings change, not at the next leave."""
    gate = limiter(1)
    await gate.enter()
    waiting = [asyncio.create_task(gate.enter()) for _ in range(3)]
    await settle()
    gate.update(RouteLimits(max_in_flight=3))
    await settle()
    assert [t.done() for t in waiting] == [True, True, False]
    gate.update(RouteLimits())
    await asyncio.gather(*waiting)
    assert gate.running == 4


def test_retries_are_a_share_of_requests() -> None:
    """Ten at once, then one for every five requests."""
    budget = RetryBudget(0.2)
    assert sum(budget.spend() for _ in range(20)) == 10
    for _ in range(11):
        budget.earn()
    assert sum(budget.spend() for _ in range(20)) == 2
