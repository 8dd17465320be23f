"""Is what runs inside the pods right: the Serve config, configuration files, and where replicas find room.

The API server sees strings here. `serveConfigV2` is read by Ray's own schema and must be what `stillhouse up`
would run for the same stillhouse.yaml; every configuration file is read by the class that the program reads
it with. Knows nothing about Kubernetes' own objects.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from contracts.errors import ConfigError
from k8s.build import PodTemplate, pods
from k8s.findings import Finding, Found, Object, of, path_of

STACK = "stillhouse.yaml"
_CLASSES = {
    STACK: "serve.config:ServeConfig",
    "distill.yaml": "distill_jobs.config:DistillConfig",
    "admin.yaml": "serve.router.config:RouterConfig",
    "flywheel.yaml": "distill_jobs.flywheel.config:FlywheelConfig",
}
_VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)(:-[^}]*)?\}")
_SECRET = "s3://in-a-secret/{}"
"""Stands for a value that only the cluster knows: a URL, since most are."""
_LINE = re.compile(r"^  (\(top level\)|[^\s:]+): (.*)$")


class Stack(NamedTuple):
    """A stillhouse.yaml that was read."""

    config: Any
    revision: str
    path: str
    """Where the pods see it."""


def check_serving(sound: list[Object], objects: list[Object], variables: set[str]) -> Iterator[Finding]:
    """Findings about the sound ones among the objects.

    `variables`: names that prerequisites promise in Secrets.
    """
    stacks: dict[str, Stack | None] = {}
    for item in sound:
        if item.get("kind") == "ConfigMap":
            yield from of(item, _files(item, objects, variables, stacks))
    for item in sound:
        if item.get("kind") == "RayService":
            yield from of(item, _service(item, stacks))


# configuration files ----------------------------------------------------------------------------


def _files(
    item: Object, objects: list[Object], variables: set[str], stacks: dict[str, Stack | None]
) -> Iterator[Found]:
    for key, text in (item.get("data") or {}).items():
        if key not in _CLASSES:
            continue
        users = _users(item["metadata"]["name"], objects)
        known = variables | {name for template, _ in users for name in _environment(template)}
        for name, default in _VARIABLE.findall(text):
            if not default and name not in known:
                yield Found(path_of(["data", key]), f"${{{name}}} is in no environment and no prerequisite")
        paths = [f"{folder}/{key}" for _, folder in users]
        stacks.update(dict.fromkeys(paths))
        try:
            parsed = _read(text, _CLASSES[key])
        except ConfigError as err:
            yield from _wrong_lines(key, str(err))
            continue
        if key == STACK:
            from serve.app import revision_of

            stacks.update({path: Stack(parsed, revision_of(text.encode()), path) for path in paths})
            yield from _reachable(key, parsed)


def _users(name: str, objects: list[Object]) -> list[tuple[PodTemplate, str]]:
    """Pods that mount the ConfigMap as a folder, and where."""
    found = []
    for template in (t for item in objects for t in pods(item)):
        volumes = {
            v.get("name")
            for v in template.spec.get("volumes") or []
            if (v.get("configMap") or {}).get("name") == name
        }
        for container in template.spec.get("containers") or []:
            mounts = container.get("volumeMounts") or []
            found += [(template, m["mountPath"]) for m in mounts if m.get("name") in volumes]
    return found


def _environment(template: PodTemplate) -> Iterator[str]:
    for container in template.spec.get("containers") or []:
        yield from (one["name"] for one in container.get("env") or [])


def _read(text: str, cls: str) -> Any:
    from contracts.config import parse_config

    module, _, name = cls.partition(":")
    expanded = _VARIABLE.sub(lambda m: m[2][2:] if m[2] else _SECRET.format(m[1]), text)
    try:
        data = yaml.safe_load(expanded)
    except yaml.YAMLError as err:
        raise ConfigError(f"not valid YAML:\n  (top level): {err}") from err
    with _nowhere():
        return parse_config(data, getattr(import_module(module), name), "file")


@contextmanager
def _nowhere() -> Iterator[None]:
    """Without this process' own environment variables: a pod has none of them."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("STILLHOUSE_")}
    try:
        yield
    finally:
        os.environ.update(before)


def _wrong_lines(key: str, message: str) -> Iterator[Found]:
    lines = [m for m in map(_LINE.match, message.splitlines()) if m]
    for line in lines:
        yield Found(f"{path_of(['data', key])}.{line[1]}", line[2])
    if not lines:
        yield Found(path_of(["data", key]), message)


def _reachable(key: str, config: Any) -> Iterator[Found]:
    """What works on one machine and not on a cluster."""
    engines = {f"upstreams.{n}.engine": u.engine for n, u in config.upstreams.items() if u.engine is not None}
    for field, engine in {**engines, "students": config.students}.items():
        if engine.host is not None:
            yield Found(
                f"{path_of(['data', key])}.{field}.host",
                f"{engine.host}: routers are other pods; write `host: null` for the pod's address",
            )
    if config.ray.address is None:
        yield Found(
            f"{path_of(['data', key])}.ray.address", "KubeRay starts Ray; write `ray: {address: auto}`"
        )


# the Serve config -------------------------------------------------------------------------------


def _service(item: Object, stacks: dict[str, Stack | None]) -> Iterator[Found]:
    field = "spec.serveConfigV2"
    try:
        told = yaml.safe_load((item.get("spec") or {}).get("serveConfigV2") or "")
    except yaml.YAMLError as err:
        yield Found(field, f"not valid YAML: {err}")
        return
    if not isinstance(told, dict):
        yield Found(field, "must hold a Serve config; write it with `python -m k8s.serve_config OVERLAY`")
        return
    problems = list(_ray_schema(field, told))
    yield from problems
    if problems:
        return
    apps = told.get("applications") or []
    for number, app in enumerate(apps):
        yield from _application(f"{field}.applications[{number}]", app, stacks)
    used = {app["args"].get("config") for app in apps if isinstance(app.get("args"), dict)}
    for path in sorted(used & set(stacks)):
        stack = stacks[path]
        if stack is None:  # its own findings say why
            continue
        yield from _as_up_would(field, told, stack)
        yield from _room(item, stack)
        yield from _ports(item, stack)


def _ray_schema(field: str, told: dict[str, Any]) -> Iterator[Found]:
    from ray.serve.schema import ServeDeploySchema

    yield from _unknown(field, told, ServeDeploySchema)
    try:
        ServeDeploySchema.model_validate(told)
    except ValidationError as err:
        for error in err.errors():
            yield Found(path_of([field, *error["loc"]]), error["msg"])


def _unknown(field: str, told: Any, model: type[BaseModel]) -> Iterator[Found]:
    """Ray's schema lets unknown keys pass; nobody who writes one means that."""
    from ray.serve import schema

    inner = {"applications": schema.ServeApplicationSchema, "deployments": schema.DeploymentSchema}
    single = {"http_options": schema.HTTPOptionsSchema, "logging_config": schema.LoggingConfig}
    for key, value in told.items():
        if key not in model.model_fields:
            yield Found(path_of([field, key]), "unknown field of Ray's Serve config")
        elif key in inner and isinstance(value, list):
            for number, one in enumerate(value):
                yield from _unknown(path_of([field, key, number]), one, inner[key])
        elif key in single and isinstance(value, dict):
            yield from _unknown(path_of([field, key]), value, single[key])


def _application(field: str, app: dict[str, Any], stacks: dict[str, Stack | None]) -> Iterator[Found]:
    module, _, attribute = str(app.get("import_path", "")).partition(":")
    try:
        builder = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as err:
        yield Found(f"{field}.import_path", f"cannot be imported: {err}")
        return
    if not callable(builder):
        yield Found(f"{field}.import_path", "is no application builder")
    from contracts.config import parse_config
    from serve.app import AppArgs

    try:
        args = parse_config(app.get("args") or {}, AppArgs, "args")
    except ConfigError as err:
        lines = [m for m in map(_LINE.match, str(err).splitlines()) if m]
        yield from (Found(f"{field}.args.{line[1]}", line[2]) for line in lines)
        return
    if args.config not in stacks:
        known = ", ".join(sorted(stacks)) or "none"
        yield Found(f"{field}.args.config", f"no pod mounts {args.config} (stacks that were read: {known})")


def _as_up_would(field: str, told: dict[str, Any], stack: Stack) -> Iterator[Found]:
    from serve.app import serve_config

    wanted = serve_config(stack.config, stack.path, stack.revision)
    for place, says in _differences(wanted, told):
        yield Found(path_of([field, *place]), f"{says}; `python -m k8s.serve_config OVERLAY` writes it")


def _differences(wanted: Any, told: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, str]]:
    if isinstance(wanted, dict) and isinstance(told, dict):
        for key in [*wanted, *(k for k in told if k not in wanted)]:
            if key not in told or key not in wanted:
                yield (*at, key), "missing" if key not in told else "not what stillhouse.yaml says"
            else:
                yield from _differences(wanted[key], told[key], (*at, key))
    elif isinstance(wanted, list) and isinstance(told, list) and len(wanted) == len(told):
        for number, (one, other) in enumerate(zip(wanted, told, strict=True)):
            yield from _differences(one, other, (*at, number))
    elif wanted != told:
        yield at, f"is {told!r:.80}, and stillhouse.yaml makes it {wanted!r:.80}"


# room -------------------------------------------------------------------------------------------


def _room(item: Object, stack: Stack) -> Iterator[Found]:
    """Every replica must fit into some group, all of them together, at its greatest size."""
    config, groups = stack.config, (item["spec"]["rayClusterConfig"].get("workerGroupSpecs")) or []
    wants = {
        "router": (config.router, config.router.replicas, 0.0),
        "controller": (config.controller, 1, 0.0),
    }
    for name, section in config.upstreams.items():
        if section.engine is not None:
            wants[f"upstreams.{name}.engine"] = (
                section.engine,
                section.engine.num_replicas,
                section.engine.num_gpus,
            )
    wants["students"] = (config.students, config.students.num_replicas, config.students.num_gpus)
    for field, (placed, replicas, gpus) in wants.items():
        need = {"CPU": placed.num_cpus, "GPU": gpus, **placed.resources}
        need = {name: amount for name, amount in need.items() if amount > 0}
        fits = sum(_per_pod(group, need) * int(group.get("maxReplicas", 0)) for group in groups)
        if fits < replicas:
            yield Found(
                "spec.rayClusterConfig.workerGroupSpecs",
                f"{replicas} replica(s) of {field} need {need} each, and there is room for {fits}",
            )


def _per_pod(group: dict[str, Any], need: dict[str, float]) -> int:
    offered = {name: _number(amount) for name, amount in (group.get("resources") or {}).items()}
    return min((int(offered.get(name, 0.0) / amount + 1e-9) for name, amount in need.items()), default=0)


def _number(quantity: str) -> float:
    return (
        float(quantity[:-1]) / 1000
        if quantity.endswith("m")
        else float(re.sub(r"[^0-9.]", "", quantity) or 0)
    )


def _ports(item: Object, stack: Stack) -> Iterator[Found]:
    for template in pods(item):
        for number, container in enumerate(template.spec.get("containers") or []):
            for place, port in enumerate(container.get("ports") or []):
                if port.get("name") == "serve" and port.get("containerPort") != stack.config.http.port:
                    yield Found(
                        f"{template.path}.spec.containers[{number}].ports[{place}].containerPort",
                        f"{port.get('containerPort')}: stillhouse.yaml listens on {stack.config.http.port}",
                    )


def stack_of(overlay: Path) -> Any:
    """The stillhouse.yaml of an overlay's folder, its variables as the cluster would have them."""
    return _read((overlay / STACK).read_text(), _CLASSES[STACK])
