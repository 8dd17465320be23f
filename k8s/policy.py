"""What a pod of ours must be: a pinned image, limits, not root, a read-only root, probes, a drain that fits.

Secrets come by reference: no password stands in a manifest, but for a Secret that is labelled as one for
trying out. Knows nothing about references (references.py) or schemas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from k8s.build import PodTemplate, pods
from k8s.findings import Finding, Found, Object, of, path_of

TRYING_OUT = "stillhouse.io/for-trying-out"
"""Label of a Secret whose value everybody may read."""
_PINNED = re.compile(r"^[^:@\s]+(:[0-9]+/[^:@\s]+)?(:(?P<tag>[\w][\w.-]*))?(@sha256:[0-9a-f]{64})?$")
_SECRET_NAME = re.compile(r"(PASSWORD|SECRET|TOKEN|API_?KEY|CREDENTIAL)", re.IGNORECASE)
_IN_URL = re.compile(r"[a-z][a-z0-9+]*://[^\s/:@$]+:[^\s/@$]+@")
_PROBED = ("Deployment", "StatefulSet", "DaemonSet")
_UNITS = {
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def check_policy(objects: list[Object]) -> Iterator[Finding]:
    """Every rule that an object breaks."""
    for item in objects:
        for template in pods(item):
            yield from of(item, _pod(template))
        yield from of(item, _secrets(item))


def _pod(template: PodTemplate) -> Iterator[Found]:
    spec, at = template.spec, f"{template.path}.spec"
    context = spec.get("securityContext") or {}
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield Found(f"{at}.{field}", "is the node's, and not the pod's")
    for number, volume in enumerate(spec.get("volumes") or []):
        if "hostPath" in volume:
            yield Found(f"{at}.volumes[{number}].hostPath", "is the node's, and not the pod's")
        if "emptyDir" in volume and not (volume["emptyDir"] or {}).get("sizeLimit"):
            yield Found(
                f"{at}.volumes[{number}].emptyDir.sizeLimit", "missing: it could fill the node's disk"
            )
    if "serviceAccountName" not in spec:
        yield Found(f"{at}.serviceAccountName", "missing: the default account would be used")
    if "automountServiceAccountToken" not in spec:
        yield Found(f"{at}.automountServiceAccountToken", "missing: say whether the pod gets a token")
    if (context.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield Found(f"{at}.securityContext.seccompProfile.type", "must be RuntimeDefault")
    for group in ("initContainers", "containers"):
        for number, container in enumerate(spec.get(group) or []):
            place = f"{at}.{group}[{number}]"
            yield from _image(container, place)
            yield from _limits(container, place)
            yield from _rights(container, context, place)
            if group == "containers":
                yield from _life(container, template, place)


def _image(container: dict[str, Any], at: str) -> Iterator[Found]:
    image = str(container.get("image", ""))
    match = _PINNED.match(image)
    if match is None or (match["tag"] is None and "@sha256:" not in image):
        yield Found(f"{at}.image", f"{image!r} has no tag: it would be another image tomorrow")
    elif match["tag"] in ("latest", "main", "master", "nightly", "dev"):
        yield Found(f"{at}.image", f"{image!r}: {match['tag']!r} is another image tomorrow")


def _limits(container: dict[str, Any], at: str) -> Iterator[Found]:
    resources = container.get("resources") or {}
    for kind in ("requests", "limits"):
        for name in ("cpu", "memory", "ephemeral-storage"):
            if name not in (resources.get(kind) or {}):
                yield Found(f"{at}.resources.{kind}.{name}", "missing")
    limits = resources.get("limits") or {}
    for name, amount in (resources.get("requests") or {}).items():
        if name in limits and _amount(amount) > _amount(limits[name]):
            yield Found(f"{at}.resources.requests.{name}", f"{amount} is more than its limit {limits[name]}")


def _amount(quantity: Any) -> float:
    match = re.match(r"^([\d.]+)([A-Za-z]*)$", str(quantity))
    return float(match[1]) * _UNITS.get(match[2], 1.0) if match else 0.0  # no quantity: schema.py says so


def _rights(container: dict[str, Any], pod: dict[str, Any], at: str) -> Iterator[Found]:
    context = container.get("securityContext") or {}
    at = f"{at}.securityContext"
    user = context.get("runAsUser", pod.get("runAsUser"))
    if user is None or int(user) == 0:
        yield Found(
            f"{at}.runAsUser", f"{'missing' if user is None else 'is root'}: name a user that is not root"
        )
    if context.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield Found(f"{at}.runAsNonRoot", "must be true")
    if context.get("readOnlyRootFilesystem") is not True:
        yield Found(f"{at}.readOnlyRootFilesystem", "must be true; what is written gets a volume")
    if context.get("allowPrivilegeEscalation") is not False:
        yield Found(f"{at}.allowPrivilegeEscalation", "must be false")
    if context.get("privileged"):
        yield Found(f"{at}.privileged", "must not be")
    capabilities = context.get("capabilities") or {}
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield Found(f"{at}.capabilities", "must be {drop: [ALL]}")


def _life(container: dict[str, Any], template: PodTemplate, at: str) -> Iterator[Found]:
    if template.owner.get("kind") in _PROBED:
        for probe in ("readinessProbe", "livenessProbe"):
            if probe not in container:
                yield Found(f"{at}.{probe}", "missing")
    # Ray nodes get their probes from KubeRay, which adds Serve's health to a worker's only if it has none.
    command = ((((container.get("lifecycle") or {}).get("preStop")) or {}).get("exec") or {}).get(
        "command"
    ) or []
    seconds = int(command[-1]) if command and str(command[-1]).isdigit() else 0
    grace = template.spec.get("terminationGracePeriodSeconds", 30)
    if seconds and seconds + 10 > grace:
        yield Found(
            f"{template.path}.spec.terminationGracePeriodSeconds",
            f"{grace} s is too short for a preStop of up to {seconds} s",
        )
    serves = template.labels.get("stillhouse.io/cluster") == "serving"
    if serves and template.labels.get("ray.io/node-type") == "worker" and not command:
        yield Found(f"{at}.lifecycle.preStop", "missing: its replicas would be cut, not moved")


def _secrets(item: Object) -> Iterator[Found]:
    labels = item.get("metadata", {}).get("labels") or {}
    if item.get("kind") == "Secret" and labels.get(TRYING_OUT) != "true":
        yield Found("data", f"a Secret in a manifest; refer to one by name, or label it {TRYING_OUT}")
    if item.get("kind") != "Secret":
        yield from _plain_secret(item)


def _plain_secret(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[Found]:
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from _plain_secret(one, (*at, number))
    elif isinstance(value, dict):
        name, text = value.get("name"), value.get("value")
        if isinstance(name, str) and isinstance(text, str) and text and _SECRET_NAME.search(name):
            yield Found(
                path_of((*at, "value")), f"{name} stands here in plain text; use valueFrom.secretKeyRef"
            )
        for key, one in value.items():
            yield from _plain_secret(one, (*at, key))
    elif isinstance(value, str) and _IN_URL.search(value):
        yield Found(path_of(at), "a password stands in a URL here")
