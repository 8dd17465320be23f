"""Routers and rollouts on a real PostgreSQL: what SQLite's tests promise holds on the database of a fleet.

The state store's own tests (tests/unit/test_state_store.py and its neighbours) run on both databases already.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from contracts.rollout import Phase
from serve.rollout.replay import replay
from serve.state.feedback import FeedbackState
from serve.state.tables import open_state
from tests.integration.postgres import Postgres
from tests.integration.router_rig import Server, get, post, total, wait_until
from tests.integration.test_router_keys import CHAT, KeyWorld, ask
from tests.unit import rollout_world
from tests.unit.rollout_world import BROKEN, GOOD

pytestmark = pytest.mark.integration
FAST = {"flush_s": 0.1, "poll_s": 0.05}


@pytest.fixture
def world(tmp_path: Path, postgres_url: str) -> Iterator[KeyWorld]:
    """Two fake engines, keys on, and as many routers as the test starts, on an empty PostgreSQL database."""
    made = KeyWorld(tmp_path, postgres_url)
    yield made
    made.close()


def test_a_limit_of_requests_holds_over_two_routers(world: KeyWorld) -> None:
    """What one router admitted the other one counts; a key nobody made is refused by both."""
    routers = [world.router(**FAST) for _ in range(2)]
    _, secret = world.key("ci", requests_per_minute=20)
    left = 60 - time.time() % 60
    if left < 20:  # the sum of a minute is asserted, so it must not end in between
        time.sleep(left + 0.1)
    assert [ask(routers[0], secret) for _ in range(21)] == [200] * 20 + [429]

    def refused() -> bool:
        passed.append(ask(routers[1], secret))
        time.sleep(0.25)
        return passed[-1] == 429

    passed: list[int] = []
    wait_until("the other router refuses too", refused)
    assert passed.count(200) < 20  # its own requests alone would not have reached the limit
    assert [ask(r, secret[:-1] + "~") for r in routers] == [401, 401]


def test_a_split_is_live_on_both_routers(world: KeyWorld) -> None:
    """Both routers act on a new split and report its version."""
    routers = [world.router() for _ in range(2)]
    _, secret = world.key("ci")
    for version, weight in ((2, 1.0), (3, 0.0), (4, 1.0)):
        world.split(version, weight=weight)
        wanted = (str(version), "canary" if weight else "stable")

        def seen(router: Server) -> tuple[str, str]:
            body, key = {"model": "support", "messages": []}, f"Bearer {secret}"
            headers = post(f"{router.url}{CHAT}", body, Authorization=key)[2]
            return headers["x-stillhouse-split"], headers["x-stillhouse-arm"]

        for router in routers:
            wait_until("the split is live", lambda r=router, w=wanted: seen(r) == w)  # type: ignore[misc]
        wait_until(
            "both reported it",
            lambda v=version: [r.versions["support"] for r in world.state.routers(5)] == [v, v],  # type: ignore[misc]
        )


def test_feedback_is_one_judgement_whichever_router_takes_it(world: KeyWorld) -> None:
    """Text that is hard to store comes back as it was; a retry at the other router is the same judgement."""
    routers = [world.router(**FAST) for _ in range(2)]
    _, secret = world.key("ci")
    bearer = {"Authorization": f"Bearer {secret}"}
    body = {"model": "support", "messages": [{"role": "user", "content": "q"}]}
    request_id = post(f"{routers[0].url}{CHAT}", body, **bearer)[2]["x-request-id"]
    said = {"request_id": request_id, "good": False, "correction": "nul \u0000, 🔑, 'quote', \\ and ключ"}
    statuses = [post(f"{r.url}/v1/feedback", said, **bearer)[1]["status"] for r in [*routers, routers[0]]]
    assert statuses == ["created", "unchanged", "unchanged"]
    (found,) = FeedbackState(open_state(world.state_url)).feedback_on([request_id])
    assert (found.good, found.correction) == (False, said["correction"])


def test_every_count_arrives_once_though_the_database_restarts(world: KeyWorld, postgres: Postgres) -> None:
    """The database goes away under load and comes back: no request fails, and the ledger, the key's usage and
    the requests agree to the last one.
    """
    world.split(2, weight=0.5)
    routers = [world.router(**FAST) for _ in range(2)]
    key, secret = world.key("ci")
    with ThreadPoolExecutor(4) as pool:
        early = list(pool.map(lambda i: ask(routers[i % 2], secret, user=f"u{i}"), range(100)))
        postgres.stop()
        try:
            during = list(pool.map(lambda i: ask(routers[i % 2], secret, user=f"v{i}"), range(100)))
            wait_until("both routers noticed", lambda: all(_errors(r.url) > 0 for r in routers))
        finally:
            postgres.start()
        late = list(pool.map(lambda i: ask(routers[i % 2], secret, user=f"w{i}"), range(100)))
    assert early + during + late == [200] * 300
    wait_until("all evidence arrived", lambda: sum(c.n for c in world.evidence().values()) == 300)
    routers[0].stop()
    routers[1].kill()
    counted = world.evidence()
    assert sum(c.n for c in counted.values()) == 300
    assert {arm: c.errors for arm, c in counted.items()} == {"stable": 0, "canary": 0}
    assert min(c.n for c in counted.values()) > 90
    assert world.usage(key).requests == 300


def _errors(url: str) -> float:
    return total(get(f"{url}/metrics")[1], "stillhouse_state_errors_total")


@pytest.mark.parametrize(("canary", "end"), [(GOOD, Phase.PROMOTED), (BROKEN, Phase.ROLLED_BACK)])
def test_a_rollout_decides_the_same_on_both_databases(
    tmp_path: Path, postgres_url: str, canary: object, end: Phase
) -> None:
    """The whole trail of decisions is equal to SQLite's, and replays to the last bit."""
    trails = []
    for url in (None, postgres_url):
        world = rollout_world.World(tmp_path, state_url=url, canary=canary)
        assert world.until(Phase.PROMOTED).phase is end
        trail = world.rollouts.audit(world.spec.id)
        trails.append([(e.tick, e.kind, e.at, e.body["reason"], e.body["weight"]) for e in trail])
        again = replay(world.stored, trail)
        assert again.exact, again.mismatches
        assert again.final == world.status
        assert all(math.isfinite(m.log_noninferior) for m in world.status.metrics)
    assert trails[0] == trails[1]


def test_one_of_two_controllers_acts(tmp_path: Path, postgres_url: str) -> None:
    """The lease is the database's: the second controller waits, and takes over when the first lets go."""
    world = rollout_world.World(tmp_path, state_url=postgres_url)
    second = world.new_controller("two")
    assert world.controller.tick()
    assert not second.tick()
    world.rollouts.release_lease("rollout-controller", "one")
    assert second.tick()
    assert not world.controller.tick()
