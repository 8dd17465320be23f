"""preStop of a pod that is a Ray node: `python -m serve.stack.leave` has Serve move its replicas away first.

The node is drained (`ray drain-node`), upon which Serve starts each replica elsewhere and then ends the one
here, streams and all; this waits until no replica is left, or the time is over. Without a place elsewhere
nothing moves and Kubernetes ends the pod after its grace period. Knows nothing about Kubernetes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import psutil

REPLICA = "ray::ServeReplica:"
"""How Ray titles the process of a replica."""
_DRAIN_S = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Drain and wait; 0 when no replica is left, 1 when the time was over first."""
    parser = argparse.ArgumentParser(prog="python -m serve.stack.leave", description=__doc__)
    parser.add_argument("--timeout-s", type=int, default=120, help="shorter than the pod's grace period")
    args = parser.parse_args(argv)
    if args.timeout_s < 1:
        parser.error("--timeout-s must be at least 1")
    if not drain(args.timeout_s):
        return 1
    return 0 if wait_gone(args.timeout_s) else 1


def drain(timeout_s: int) -> bool:
    """Ask Ray to drain this node; False when Ray refuses or does not answer (it may be gone already)."""
    ray = shutil.which("ray") or str(sys.executable).replace("python", "ray")
    command = [ray, "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "its pod ends", "--deadline-remaining-seconds", str(timeout_s)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DRAIN_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        print(f"this node was not drained: {err}", file=sys.stderr)
        return False
    if done.returncode:
        print(f"this node was not drained: {done.stderr.strip()[-500:]}", file=sys.stderr)
    return done.returncode == 0


def wait_gone(timeout_s: float, replicas: Callable[[], list[str]] | None = None) -> bool:
    """Until no replica runs on this machine; False when the time is over first."""
    deadline = time.monotonic() + timeout_s
    while left := (replicas or replicas_here)():
        if time.monotonic() > deadline:
            print(f"still here: {', '.join(left)}", file=sys.stderr)
            return False
        time.sleep(0.5)
    return True


def replicas_here() -> list[str]:
    """Titles of the Serve replicas of this machine (in a pod: of this pod)."""
    found = []
    for process in psutil.process_iter():
        try:
            title = " ".join(process.cmdline()).strip()
        except psutil.Error:  # it ended while we looked
            continue
        if title.startswith(REPLICA):
            found.append(title)
    return found


if __name__ == "__main__":
    sys.exit(main())
