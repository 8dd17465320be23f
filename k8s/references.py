"""Is everything there that is named: ConfigMaps, Secrets, claims, accounts, ports, pods that selectors mean.

What an overlay does not make must stand in prerequisites.yaml. Knows nothing about policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from k8s.build import UNKNOWN, PodTemplate, pods
from k8s.findings import Finding, Found, Object, name_of, of, path_of

PREREQUISITES = Path(__file__).resolve().parent / "prerequisites.yaml"


def prerequisites() -> dict[str, dict[str, dict[str, Any]]]:
    """Kind → name → what it is and which keys it has, of what others make."""
    found: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(PREREQUISITES.read_text())
    return found


def promised_variables() -> set[str]:
    """Names of the environment variables that prerequisites' Secrets hold."""
    return {key for secret in prerequisites().get("Secret", {}).values() for key in secret["keys"]}


class Names:
    """What an overlay makes and what it may expect, by kind."""

    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects
        self.pods = [template for item in objects for template in pods(item)]
        self._made = {(item.get("kind"), item["metadata"]["name"]): item for item in objects}
        self._expected = prerequisites()

    def problem(self, kind: str, name: str, key: str | None = None) -> str | None:
        """Why the reference leads nowhere, or None."""
        made = self._made.get((kind, name))
        if made is not None:
            keys = {**(made.get("data") or {}), **(made.get("stringData") or {})}
            return f"{kind} {name} has no key {key!r}" if key is not None and key not in keys else None
        expected = self._expected.get(kind, {}).get(name)
        if expected is None:
            return f"no {kind} {name!r} is made here or listed in prerequisites.yaml"
        keys = expected.get("keys", [])
        return (
            f"{kind} {name} is to have {keys}, not {key!r}" if key is not None and key not in keys else None
        )

    def selected(self, labels: dict[str, str]) -> list[PodTemplate]:
        """Pods with all of these labels; '*' is a value that KubeRay decides."""
        return [
            pod for pod in self.pods if all(pod.labels.get(k) in (v, "*") for k, v in labels.items() if k)
        ]


def check_references(objects: list[Object]) -> Iterator[Finding]:
    """Every reference that leads nowhere."""
    names = Names(objects)
    for item in objects:
        for template in pods(item):
            yield from of(item, _pod(template, names))
        yield from of(item, _inside(item, names))
        checker = _BY_KIND.get(str(item.get("kind")))
        if checker is not None:
            yield from of(item, checker(item, names))


def _pod(template: PodTemplate, names: Names) -> Iterator[Found]:
    spec, at = template.spec, f"{template.path}.spec"
    for field, kind in (("serviceAccountName", "ServiceAccount"), ("priorityClassName", "PriorityClass")):
        if spec.get(field) and (problem := names.problem(kind, spec[field])):
            yield Found(f"{at}.{field}", problem)
    volumes = spec.get("volumes") or []
    for number, volume in enumerate(volumes):
        yield from _volume(volume, f"{at}.volumes[{number}]", names)
    claims = (template.owner.get("spec") or {}).get("volumeClaimTemplates") or []
    known = {volume.get("name") for volume in volumes} | {claim["metadata"]["name"] for claim in claims}
    for group in ("initContainers", "containers"):
        for number, container in enumerate(spec.get(group) or []):
            yield from _container(container, f"{at}.{group}[{number}]", names, known)
    for number, spread in enumerate(spec.get("topologySpreadConstraints") or []):
        wanted = (spread.get("labelSelector") or {}).get("matchLabels") or {}
        if any(template.labels.get(k) != v for k, v in wanted.items()):
            yield Found(
                f"{at}.topologySpreadConstraints[{number}].labelSelector", "does not mean its own pods"
            )


def _volume(volume: dict[str, Any], at: str, names: Names) -> Iterator[Found]:
    ways = {
        "configMap": ("ConfigMap", "name"),
        "secret": ("Secret", "secretName"),
        "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
    }
    for field, (kind, key) in ways.items():
        source = volume.get(field)
        if isinstance(source, dict) and (problem := names.problem(kind, str(source.get(key)))):
            yield Found(f"{at}.{field}.{key}", problem)


def _container(container: dict[str, Any], at: str, names: Names, volumes: set[Any]) -> Iterator[Found]:
    for number, one in enumerate(container.get("envFrom") or []):
        for field, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
            if field in one and (problem := names.problem(kind, str(one[field].get("name")))):
                yield Found(f"{at}.envFrom[{number}].{field}.name", problem)
    claims = {str(v) for v in volumes}
    for number, mount in enumerate(container.get("volumeMounts") or []):
        if mount.get("name") not in volumes:
            yield Found(
                f"{at}.volumeMounts[{number}].name", f"no volume {mount.get('name')!r}: {sorted(claims)}"
            )
    ports = {port.get("name") for port in container.get("ports") or []}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = ((container.get(probe) or {}).get("httpGet") or {}).get("port")
        if isinstance(port, str) and port not in ports:
            yield Found(f"{at}.{probe}.httpGet.port", f"the container has no port {port!r}")


_KEY_OF = {"secretKeyRef": "Secret", "configMapKeyRef": "ConfigMap", "credentials": "Secret"}


def _inside(value: Any, names: Names, at: tuple[str | int, ...] = ()) -> Iterator[Found]:
    """Every `secretKeyRef`, `configMapKeyRef` and Prometheus' `credentials`, wherever it stands."""
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from _inside(one, names, (*at, number))
    if not isinstance(value, dict):
        return
    for key, one in value.items():
        kind = _KEY_OF.get(key)
        if kind is not None and isinstance(one, dict) and "name" in one:
            problem = names.problem(kind, str(one["name"]), str(one.get("key")))
            if problem:
                yield Found(path_of((*at, key)), problem)
        else:
            yield from _inside(one, names, (*at, key))


# by kind ----------------------------------------------------------------------------------------


def _service(item: Object, names: Names) -> Iterator[Found]:
    spec = item.get("spec") or {}
    meant = names.selected(spec.get("selector") or {})
    if spec.get("selector") and not meant:
        yield Found("spec.selector", "selects no pod of this overlay")
        return
    for number, port in enumerate(spec.get("ports") or []):
        target = port.get("targetPort")
        if isinstance(target, str) and not any(target in _port_names(pod) for pod in meant):
            yield Found(f"spec.ports[{number}].targetPort", f"no selected pod has a port {target!r}")


def _port_names(pod: PodTemplate) -> set[str]:
    containers = pod.spec.get("containers") or []
    return {str(p.get("name")) for container in containers for p in container.get("ports") or []}


def _network(item: Object, names: Names) -> Iterator[Found]:
    spec = item.get("spec") or {}
    wanted = (spec.get("podSelector") or {}).get("matchLabels") or {}
    if wanted and not names.selected(wanted):
        yield Found("spec.podSelector", "selects no pod of this overlay")
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for number, rule in enumerate(spec.get(direction) or []):
            for place, peer in enumerate(rule.get(side) or []):
                labels = (peer.get("podSelector") or {}).get("matchLabels") or {}
                if labels and "namespaceSelector" not in peer and not names.selected(labels):
                    field = f"spec.{direction}[{number}].{side}[{place}].podSelector"
                    yield Found(field, "selects no pod of this overlay")


def _budget(item: Object, names: Names) -> Iterator[Found]:
    spec = item.get("spec") or {}
    meant = names.selected((spec.get("selector") or {}).get("matchLabels") or {})
    if not meant:
        yield Found("spec.selector", "selects no pod of this overlay")
        return
    least, there = spec.get("minAvailable"), sum(pod.replicas for pod in meant)
    if any(pod.replicas == UNKNOWN for pod in meant):
        return
    if any(pod.of_ray for pod in meant) and not isinstance(least, int):
        field = "spec.maxUnavailable" if "maxUnavailable" in spec else "spec.minAvailable"
        yield Found(field, "pods of a RayCluster have no scale: Kubernetes takes a whole `minAvailable` only")
    elif isinstance(least, int) and least >= there:
        yield Found("spec.minAvailable", f"{least} of {there} pods: no node could ever be drained")
    elif spec.get("maxUnavailable") in (0, "0%"):
        yield Found("spec.maxUnavailable", "no node could ever be drained")


def _deployment(item: Object, names: Names) -> Iterator[Found]:
    spec = item.get("spec") or {}
    wanted = (spec.get("selector") or {}).get("matchLabels") or {}
    for template in pods(item):
        if any(template.labels.get(k) != v for k, v in wanted.items()):
            yield Found("spec.selector.matchLabels", "does not mean the pods of its own template")


def _monitor(item: Object, names: Names) -> Iterator[Found]:
    spec = item.get("spec") or {}
    selector = spec.get("selector") or {}
    meant = [
        pod for pod in names.selected(selector.get("matchLabels") or {}) if _matches(pod.labels, selector)
    ]
    if not meant:
        yield Found("spec.selector", "selects no pod of this overlay")
        return
    for number, endpoint in enumerate(spec.get("podMetricsEndpoints") or []):
        port = endpoint.get("port")
        if isinstance(port, str) and not any(port in _port_names(pod) for pod in meant):
            yield Found(f"spec.podMetricsEndpoints[{number}].port", f"no selected pod has a port {port!r}")


def _service_monitor(item: Object, names: Names) -> Iterator[Found]:
    spec = item.get("spec") or {}
    selector = spec.get("selector") or {}
    services = [one for one in names.objects if one.get("kind") == "Service"]
    meant = [one for one in services if _matches(one["metadata"].get("labels") or {}, selector)]
    if not meant:
        yield Found("spec.selector", "selects no Service of this overlay")
        return
    ports = {str(p.get("name")) for one in meant for p in one["spec"].get("ports") or []}
    for number, endpoint in enumerate(spec.get("endpoints") or []):
        port = endpoint.get("port")
        if isinstance(port, str) and port not in ports:
            names_ = ", ".join(name_of(one) for one in meant)
            yield Found(f"spec.endpoints[{number}].port", f"{names_} has no port {port!r}")


def _matches(labels: dict[str, str], selector: dict[str, Any]) -> bool:
    if any(labels.get(k) not in (v, "*") for k, v in (selector.get("matchLabels") or {}).items()):
        return False
    for one in selector.get("matchExpressions") or []:
        value, among = labels.get(one.get("key")), one.get("values") or []
        good = {
            "In": value in among or value == "*",
            "NotIn": value not in among,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not good.get(one.get("operator"), False):
            return False
    return True


_BY_KIND = {
    "Service": _service,
    "NetworkPolicy": _network,
    "PodDisruptionBudget": _budget,
    "Deployment": _deployment,
    "StatefulSet": _deployment,
    "PodMonitor": _monitor,
    "ServiceMonitor": _service_monitor,
}
