"""A/B/n tests through a real router process: three students beside the stable arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from contracts.traffic import Slot, Upstream
from tests.integration.router_rig import Fake, Server, World, get, post, total, wait_until

ASKED = 120


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Engines and a state store."""
    made = World(tmp_path)
    yield made
    made.close()


def ask(router: Server, text: str) -> dict[str, str]:
    """The headers of an answer."""
    body = {"model": "support", "messages": [{"role": "user", "content": text}]}
    status, _, headers = post(f"{router.url}/v1/chat/completions", body)
    assert status == 200
    return headers


def asked(router: Server) -> Counter[tuple[str, str]]:
    """Ask as many conversations, always the same; (arm, model) → how many it got."""
    told = (ask(router, f"q{i}") for i in range(ASKED))
    return Counter((headers["x-stillhouse-arm"], headers["x-stillhouse-model"]) for headers in told)


def test_every_arm_is_counted_for_its_rollouts(world: World) -> None:
    """Each rollout's ledger has its own student's requests and every stable one; headers and rows agree."""
    engines = [Fake(text="two "), Fake(text="three ")]
    world.others += engines
    slots = tuple(
        Slot(
            upstream=Upstream(name=f"s{n}", model=f"small-{n}", url=engine.url),
            start=0.25 * n,
            weight=0.25,
            rollout_id=f"r{n + 1}",
        )
        for n, engine in enumerate(engines, 1)
    )
    world.split(1, 0.25, others=slots)
    router = world.router()
    seen = asked(router)
    names = [("canary", "small"), ("canary", "small-1"), ("canary", "small-2"), ("stable", "big")]
    assert sorted(seen) == names
    assert min(seen.values()) > 10

    def counted(rollout: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for entry in world.state.read_ledger("support", rollout, {}):
            found[entry.arm] += entry.counts.n
        return found

    def agrees(rollout: str, expected: dict[str, int]) -> bool:
        return counted(rollout) == expected

    stable = seen["stable", "big"]
    for rollout, model in (("r1", "small"), ("r2", "small-1"), ("r3", "small-2")):
        expected = {"canary": seen["canary", model], "stable": stable}
        wait_until(f"{rollout} has {expected}", partial(agrees, rollout, expected))
    text = get(f"{router.url}/metrics")[1]
    assert total(text, "stillhouse_requests_total", arm="canary", upstream="s2") == seen["canary", "small-2"]
    wait_until("all rows are written", lambda: len(world.rows()) == ASKED)
    rows = Counter((row["rollout_id"], row["model"]) for row in world.rows())
    assert rows == {
        ("r1", "small"): seen["canary", "small"],
        ("r2", "small-1"): seen["canary", "small-1"],
        ("r3", "small-2"): seen["canary", "small-2"],
        ("r1", "big"): stable,
    }
    world.split(2, 0.25, others=slots[1:])  # the second student is thrown back
    wait_until("the router follows", lambda: ask(router, "x")["x-stillhouse-split"] == "2")
    assert asked(router) == {
        ("canary", "small"): seen["canary", "small"],
        ("canary", "small-2"): seen["canary", "small-2"],
        ("stable", "big"): stable + seen["canary", "small-1"],
    }
