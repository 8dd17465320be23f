"""Two Ray nodes on one machine: what runs where, a node lost under load, and a switch to a second cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from contracts.rollout import Phase
from serve.rollout.replay import replay
from serve.state.rollouts import StoredRollout
from tests.integration.cluster_rig import NODE, ClusterStack, Load, steady
from tests.integration.stack_rig import marked_processes, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.whole, pytest.mark.timeout(1500)]

APP, STUDENT = "upstream-teacher", "tiny-v1"
BOTH = [False, True]
"""One replica on the first node, one on the second."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterStack]:
    """A cluster of two nodes in which a rollout of one student runs, with traffic at its first step."""
    live = ClusterStack(tmp_path_factory.mktemp("cluster"))
    try:
        live.up()
        live.cli("rollout", "start", "support", live.publish_student())
        yield live
    finally:
        live.down()


def evidence(stored: StoredRollout) -> tuple[int, int]:
    """Requests that were counted for the stable arm and the canary since the rollout began."""
    counts = stored.status.total_counts
    return tuple(counts[arm].n if arm in counts else 0 for arm in ("stable", "canary"))  # type: ignore[return-value]


def grows(cluster: ClusterStack, load: Load) -> None:
    """Wait until requests are answered, ticks stored and evidence counted for both arms, beyond now."""
    before, answered = cluster.last_rollout(), load.answered

    def more() -> bool:
        now = cluster.last_rollout()
        counted = zip(evidence(now), evidence(before), strict=True)
        return now.status.ticks > before.status.ticks and all(new > old for new, old in counted)

    wait_until("evidence of both arms grows", more, 300)
    wait_until("requests are answered", lambda: load.answered > answered + 20, 300)


def test_routers_engines_and_training_are_placed_by_resources(cluster: ClusterStack) -> None:
    """Each pair of replicas has one on either node, and what only one node has decides for it: the
    controller runs on the first, a task of training on the second. `status` tells of the node."""
    wait_until("both routers report", lambda: cluster.routers_on_nodes() == BOTH, 120)
    wait_until("the teacher is on both", lambda: cluster.engines_on_nodes(APP) == BOTH, 120)
    wait_until("the student is on both", lambda: cluster.engines_on_nodes(STUDENT) == BOTH, 300)
    assert not cluster.on_node(cluster.replica_pid("stillhouse-controller"))
    assert cluster.on_node(cluster.where({"train": 1}))
    shown = " ".join(cluster.cli("status").stdout.split())
    assert f"node {NODE}: up, pid {cluster.node.pid}, started" in shown
    assert "train 1" in shown


def test_a_node_lost_under_load_costs_no_request_and_no_rollout(cluster: ClusterStack) -> None:
    """SIGKILL of the second node's whole process tree under load: a client that retries nothing sees no
    failure, the rollout goes on with its evidence, and the node and its replicas come back."""
    wait_until("ramping", lambda: cluster.last_rollout().status.phase is Phase.RAMPING, 300)
    lost = cluster.node
    with steady(cluster) as seen:
        grows(cluster, seen)
        assert cluster.kill_node() > 10
        grows(cluster, seen)
        wait_until("the node joins again", lambda: cluster.node.pid != lost.pid and cluster.node.alive, 120)
        wait_until("two routers again", lambda: cluster.routers_on_nodes() == BOTH, 300)
        wait_until("two teachers again", lambda: cluster.engines_on_nodes(APP) == BOTH, 300)
        wait_until("two students again", lambda: cluster.engines_on_nodes(STUDENT) == BOTH, 300)
        grows(cluster, seen)
    assert seen.failed == []
    assert cluster.node.starts > lost.starts
    assert cluster.last_rollout().status.phase is Phase.RAMPING


def test_a_switch_to_a_second_cluster_loses_nothing(
    cluster: ClusterStack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As KubeRay does it: a second cluster with the same configuration and stores comes up beside the first,
    gets the traffic, and the first is ended. The student comes back by itself before that, one controller
    leads at any time, split, rollout and evidence are what they were and grow on, and no request fails."""
    before, split = cluster.last_rollout(), cluster.traffic.get_split("support")
    second = ClusterStack(tmp_path_factory.mktemp("second"), beside=cluster)
    first_id = cluster.record.stack_id
    try:
        with steady(cluster) as seen:
            second.up()
            assert second.engines_on_nodes(STUDENT) == BOTH
            assert cluster.engines_on_nodes(STUDENT) == BOTH
            grows(cluster, seen)
            seen.url = f"{second.url}/v1"
            grows(second, seen)
            cluster.down()
            assert marked_processes(first_id) == []
            grows(second, seen)
    finally:  # only now: clients would see it
        second.down()
    after = second.last_rollout()
    assert seen.failed == []
    assert second.traffic.get_split("support") == split
    assert (after.spec, after.status.phase) == (before.spec, Phase.RAMPING)
    trail = second.rollouts.audit(after.spec.id)
    assert replay(after, trail).exact, replay(after, trail).sentence()
