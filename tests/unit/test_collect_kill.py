"""collect killed at any line: what is run again finishes with the same bytes; Ray Data's executor writes
them too, with a node lost on the way.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from distill_jobs.collect import run
from distill_jobs.collecting import parts
from distill_jobs.collecting.window import pin_window
from distill_jobs.config import CollectConfig
from distill_jobs.progress import Progress
from distill_jobs.stage import Result
from tests.integration.pipeline_world import log_row
from tests.integration.router_rig import wait_until
from tests.unit.test_collect import chat
from tests.unit.test_collect_near import texts

PARTITION_BYTES = 40_000
SETTINGS: dict[str, Any] = {
    "min_rows": 1,
    "validation": 0.2,
    "calibration": 0.2,
    "prune": {"min_chars": 5},
    "balance": {"classes": "json:kind", "by": "repeat"},
    "difficulty": {"bins": 3},
}

KILLED = """
import os, signal, sys
from tests.unit import test_collect_kill as test
left, real = int(sys.argv[2]), os.replace

def replace(*names):
    # Every file of collect's appears by a rename: before one is the worst moment to die.
    global left
    if not str(names[1]).endswith("progress.json"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    real(*names)

os.replace = replace
test.parts.PARTITION_BYTES = test.PARTITION_BYTES
test.collected(test.Path(sys.argv[1]))
"""


def log(folder: Path) -> None:
    """Three segments of near-duplicates, and feedback."""
    folder.mkdir()
    for segment in range(3):
        rows = [
            json.dumps(
                log_row(n, chat(f"hello there, {t}"), response_text=json.dumps({"kind": "ab"[n % 7 == 0]}))
            )
            for n, t in enumerate(texts(120, seed=segment))
        ]
        (folder / f"requests-{segment}.jsonl").write_text("\n".join(rows) + "\n")


def collected(work: Path, executor: Any = "local", ray: str = "local") -> Result:
    """Collect work/logs, going on with what is there."""
    config = CollectConfig(log_dir=work / "logs", executor=executor, **SETTINGS)
    folder = work / "collect"
    folder.mkdir(exist_ok=True)
    window = pin_window(config.log_dir, work / "window.json")
    return run(config, window, [], folder, Progress(work / "progress.json"), ray)


def told(result: Result) -> Any:
    """What must not depend on kills or the executor."""
    return {n: (o.digest, o.rows) for n, o in result.outputs.items()}, result.counts, result.notes


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL before the n-th file appears, in every step, on one workdir: digests, counts and notes are
    those of a run that nobody killed, and nothing half-written or temporary stays.
    """
    monkeypatch.setattr(parts, "PARTITION_BYTES", PARTITION_BYTES)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        log(tmp_path / name / "logs")
    wanted = told(collected(tmp_path / "whole"))
    for after in (5, 45, 40, 45):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(after)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert told(collected(tmp_path / "killed")) == wanted
    assert told(collected(tmp_path / "killed")) == wanted
    kept = {p.name for p in (tmp_path / "killed" / "collect").iterdir()}
    assert kept == {p.name for p in (tmp_path / "whole" / "collect").iterdir()}
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.integration
def test_ray_data_writes_the_same_bytes_after_the_loss_of_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor changes where the work is done, never its result; nor does one of two nodes that is killed
    half way and stays away.
    """
    monkeypatch.setattr(parts, "PARTITION_BYTES", PARTITION_BYTES)
    for name in ("local", "ray"):
        (tmp_path / name).mkdir()
        log(tmp_path / name / "logs")
    wanted = told(collected(tmp_path / "local"))
    files = len(list((tmp_path / "local" / "collect").rglob("*")))
    with two_nodes() as lose:
        watch = threading.Thread(target=lose, args=(tmp_path / "ray" / "collect", files // 3))
        watch.start()
        found = told(collected(tmp_path / "ray", "ray"))
        watch.join(timeout=150)
        wait_until("Ray knows of the loss", lambda: [n["Alive"] for n in ray.nodes()].count(True) == 1)
    assert found == wanted
    assert found[0]["train"][1] > 100


@contextmanager
def two_nodes() -> Iterator[Callable[[Path, int], None]]:
    """A cluster of two nodes that this process is connected to, and what kills the second one when a folder
    holds so many files."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)

    def lose(folder: Path, files: int) -> None:
        end = time.monotonic() + 120
        while len(list(folder.rglob("*"))) < files and time.monotonic() < end:
            time.sleep(0.01)
        cluster.remove_node(second, allow_graceful=False)

    try:
        yield lose
    finally:
        ray.shutdown()
        cluster.shutdown()
