"""Is every object one that the API server would take: known kind, known fields, right types.

Kubernetes' own kinds against kubernetes-validate's strict schemas, pods inside custom resources as Pods,
custom resources against schemas/*.yaml. A kind that neither knows is a finding: a server without its
definition refuses it too. Knows nothing about what the objects mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from k8s.build import PodTemplate, pods
from k8s.findings import Finding, Found, Object, of, path_of

KUBERNETES = "1.32"
_FOLDER = Path(__file__).resolve().parent / "schemas"
_QUANTITY = re.compile(r"^\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi|e\d+)?$")
_CUSTOM_HEAD = {"apiVersion", "kind", "metadata", "spec"}


def check_schemas(objects: list[Object]) -> Iterator[Finding]:
    """Everything that a strict API server would refuse."""
    for item in objects:
        yield from of(item, _object(item))


def _object(item: Object) -> Iterator[Found]:
    group, kind = str(item.get("apiVersion", "")), str(item.get("kind", ""))
    if not (item.get("metadata") or {}).get("name"):
        yield Found("metadata.name", "an object needs a name")
    custom = _custom(f"{group}/{kind}")
    if custom is not None:
        yield from _problems(custom, item.get("spec"), "spec")
        yield from (Found(key, "unknown field") for key in item if key not in _CUSTOM_HEAD)
        for template in pods(item):
            yield from _template(template)
        yield from _quantities(item.get("spec"), "spec")
        return
    validator = _builtin(kind, group)
    if validator is None:
        what = "apiVersion" if _some_version(kind) else "kind"
        yield Found(what, f"no schema is known for {group} {kind}; a strict server would refuse it too")
        return
    yield from _problems(validator, item, "")
    yield from _quantities(item.get("spec"), "spec")


def _template(template: PodTemplate) -> Iterator[Found]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template.spec}
    validator = _builtin("Pod", "v1")
    assert validator is not None
    for found in _problems(validator, pod, ""):
        yield Found(f"{template.path}.{found.field}", found.says)


def _problems(validator: Draft202012Validator, value: Any, prefix: str) -> Iterator[Found]:
    for error in validator.iter_errors(value):
        for leaf in _leaves(error):
            field = path_of([*([prefix] if prefix else []), *leaf.absolute_path])
            yield Found(*_said(leaf, field))


def _leaves(error: ValidationError) -> list[ValidationError]:
    """The error itself, or of a choice between schemas the errors of the nearest one."""
    if not error.context or error.validator not in ("anyOf", "oneOf"):
        return [error]
    deep = max(len(one.absolute_path) for one in error.context)
    return (
        [error]
        if deep == len(error.absolute_path)
        else [one for one in error.context if len(one.absolute_path) == deep]
    )


def _said(error: ValidationError, field: str) -> tuple[str, str]:
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = (error.schema or {}).get("properties") or {}
        unknown = sorted(set(error.instance) - set(known))
        return path_of([field, unknown[0]] if field else unknown[:1]), "unknown field"
    if error.validator == "required" and isinstance(error.instance, dict):
        missing = sorted(set(error.validator_value) - set(error.instance))
        return path_of([field, missing[0]] if field else missing[:1]), "missing"
    return field, error.message[:200]


def _quantities(value: Any, at: str) -> Iterator[Found]:
    """Amounts of `requests` and `limits`: Kubernetes' schemas take any text for them."""
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from _quantities(one, f"{at}[{number}]")
    if not isinstance(value, dict):
        return
    for key, one in value.items():
        place = path_of([at, key])
        if key in ("requests", "limits") and isinstance(one, dict):
            for name, amount in one.items():
                if not _QUANTITY.match(str(amount)):
                    yield Found(path_of([place, name]), f"{amount!r} is not a quantity, e.g. 500m or 4Gi")
        else:
            yield from _quantities(one, place)


@cache
def _files() -> dict[str, tuple[Any, dict[str, Any]]]:
    found = {}
    for file in sorted(_FOLDER.glob("*.yaml")):
        whole = yaml.safe_load(file.read_text())
        found.update({kind: (schema, whole["$defs"]) for kind, schema in whole["kinds"].items()})
    return found


@cache
def _custom(kind: str) -> Draft202012Validator | None:
    if kind not in _files():
        return None
    schema, definitions = _files()[kind]
    return Draft202012Validator({"$defs": definitions, **schema})


@cache
def _builtin(kind: str, group: str) -> Draft202012Validator | None:
    short = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", group)
    folder = f"kubernetes-json-schema/v{_version()}-local-strict"
    try:
        schema = schema_contents(f"{folder}/{kind.lower()}-{short}.json", KUBERNETES)
    except FileNotFoundError:
        return None
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(folder))


@cache
def _definitions(folder: str) -> Registry[Any]:
    registry: Registry[Any] = Registry()
    return Resource.from_contents(schema_contents(f"{folder}/_definitions.json", KUBERNETES)) @ registry


@cache
def _version() -> str:
    from kubernetes_validate.utils import all_versions, major_minor

    return [version for version in all_versions() if major_minor(version) == KUBERNETES][-1]


@cache
def _some_version(kind: str) -> bool:
    groups = (
        "v1",
        "apps/v1",
        "batch/v1",
        "policy/v1",
        "networking.k8s.io/v1",
        "rbac.authorization.k8s.io/v1",
    )
    groups += ("autoscaling/v2", "scheduling.k8s.io/v1", "storage.k8s.io/v1")
    ours = any(known.endswith(f"/{kind}") for known in _files())
    return ours or any(_builtin(kind, group) is not None for group in groups)
