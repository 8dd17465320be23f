"""`stillhouse support-bundle`: what somebody who helps needs to see, in one file, without secrets or texts.

Four sieves, each enough for what it knows: fields that are not copied at all (texts of rollouts, parameters
of routes, digests of keys), secrets by name and by form (contracts.masking), the very values that the
environment holds under secret names, and of log lines that are not ours nothing but time, level, place and
kind of error. Knows nothing about how to help.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sqlalchemy import func, select

from cli.doctor.command import findings
from cli.doctor.finding import Patient
from cli.doctor.state import readable
from contracts.errors import ConfigError, ConflictError, StillhouseError
from contracts.masking import MASKED, is_secret, mask, masked
from contracts.rollout import RolloutSpec, RolloutStatus
from serve.config import ServeConfig, load_serve_config
from serve.stack.record import ray_environment, read_record
from serve.state.keys import KeyState
from serve.state.rollouts import RolloutState
from serve.state.settings import SettingsState
from serve.state.tables import metadata
from serve.state.traffic import TrafficState

LINES = 400
"""Last lines of every log file."""
_WAIT_S = 15.0
_SHORTEST = 6
"""A value below this many characters is no secret that could be told from other words."""
_TAIL_BYTES = 2**18
_TEXTS = frozenset(("prompt", "system", "template", "instructions", "messages", "content", "parameters"))
"""Fields of a configuration that hold words for or from people."""
_TIME = r"\d{4}-\d\d-\d\d[T ][\d:.,]+Z?|\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?"
_KEPT = re.compile(
    rf"(?:{_TIME})|\b(?:DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL)\b|\[[\w./-]+\.(?:py|cc|cpp|h):\d+\]"
    r"|[\w./-]+\.py\", line \d+|\b(?:[A-Z]\w*(?:Error|Exception|Interrupt|Killed|Exit))\b|\bTraceback\b"
)


def write(config_path: str | None, file: Path, limit_s: float) -> list[str]:
    """Write the bundle; returns the names of what is in it.

    Raises:
        ConflictError: there is a file of that name. ConfigError: it cannot be written.
    """
    if file.exists():
        raise ConflictError(f"{file} is there already; give another name.")
    try:
        config: ServeConfig | None = load_serve_config(config_path)
    except StillhouseError:  # the doctor's first finding says what is wrong with it
        config = None
    hide = _Hide(config)
    parts = {name: _attempt(part) for name, part in _parts(config_path, config, limit_s).items()}
    parts |= dict(_logs(config)) if config is not None else {}
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as out, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in parts.items():
                archive.writestr(name, hide(content))
        part.replace(file)
    except OSError as err:
        raise ConfigError(f"the bundle cannot be written to {file}: {err}.") from err
    finally:
        part.unlink(missing_ok=True)
    return sorted(parts)


def _parts(path: str | None, config: ServeConfig | None, limit_s: float) -> dict[str, Callable[[], Any]]:
    always: dict[str, Callable[[], Any]] = {
        "about.json": _about,
        "doctor.json": lambda: [one.model_dump(mode="json") for one in findings(path, limit_s)],
    }
    if config is None:
        return always
    return {
        **always,
        "config.json": lambda: _without_texts(config.model_dump(mode="json")),
        "state.json": lambda: _state(config),
        "metrics.txt": lambda: _metrics(config),
        "ray.txt": lambda: _ray(config),
    }


def _attempt(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as err:  # noqa: BLE001 - a part that cannot be had must not cost the others
        words = mask(str(err)) if isinstance(err, StillhouseError) else ""
        return {"missing": f"{type(err).__name__}: {words}"}


class _Hide:
    """The last sieve: masks by name and form, then the values that are known to be secret here."""

    def __init__(self, config: ServeConfig | None) -> None:
        named = {u.api_key_env for u in config.upstreams.values()} if config is not None else set()
        for policy in config.policies.values() if config is not None else ():
            named |= {v for hook in policy.hooks for v in (hook.url_env, hook.secret_env)}
        if config is not None and config.prometheus is not None:
            named.add(config.prometheus.bearer_token_env)
        found = {value for name, value in os.environ.items() if name in named or is_secret(name)}
        for url in () if config is None else (config.state_url, config.registry_uri):
            found.add(unquote(urlsplit(url).password or ""))
        found |= {json.dumps(value)[1:-1] for value in found}
        self._secrets = sorted((v for v in found if len(v) >= _SHORTEST), key=len, reverse=True)

    def __call__(self, content: Any) -> str:
        text = (
            mask(content) if isinstance(content, str) else json.dumps(masked(content), indent=2, default=str)
        )
        for secret in self._secrets:
            text = text.replace(secret, MASKED)
        return text


def _about() -> dict[str, Any]:
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {d.name: d.version for d in sorted(distributions(), key=lambda d: d.name.lower())},
        "not_in_it": "request log, texts, secrets, artifacts, messages of other programs' logs",
    }


def _without_texts(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _left_out(v) if k in _TEXTS and v else _without_texts(v) for k, v in data.items()}
    return [_without_texts(one) for one in data] if isinstance(data, list) else data


def _left_out(value: Any) -> str:
    return f"[{len(str(value))} characters left out]"


def _state(config: ServeConfig) -> dict[str, Any]:
    engine = readable(Patient(config, read_record(config)))
    if engine is None:
        return {"missing": "no state store of this release's schema"}
    traffic, rollouts = TrafficState(engine), RolloutState(engine)
    with engine.connect() as db:
        rows = {
            n: db.execute(select(func.count()).select_from(t)).scalar() for n, t in metadata.tables.items()
        }
    return {
        "rows": rows,
        "splits": [s.model_dump(mode="json") for s in traffic.splits().values()],
        "settings": [
            {**s.model_dump(mode="json", exclude={"parameters"}), "parameters": sorted(s.parameters)}
            for s in SettingsState(engine).settings().values()
        ],
        "routers": [r.model_dump(mode="json") for r in traffic.routers(3600.0)],
        "endpoints": [e.model_dump(mode="json") for app in traffic.endpoints().values() for e in app],
        "ledger_ends": traffic.ledger_ends(),
        "rollouts": [_rollout(r.spec, r.status) for r in rollouts.active() + rollouts.history()[-20:]],
        "keys": [
            k.model_dump(mode="json", exclude={"digest", "name"}) for k in KeyState(engine).keys().values()
        ],
    }


def _rollout(spec: RolloutSpec, status: RolloutStatus) -> dict[str, Any]:
    """Where it stands; reasons, graders, judges and hooks of people are left out."""
    return {
        "id": spec.id,
        "route": spec.route,
        "model_ref": spec.model_ref,
        "digest": spec.digest,
        "steps": [step.model_dump(mode="json") for step in spec.steps],
        **status.model_dump(
            mode="json",
            include={"phase", "step", "weight", "ticks", "paused", "total_counts", "cursor", "next_look_at"},
        ),
        "metrics": [
            {
                "kind": m.kind,
                "verdict": m.verdict,
                "log_harm": m.log_harm,
                "log_noninferior": m.log_noninferior,
            }
            for m in status.metrics
        ],
    }


def _metrics(config: ServeConfig) -> str:
    record = read_record(config)
    base = record.url if record is not None else f"http://{config.http.host}:{config.http.port}"
    with urllib.request.urlopen(f"{base}/metrics", timeout=_WAIT_S) as answer:
        return str(answer.read().decode("utf-8", "replace"))


def _ray(config: ServeConfig) -> str:
    record = read_record(config)
    if record is None or not record.supervised:
        return "no stack runs\n"
    command = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    environment = {**os.environ, **ray_environment(record)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_WAIT_S * 2, env=environment, check=False
    )
    return done.stdout[-20_000:]


def _logs(config: ServeConfig) -> Iterator[tuple[str, str]]:
    folders = (config.log_dir, config.ray_dir / "session_latest" / "logs")
    for folder, kept in zip(folders, ("logs", "logs/ray"), strict=True):
        for file in sorted((*folder.glob("*.log"), *folder.glob("*.err"), *folder.glob("serve/*.log"))):
            if lines := _tail(file):
                yield f"{kept}/{file.name}", "".join(f"{safe_line(line)}\n" for line in lines)


def _tail(file: Path) -> list[str]:
    try:
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            return log.read().decode("utf-8", "replace").splitlines()[-LINES:]
    except OSError:
        return []


def safe_line(line: str) -> str:
    """A log line without words of users: ours whole (they have none), of others only what is safe."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if isinstance(found, dict) and {"ts", "level", "process", "logger", "message"} <= set(found):
        return json.dumps(masked(found), ensure_ascii=False)
    kept = " ".join(match.group() for match in _KEPT.finditer(line))
    return f"{kept} {_left_out(line)}".strip()


def run(config_path: str | None, file: Path, limit_s: float) -> None:
    """Write it and say what to do with it."""
    import typer

    began = time.monotonic()
    names = write(config_path, file, limit_s)
    typer.echo(f"{file}: {len(names)} files in {time.monotonic() - began:.0f} s: {', '.join(names)}")
    typer.echo("Secrets and texts are taken out; look through it before you send it all the same.")
