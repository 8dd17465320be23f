"""What others say: engines, upstreams, the registry and its artifacts, the request log's folder and bucket.

Asks each with a time limit of its own and changes nothing. Knows nothing about the state store's tables.
"""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from cli.doctor.finding import Finding, Patient, fail, ok, skip, warn
from cli.doctor.state import FRESH_S, readable
from contracts.model import ModelRecord
from registry.digest import digest_folder
from registry.mlflow_store import open_registry
from serve.request_log.remote import Remote
from serve.request_log.segments import is_final, opened_at
from serve.state.tables import shown
from serve.state.traffic import TrafficState

_ASK_S = 4.0
_BACKLOG_S = 3600.0
"""A closed segment that is this old and not uploaded waits for something."""
_DIGEST_BYTES = 2 * 2**30
"""Artifacts above this are not read; their size is compared."""


def engines(patient: Patient) -> Iterator[Finding]:
    """Every replica that is registered answers."""
    store = readable(patient)
    endpoints = TrafficState(store).endpoints(FRESH_S) if store is not None else {}
    if not endpoints:
        if patient.runs and any(u.engine for u in patient.config.upstreams.values()):
            yield fail("engines", "none is registered", f"see the engines' logs in {patient.config.log_dir}.")
        else:
            yield skip("engines", "none runs")
        return
    for app, replicas in endpoints.items():
        for one in replicas:
            why = _unhealthy(f"{one.url}/health", {})
            if why is not None:
                yield fail(
                    "engines", f"{app} at {one.url}: {why}", f"see its log in {patient.config.log_dir}."
                )
            else:
                yield ok("engines", f"{app} at {one.url}")


def upstreams(patient: Patient) -> Iterator[Finding]:
    """Every URL that somebody else serves answers, and knows our key."""
    hosted = {name: u for name, u in patient.config.upstreams.items() if u.url is not None}
    if not hosted:
        yield skip("upstreams", "none by URL")
    for name, upstream in hosted.items():
        key = os.environ.get(upstream.api_key_env or "", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        base = str(upstream.url).rstrip("/")
        base = base if base.endswith("/v1") else f"{base}/v1"
        why = _unhealthy(f"{base}/models", headers)
        host = urlsplit(base).netloc.rpartition("@")[2]
        if why is None:
            yield ok("upstreams", f"{name} at {host}")
        elif why.startswith(("401", "403")):
            yield fail("upstreams", f"{name} at {host}: {why}", f"check the key in {upstream.api_key_env}.")
        else:
            yield fail(
                "upstreams", f"{name} at {host}: {why}", "check its URL, the network and a proxy between."
            )


def _unhealthy(url: str, headers: dict[str, str]) -> str | None:
    """Why it does not answer well; None when it does. A 404 is an answer: not every server lists models."""
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=_ASK_S):
            return None
    except urllib.error.HTTPError as err:
        return f"{err.code} {err.reason}" if err.code in (401, 403) or err.code >= 500 else None
    except (OSError, ValueError) as err:
        return str(getattr(err, "reason", err))


def registry(patient: Patient) -> Iterator[Finding]:
    """Reachable; every alias leads to an artifact that is there and unchanged."""
    uri = patient.config.registry_uri
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).is_file():
        yield ok("registry", "is made by the first student that is published")
        return
    if uri.startswith("http") and (why := _unhealthy(f"{uri.rstrip('/')}/health", {})) is not None:
        yield fail("registry", f"{shown(uri)}: {why}", "check registry_uri, and that MLflow runs.")
        return  # its own client would try again for minutes
    opened, aliases = open_registry(uri), 0
    for name in opened.list_models():
        for alias, number in sorted(opened.aliases(name).items()):
            aliases += 1
            yield from _artifact(f"{name}@{alias}", opened.get(f"{name}:{number}"))
    yield ok("registry", f"{shown(uri) if '://' in uri else uri}: {aliases} aliases")


def _artifact(alias: str, record: ModelRecord) -> Iterator[Finding]:
    uri = record.artifact.uri
    if "://" in uri and not uri.startswith("file://"):
        yield skip("artifacts", f"{alias} lies at a remote place; it is checked when it is fetched")
        return
    folder = Path(uri.removeprefix("file://"))
    again = "publish it again, or restore the folder from its backup."
    if not folder.is_dir():
        yield fail("artifacts", f"{alias} ({record.ref}): no folder {folder}", again)
    elif record.artifact.bytes <= _DIGEST_BYTES and digest_folder(folder) != record.artifact.digest:
        yield fail("artifacts", f"{alias} ({record.ref}): {folder} has changed", again)
    else:
        yield ok("artifacts", f"{alias} is {record.ref}")


def request_log(patient: Patient) -> Iterator[Finding]:
    """The folder can be written; the bucket answers; nothing waits for it."""
    log = patient.config.router_config().log
    if log is None:
        yield skip("request log", "off")
        return
    folder = Path(log.dir)
    there = next(f for f in (folder, *folder.parents) if f.exists())
    if not os.access(there, os.W_OK):
        yield fail("request log", f"{there} cannot be written", "make it writable, or set router.log.dir.")
        return
    if log.upload is None:
        yield ok("request log", f"{folder}, not uploaded")
        return
    uploaded = set(Remote(log.upload).names())
    local = [f.name for f in folder.glob("*.jsonl") if is_final(f.name)] if folder.is_dir() else []
    late = [n for n in local if n not in uploaded and opened_at(n) < time.time() - _BACKLOG_S]
    if late:
        what = f"{len(late)} segments wait for {log.upload}, the oldest since an hour and more"
        yield warn("request log", what, "see the routers' log for what the bucket says.")
    else:
        yield ok("request log", f"{folder}, {len(uploaded)} segments at {log.upload}")
