"""Building an overlay with kubectl's kustomize, and the pods that its objects would make.

Knows nothing about what is right or wrong in them.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from contracts.errors import ConfigError
from k8s.findings import Object, path_of

ROOT = Path(__file__).resolve().parent
OVERLAYS = ("cpu-dev", "gpu", "production")
RAY_KINDS = ("RayService", "RayJob", "RayCronJob")


UNKNOWN = -1
"""Replicas of an object that the schema refuses anyway."""


class PodTemplate(NamedTuple):
    """A pod template inside an object."""

    owner: Object
    path: str
    """Of the template in its owner."""
    spec: dict[str, Any]
    labels: dict[str, str]
    """Those of the template, and those that KubeRay adds."""
    replicas: int
    """Pods that are there without any load."""
    of_ray: bool
    """A Ray node: KubeRay adds its probes."""


class _Strict(yaml.SafeLoader):
    """YAML whose repeated keys are an error."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    pairs = [(loader.construct_object(k, deep=True), v) for k, v in node.value]
    if len({str(k) for k, _ in pairs}) < len(pairs):
        raise yaml.constructor.ConstructorError(None, None, "a key stands here twice", node.start_mark)
    return {k: loader.construct_object(v, deep=True) for k, v in pairs}


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def build(overlay: Path, kubectl: str | None = None) -> list[Object]:
    """The overlay's objects, as `kubectl apply -k` sends them. Raises: ConfigError in kustomize's words."""
    program = kubectl or shutil.which("kubectl")
    if program is None:
        raise ConfigError("kubectl is needed to build an overlay; install it, or give --kubectl PATH.")
    done = subprocess.run(
        [program, "kustomize", str(overlay)], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise ConfigError(f"{overlay}: kustomize: {done.stderr.strip()}")
    return parse(done.stdout)


def parse(text: str) -> list[Object]:
    """The objects of a YAML stream. Raises: ConfigError."""
    try:
        return [item for item in yaml.load_all(text, _Strict) if item]
    except yaml.YAMLError as err:
        raise ConfigError(f"not valid YAML: {err}") from err


def pods(item: Object) -> Iterator[PodTemplate]:
    """The pod templates of an object."""
    kind, spec = item.get("kind"), item.get("spec") or {}
    if kind in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
        yield _plain(item, ("spec", "template"), spec.get("template"), spec.get("replicas", 1))
    elif kind == "CronJob":
        job = spec["jobTemplate"]["spec"]
        yield _plain(item, ("spec", "jobTemplate", "spec", "template"), job["template"], 0)
    elif kind == "RayService":
        yield from _cluster(item, ("spec", "rayClusterConfig"), spec.get("rayClusterConfig"))
    elif kind == "RayJob":
        yield from _job(item, ("spec",), spec)
    elif kind == "RayCronJob":
        yield from _job(item, ("spec", "jobTemplate"), spec.get("jobTemplate") or {})


def _job(item: Object, at: tuple[str, ...], job: dict[str, Any]) -> Iterator[PodTemplate]:
    yield from _cluster(item, (*at, "rayClusterSpec"), job.get("rayClusterSpec"))
    if "submitterPodTemplate" in job:
        yield _plain(item, (*at, "submitterPodTemplate"), job["submitterPodTemplate"], 0)


def _cluster(item: Object, at: tuple[str, ...], cluster: Any) -> Iterator[PodTemplate]:
    if not isinstance(cluster, dict):
        return
    head = cluster.get("headGroupSpec") or {}
    yield _ray(item, (*at, "headGroupSpec"), head, "head", 1)
    for number, group in enumerate(cluster.get("workerGroupSpecs") or []):
        place = (*at, "workerGroupSpecs", number)
        yield _ray(item, place, group, "worker", group.get("replicas", group.get("minReplicas", 0)))


def _ray(
    item: Object, at: tuple[str | int, ...], group: dict[str, Any], node: str, replicas: Any
) -> PodTemplate:
    made = _plain(item, (*at, "template"), group.get("template"), replicas)
    name = str(group.get("groupName", "headgroup"))
    added = {
        "ray.io/node-type": node,
        "ray.io/group": name,
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": "*",
        "app.kubernetes.io/created-by": "kuberay-operator",
        "app.kubernetes.io/name": "kuberay",
    }
    return made._replace(labels={**made.labels, **added}, of_ray=True)


def _plain(item: Object, at: tuple[str | int, ...], template: Any, replicas: Any) -> PodTemplate:
    found = template if isinstance(template, dict) else {}
    labels = (found.get("metadata") or {}).get("labels") or {}
    number = replicas if isinstance(replicas, int) else UNKNOWN
    return PodTemplate(item, path_of(at), found.get("spec") or {}, dict(labels), number, of_ray=False)
