"""The control plane's Prometheus metrics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from contracts.rollout import Phase
from serve.rollout.controller import Controller
from serve.rollout.metrics import DECISIONS, ControllerMetrics
from tests.unit.rollout_world import World


def test_gauges_follow_the_stored_rollout(tmp_path: Path) -> None:
    """Phase, weight, e-values and samples equal the status; each decision is counted once."""
    world, registry = World(tmp_path), CollectorRegistry()
    world.controller = Controller(
        world.engine,
        world.deployer,
        holder="one",
        clock=lambda: world.now,
        metrics=ControllerMetrics(registry),
    )

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"stillhouse_rollout_{name}", {"route": "support", **labels})

    world.until(Phase.RAMPING)
    for _ in range(9):
        world.step()
    status = world.status
    assert value("phase", phase=status.phase.value) == 1.0
    assert sum(value("phase", phase=p.value) or 0.0 for p in Phase) == 1.0
    assert value("weight") == status.weight
    assert value("step") == status.step + 1
    assert value("samples", arm="stable") == status.total_counts["stable"].n
    for metric in status.metrics:
        assert value("log_evalue", metric=metric.kind.value, test="harm") == metric.log_harm
        assert value("log_evalue", metric=metric.kind.value, test="noninferior") == metric.log_noninferior
    world.until(Phase.PROMOTED)
    assert value("decisions_total", decision="step") == 5.0
    assert value("decisions_total", decision="promoted") == 1.0
    assert value("weight") == 0.0
    assert value("log_threshold", test="noninferior") == pytest.approx(2.9957, abs=1e-4)


def test_what_alerts_need_is_exported(tmp_path: Path) -> None:
    """Since when a phase is, when the canary was last heard of and its deadline, no mismatch so far; every
    decision starts at zero, so that the first one is an increase. A new process says all of it again."""
    world = World(tmp_path)
    for holder in ("one", "two"):
        registry = CollectorRegistry()
        world.controller = Controller(
            world.engine,
            world.deployer,
            holder=holder,
            clock=lambda: world.now,
            metrics=ControllerMetrics(registry),
            lease_ttl_s=0.0,
        )
        world.until(Phase.RAMPING)
        world.step()
        status, spec = world.status, world.stored.spec
        names = {
            "phase_since_timestamp_seconds": status.phase_since,
            "canary_seen_timestamp_seconds": status.last_canary_at,
            "no_data_deadline_seconds": spec.no_data_deadline_s,
            "sample_ratio_mismatch": 0.0,
        }
        for name, wanted in names.items():
            assert registry.get_sample_value(f"stillhouse_rollout_{name}", {"route": "support"}) == wanted
        assert registry.get_sample_value("stillhouse_rollout_phase", {"route": "support", "phase": "ramping"})
        for decision in set(DECISIONS) - {"step"}:
            labels = {"route": "support", "decision": decision}
            assert registry.get_sample_value("stillhouse_rollout_decisions_total", labels) == 0.0


def test_metrics_work_in_multiprocess_mode(tmp_path: Path) -> None:
    """With PROMETHEUS_MULTIPROC_DIR the controller's values are readable by another process's scrape."""
    script = (
        "from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess\n"
        "from serve.rollout.metrics import ControllerMetrics\n"
        "m = ControllerMetrics()\n"
        "m.weight.labels('support').set(0.05); m.leader.set(1)\n"
        "r = CollectorRegistry(); multiprocess.MultiProcessCollector(r)\n"
        "print(generate_latest(r).decode())\n"
    )
    env = {
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
        "PATH": "",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert 'stillhouse_rollout_weight{route="support"} 0.05' in done.stdout
    assert "stillhouse_rollout_controller_leader 1.0" in done.stdout
