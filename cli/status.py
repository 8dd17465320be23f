"""`stillhouse status`: routes, upstreams, rollouts and distillation jobs on one screen, or as JSON.

Reads the state store, `stack.json` and the jobs' progress files; asks no engine and no Ray. Knows nothing
about how any of it came to be.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from contracts.rollout import PHASE_SENTENCES
from contracts.traffic import Split, Upstream
from serve.config import ServeConfig, load_serve_config
from serve.stack.record import read_record
from serve.state.rollouts import RolloutState
from serve.state.tables import open_state
from serve.state.traffic import TrafficState

FRESH_S = 15.0
COLOURS = {"ready": "green", "down": "dim", "crashed": "red", "failed": "red"}


def show(config_path: str | None, json_out: bool) -> None:
    """Print where the stack stands."""
    facts = collect(load_serve_config(config_path))
    if json_out:
        typer.echo(json.dumps(facts, indent=2))
        return
    _print(facts)


def collect(config: ServeConfig) -> dict[str, Any]:
    """Everything there is to say, as plain data."""
    engine = open_state(config.state_url)
    traffic, rollouts = TrafficState(engine), RolloutState(engine)
    endpoints = traffic.endpoints(FRESH_S)
    splits = traffic.splits()
    named = {u.name: u for u in config.upstream_nouns()}
    for split in splits.values():
        named |= {u.name: u for u in split.upstreams}
    return {
        "stack": _stack(config),
        "routes": {route: _route(split) for route, split in sorted(splits.items())},
        "upstreams": {
            name: {"at": _place(up), "model": up.model, "replicas": _replicas(up, endpoints)}
            for name, up in sorted(named.items())
        },
        "routers": [r.model_dump(mode="json") for r in traffic.routers(FRESH_S)],
        "rollouts": [
            {
                "id": r.spec.id,
                "route": r.spec.route,
                "model": r.spec.model_ref,
                "phase": r.status.phase.value,
                "means": PHASE_SENTENCES[r.status.phase],
                "weight": r.status.weight,
                "reason": r.status.reason,
            }
            for r in rollouts.active() or rollouts.history()[-1:]
        ],
        "distillation": _distillation(config),
    }


def _place(upstream: Upstream) -> str:
    cascade = upstream.cascade
    if cascade is not None:
        return (
            f"cascade {cascade.first.name} → {cascade.then.name} ({cascade.signal} ≥ {cascade.threshold:g})"
        )
    return upstream.url or f"app {upstream.app}"


def _stack(config: ServeConfig) -> dict[str, Any]:
    record = read_record(config)
    if record is None:
        return {"phase": "down", "run_dir": str(config.run_dir)}
    phase = record.phase if record.supervised or record.phase == "failed" else "crashed"
    up_s = time.time() - record.started_at
    return {
        "phase": phase,
        "url": f"{record.url}/v1",
        "pid": record.pid,
        "seconds": round(up_s),
        "detail": record.detail,
        "run_dir": str(config.run_dir),
        "ray_address": record.ray_address,
        "nodes": [{**node.model_dump(), "alive": node.alive} for node in record.nodes],
    }


def _route(split: Split) -> dict[str, Any]:
    return {
        "version": split.version,
        "stable": split.stable.name,
        "canary": split.canary.name if split.canary else None,
        "weight": split.weight,
        "rollout": split.rollout_id,
        "others": [
            {"canary": s.upstream.name, "weight": s.weight, "rollout": s.rollout_id} for s in split.others
        ],
    }


def _replicas(upstream: Upstream, endpoints: dict[str, Any]) -> list[dict[str, Any]]:
    found = [e for part in upstream.parts for e in endpoints.get(part.app or "", [])]
    return [{"url": e.url, "pid": e.pid, "seen_at": e.seen_at} for e in found]


def _distillation(config: ServeConfig) -> list[dict[str, Any]]:
    """Progress of jobs whose work folder lies in this stack's run folder, the latest first."""
    found = []
    for file in sorted(config.run_dir.glob("*/progress.json"), key=lambda f: -f.stat().st_mtime):
        try:
            found.append({"workdir": str(file.parent), **json.loads(file.read_text())})
        except (OSError, ValueError):  # being replaced, or not a job's
            continue
    return found


def _print(facts: dict[str, Any]) -> None:
    console = Console(highlight=False)
    stack = facts["stack"]
    colour = COLOURS.get(stack["phase"], "yellow")
    console.print(
        f"[{colour}]{stack['phase']}[/] {stack.get('url', '')} in {stack['run_dir']}", soft_wrap=True
    )
    if stack["phase"] in ("crashed", "failed"):
        console.print(stack["detail"], markup=False)
        console.print("'stillhouse down' cleans up, 'stillhouse up' starts again.")
    for node in stack.get("nodes", ()):
        state = "[green]up[/]" if node["alive"] else "[red]down[/]"
        has = ", ".join(f"{name} {amount:g}" for name, amount in node["resources"].items()) or "no resources"
        times = "1 time" if node["starts"] == 1 else f"{node['starts']} times"
        console.print(
            f"node {node['name']}: {state}, pid {node['pid']}, started {times}; {has}", soft_wrap=True
        )
    routes = Table("route", "split", "stable", "canary", "weight")
    for name, r in facts["routes"].items():
        weight = f"{100 * r['weight']:g} %" if r["canary"] else ""
        routes.add_row(name, f"v{r['version']}", r["stable"], r["canary"] or "-", weight)
    upstreams = Table("upstream", "at", "model", "replicas")
    for name, u in facts["upstreams"].items():
        none = "-" if u["at"].startswith("http") else "none"
        upstreams.add_row(name, u["at"], u["model"], ", ".join(e["url"] for e in u["replicas"]) or none)
    console.print(routes, upstreams)
    for r in facts["rollouts"]:
        why = r["reason"] or r["means"]
        console.print(f"rollout {r['id']} of {r['model']}: [bold]{r['phase']}[/], {why}")
    for job in facts["distillation"][:3]:
        name = Path(job["workdir"]).name
        console.print(f"distillation {name}: {job.get('stage')} {job.get('state')} {job.get('note', '')}")
    if not facts["routes"]:
        console.print("No routes yet; 'stillhouse up' makes those of the configuration.")
