"""An adapter on the running engines of its base: found by digest, loaded, seen to act, registered, unloaded.

The engines are asked over HTTP what they serve, so a replica that came back without its adapters is noticed
and gets them before a router can choose it. Every step may be repeated. Knows nothing about Ray, routes or
rollouts.
"""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from contracts.errors import DataError, EngineError, NotFoundError
from registry.adapter import read_adapter
from registry.digest import digest_folder
from serve.engine.folders import local_model
from serve.state.traffic import GUEST, Endpoint, TrafficState

log = logging.getLogger(__name__)

FRESH_S = 10.0
LOAD_TIMEOUT_S = 60.0
PROBE = "The quick brown fox jumps over the lazy dog, 0123456789."
NO_EFFECT = 1e-3
"""Nats. An adapter that moves no log-probability of the probe by as much changes nothing."""
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # see serve.engine.http


class Served(NamedTuple):
    """What one engine says it serves."""

    name: str
    """By which requests ask for its model itself."""
    base: str
    """Folder or id of its model."""
    adapters: dict[str, str]
    """Name → folder."""


def served(url: str, timeout_s: float = 5.0) -> Served:
    """The engine's model and adapters. Raises: EngineError when it does not answer as vLLM does."""
    try:
        with _OPENER.open(f"{url}/v1/models", timeout=timeout_s) as reply:
            models = json.loads(reply.read())["data"]
        own = next(m for m in models if not m.get("parent"))
        return Served(
            str(own["id"]),
            str(own["root"]),
            {str(m["id"]): str(m["root"]) for m in models if m.get("parent")},
        )
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as err:
        raise EngineError(f"engine {url} did not say what it serves: {err!r}.") from err


def load(url: str, name: str, folder: Path) -> None:
    """Load an adapter, or do nothing when it is.

    vLLM may take an adapter and never apply it, so what was loaded must change the probe's log-probabilities;
    else it is unloaded again.

    Raises: EngineError with vLLM's reason, or when the name is another adapter's; DataError for one that
    changes nothing.
    """
    have = served(url).adapters.get(name)
    if have == str(folder):
        return
    if have is not None:
        raise EngineError(
            f"engine {url} serves {have} as {name!r}; unload it before {folder} takes the name."
        )
    _change(url, "load", {"lora_name": name, "lora_path": str(folder)})
    if (moved := effect(url, name)) < NO_EFFECT:
        unload(url, name)
        raise DataError(
            f"{folder} changes nothing on engine {url} ({moved:.1g} nats on the probe): it was not trained, "
            "or none of its layers is among lora.target_modules."
        )


def unload(url: str, name: str) -> None:
    """Forget an adapter, or do nothing when it is gone; requests it has are finished. Raises: EngineError."""
    if name in served(url).adapters:
        _change(url, "unload", {"lora_name": name})


def effect(url: str, name: str) -> float:
    """Largest change of a log-probability of the probe's tokens, in nats, base against adapter.

    Raises: EngineError.
    """
    pairs = zip(_probe(url, served(url).name), _probe(url, name), strict=True)
    return max(abs(one - other) for one, other in pairs)


def _probe(url: str, model: str) -> list[float]:
    asked = {"model": model, "prompt": PROBE, "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
    try:
        with _post(url, "completions", asked) as reply:
            found = json.loads(reply.read())["choices"][0]["logprobs"]["token_logprobs"]
        return [float(one) for one in found[1:-1]]
    except (OSError, ValueError, LookupError, TypeError) as err:
        raise EngineError(f"engine {url} did not answer the probe as {model!r}: {err!r}.") from err


def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{url}/v1/{path}", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    return _OPENER.open(request, timeout=LOAD_TIMEOUT_S)


def _change(url: str, verb: str, body: dict[str, Any]) -> None:
    name = body["lora_name"]
    try:
        with _post(url, f"{verb}_lora_adapter", body) as reply:
            reply.read()
    except urllib.error.HTTPError as err:
        said = err.read()[:500].decode(errors="replace")
        if err.code == 404 and "adapter" not in said:  # no such path, not no such file
            raise EngineError(f"engine {url} takes no adapters; set 'lora' in its options.") from err
        if _is_done(url, verb, name):  # somebody else was quicker
            return
        raise EngineError(f"engine {url} did not {verb} adapter {name!r} ({err.code}): {said}") from err
    except OSError as err:
        raise EngineError(f"engine {url} did not {verb} adapter {name!r}: {err}.") from err


def _is_done(url: str, verb: str, name: str) -> bool:
    return (name in served(url).adapters) == (verb == "load")


class Guest:
    """One adapter and the engines it is on; `visit` is called about twice a second by one thread.

    Raises: DataError at once when the adapter's files are not whole.
    """

    def __init__(self, traffic: TrafficState, app: str, name: str, folder: Path) -> None:
        self._traffic, self._app, self._name, self._folder = traffic, app, name, folder
        self._base = read_adapter(folder)
        self._digests: dict[str, str] = {}
        self._said: dict[str, str] = {}
        """URL → why the adapter is not there."""

    def visit(self) -> int:
        """Load it where its base runs, refresh those registrations, drop the others; how many there are.

        Raises: what the store does; DataError for an adapter without effect.
        """
        fresh = self._traffic.endpoints(FRESH_S)
        hosts = [e for found in fresh.values() for e in found if not e.guest]
        here = {GUEST + e.replica for e in hosts if self._settle(e)}
        known = self._traffic.endpoints().get(self._app, [])
        for gone in {e.replica for e in known} - here:
            self._traffic.drop_endpoint(self._app, gone)
        return len(here)

    def why(self) -> str:
        """Why the adapter is nowhere, for people."""
        said = [why for why in self._said.values() if why] or ["no engine is registered"]
        return (
            f"adapter {self._name!r} needs a running engine of its base {self._base.ref} (digest "
            f"{self._base.digest[:12]}) with 'lora' in its options: {'; '.join(sorted(set(said)))}"
        )

    def leave(self) -> None:
        """Take all registrations back. Call `unload` when the routers have noticed."""
        self._traffic.drop_endpoint(self._app)

    def unload(self) -> None:
        """Forget the adapter wherever its base runs; an engine that does not answer has nothing to forget."""
        for endpoint in (e for found in self._traffic.endpoints(FRESH_S).values() for e in found):
            try:
                if served(endpoint.url).adapters.get(self._name) == str(self._folder):
                    unload(endpoint.url, self._name)
            except EngineError as err:
                log.warning("adapter %s not unloaded: %s", self._name, err)

    def _settle(self, host: Endpoint) -> bool:
        """True when the adapter is on this engine, and registered."""
        why = ""
        try:
            engine = served(host.url)
            why = self._not_the_base(engine.base)
            if not why:
                if engine.adapters.get(self._name) != str(self._folder):
                    load(host.url, self._name, self._folder)
                self._traffic.put_endpoint(self._app, GUEST + host.replica, host.url, host.pid)
        except EngineError as err:
            why = str(err)
            if self._said.get(host.url) != why:
                log.warning("adapter %s is not on %s: %s", self._name, host.url, err)
        self._said[host.url] = why
        return not why

    def _not_the_base(self, model: str) -> str:
        folder = local_model(model)
        if folder is None:
            return f"{model} is no folder of this node, so its digest is unknown"
        if model not in self._digests:  # an engine's weights do not change; a digest takes seconds
            try:
                self._digests[model] = digest_folder(folder)
            except (OSError, NotFoundError, DataError) as err:
                return f"{model} cannot be read: {err}"
        digest = self._digests[model]
        return "" if digest == self._base.digest else f"{model} has digest {digest[:12]}"
