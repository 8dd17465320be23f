"""Every overlay passes everything that can be known without a cluster, and planted mistakes are named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from contracts.errors import ConfigError
from k8s.build import OVERLAYS, ROOT, build, parse
from k8s.check import check, main
from k8s.findings import Object
from k8s.references import prerequisites
from k8s.serve_config import rendered
from tests.tools import debian_binary

Change = Callable[[list[Object]], None]
RULE = {
    "apiVersion": "monitoring.coreos.com/v1",
    "kind": "PrometheusRule",
    "metadata": {"name": "planted"},
    "spec": {
        "groups": [{"name": "planted", "rules": [{"alert": "Planted", "expr": "sum(rate(up[5m])) > 1"}]}]
    },
}
MONITOR = {
    "apiVersion": "monitoring.coreos.com/v1",
    "kind": "PodMonitor",
    "metadata": {"name": "planted"},
    "spec": {
        "selector": {"matchLabels": {"app.kubernetes.io/component": "router", "ray.io/node-type": "worker"}},
        "podMetricsEndpoints": [{"port": "router", "path": "/metrics"}],
    },
}


@pytest.fixture(scope="module")
def kubectl() -> str:
    """A real kubectl, whose kustomize builds the overlays."""
    return str(debian_binary("kubectl", "kubectl"))


@pytest.fixture(scope="module")
def promtool() -> str:
    """Prometheus' own reader of rules."""
    return str(debian_binary("prometheus", "promtool"))


@pytest.fixture(scope="module")
def overlays(kubectl: str) -> dict[str, list[Object]]:
    """Overlay → its objects."""
    return {name: build(ROOT / "overlays" / name, kubectl) for name in OVERLAYS}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_no_mistake(name: str, overlays: dict[str, list[Object]], promtool: str) -> None:
    """Schemas, Serve config, configuration files, PromQL, references and policy: nothing to say."""
    assert [str(finding) for finding in check(overlays[name], promtool)] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_runs_the_whole_stack(name: str, overlays: dict[str, list[Object]]) -> None:
    """A RayService with router, controller and teacher; a RayJob; the admin API; policies and budgets."""
    made = {(item["kind"], item["metadata"]["name"]) for item in overlays[name]}
    assert {
        ("RayService", "stillhouse"),
        ("RayJob", "stillhouse-distill"),
        ("Deployment", "stillhouse-admin"),
        ("NetworkPolicy", "stillhouse-deny"),
        ("PodDisruptionBudget", "stillhouse-routers"),
        ("PersistentVolumeClaim", "stillhouse-artifacts"),
    } <= made
    assert ("RayCronJob", "stillhouse-distill-weekly") in made or name != "production"
    told = yaml.safe_load(one(overlays[name], "RayService")["spec"]["serveConfigV2"])
    apps = [app["name"] for app in told["applications"]]
    assert apps == ["upstream-teacher", "stillhouse-router", "stillhouse-controller"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_serve_yaml_is_what_up_would_run(name: str) -> None:
    """The file in the repository is the one that the program writes from stillhouse.yaml."""
    folder = ROOT / "overlays" / name
    assert (folder / "serve.yaml").read_text() == rendered(folder)


def test_only_production_like_overlays_need_what_others_make(overlays: dict[str, list[Object]]) -> None:
    """cpu-dev starts on an empty cluster: the one Secret that it cannot do without is its own."""
    secrets = {item["metadata"]["name"] for item in overlays["cpu-dev"] if item["kind"] == "Secret"}
    assert secrets == {"stillhouse-state"}
    for name in ("gpu", "production"):
        assert not [item for item in overlays[name] if item["kind"] == "Secret"]
    assert "stillhouse-state" in prerequisites()["Secret"]


# planted mistakes -------------------------------------------------------------------------------


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The object of that kind (and name)."""
    found = [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    assert len(found) == 1, f"{kind} {name}: {len(found)}"
    return found[0]


def cluster(objects: list[Object]) -> dict[str, Any]:
    """The RayService's cluster."""
    found: dict[str, Any] = one(objects, "RayService")["spec"]["rayClusterConfig"]
    return found


def group(objects: list[Object], name: str = "routers") -> dict[str, Any]:
    """A worker group of the RayService."""
    return next(g for g in cluster(objects)["workerGroupSpecs"] if g["groupName"] == name)


def container(objects: list[Object], name: str = "routers") -> dict[str, Any]:
    """The container of a worker group."""
    found: dict[str, Any] = group(objects, name)["template"]["spec"]["containers"][0]
    return found


def admin(objects: list[Object]) -> dict[str, Any]:
    """The admin API's pod."""
    found: dict[str, Any] = one(objects, "Deployment")["spec"]["template"]["spec"]
    return found


def discovery(objects: list[Object]) -> dict[str, Any]:
    """How Prometheus finds engines."""
    found: dict[str, Any] = one(objects, "ScrapeConfig")["spec"]["httpSDConfigs"][0]
    return found


def serve(objects: list[Object], old: str, new: str) -> None:
    """Change the text of the Serve config."""
    spec = one(objects, "RayService")["spec"]
    assert old in spec["serveConfigV2"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new, 1)


def stack(objects: list[Object], old: str, new: str, file: str = "stillhouse.yaml") -> None:
    """Change the text of an embedded configuration."""
    data = one(objects, "ConfigMap", "stillhouse-config")["data"]
    assert old in data[file]
    data[file] = data[file].replace(old, new, 1)


def put(target: Callable[[list[Object]], dict[str, Any]], **values: Any) -> Change:
    """Set fields of a part."""
    return lambda objects: target(objects).update(values)


def drop(target: Callable[[list[Object]], dict[str, Any]], key: str) -> Change:
    """Remove a field of a part."""

    def change(objects: list[Object]) -> None:
        del target(objects)[key]

    return change


def rule(expression: str) -> Change:
    """Plant an alert."""

    def change(objects: list[Object]) -> None:
        planted = copy.deepcopy(RULE)
        planted["spec"]["groups"][0]["rules"][0]["expr"] = expression  # type: ignore[index]
        objects.append(planted)

    return change


def monitor(**endpoint: Any) -> Change:
    """Plant a PodMonitor whose endpoint differs."""

    def change(objects: list[Object]) -> None:
        planted = copy.deepcopy(MONITOR)
        planted["spec"]["podMetricsEndpoints"][0].update(endpoint)  # type: ignore[index]
        objects.append(planted)

    return change


RAY = "RayService/stillhouse"
GROUP = "spec.rayClusterConfig.workerGroupSpecs[0]"
POD = f"{GROUP}.template.spec"
BOX = f"{POD}.containers[0]"
CONFIG = "ConfigMap/stillhouse-config"
BUDGET = "PodDisruptionBudget/stillhouse-routers"
ADMIN = "Deployment/stillhouse-admin"
BASE = "base/rayservice.yaml"
MISTAKES: dict[str, tuple[Change, str, str, str, str]] = {
    # what: (the mistake, file, object, field, what is said)
    "misspelt field of Kubernetes": (
        lambda o: admin(o)["containers"][0].update(imagePullPolice="Always"),
        "base/admin.yaml", ADMIN, "spec.template.spec.containers[0].imagePullPolice", "unknown field",
    ),
    "misspelt field of KubeRay": (
        put(group, minReplica=2), BASE, RAY, f"{GROUP}.minReplica", "unknown field",
    ),
    "misspelt field of a pod in a custom resource": (
        put(container, volumeMount=[]), BASE, RAY, f"{BOX}.volumeMount", "unknown field",
    ),
    "wrong type": (
        lambda o: one(o, "Deployment")["spec"].update(replicas="two"),
        "base/admin.yaml", ADMIN, "spec.replicas", "'two'",
    ),
    "wrong type in a custom resource": (
        put(group, maxReplicas="8"), BASE, RAY, f"{GROUP}.maxReplicas", "'8' is not of type",
    ),
    "unknown kind": (
        lambda o: one(o, "PodDisruptionBudget", "stillhouse-routers").update(kind="PodDisruptionBudgets"),
        "base/disruption.yaml", "PodDisruptionBudgets/stillhouse-routers", "kind", "no schema is known",
    ),
    "wrong apiVersion": (
        lambda o: one(o, "Deployment").update(apiVersion="apps/v1beta1"),
        "base/admin.yaml", ADMIN, "apiVersion", "no schema is known",
    ),
    "apiVersion of an older KubeRay": (
        lambda o: one(o, "RayService").update(apiVersion="ray.io/v1alpha1"),
        BASE, RAY, "apiVersion", "no schema is known",
    ),
    "missing field": (
        drop(group, "rayStartParams"), BASE, RAY, f"{GROUP}.rayStartParams", "missing",
    ),
    "bad PromQL": (
        rule("sum(rate(up[5m]) > 1"),
        "kustomization.yaml", "PrometheusRule/planted", "spec.groups[0].rules[0]", "left parenthesis",
    ),
    "unknown PromQL function": (
        rule("rates(up[5m])"),
        "kustomization.yaml", "PrometheusRule/planted", "spec.groups[0].rules[0]", "unknown function",
    ),
    "unknown key of the Serve config": (
        lambda o: serve(o, "proxy_location:", "proxy_locations:"),
        BASE, RAY, "spec.serveConfigV2.proxy_locations", "unknown field of Ray's Serve config",
    ),
    "value that Ray's schema refuses": (
        lambda o: serve(o, "proxy_location: EveryNode", "proxy_location: Everywhere"),
        BASE, RAY, "spec.serveConfigV2.proxy_location", "Input should be",
    ),
    "import path that is not there": (
        lambda o: serve(o, "serve.app:build", "serve.app:built"),
        BASE, RAY, "spec.serveConfigV2.applications[0].import_path", "cannot be imported",
    ),
    "unknown argument of an application": (
        lambda o: serve(o, "    application: stillhouse-router", "    app: stillhouse-router"),
        BASE, RAY, "spec.serveConfigV2.applications[1].args.app", "unknown key",
    ),
    "configuration that no pod mounts": (
        lambda o: serve(o, "config: /etc/stillhouse/", "config: /etc/stack/"),
        BASE, RAY, "spec.serveConfigV2.applications[0].args.config", "no pod mounts",
    ),
    "configuration changed without its revision": (
        lambda o: stack(o, "look_s: 60", "look_s: 61"),
        BASE, RAY, "spec.serveConfigV2.applications[1].args.revision", "k8s.serve_config",
    ),
    "upstream that the Serve config does not start": (
        lambda o: serve(o, "application: upstream-teacher", "application: upstream-teachers"),
        BASE, RAY, "spec.serveConfigV2.applications[0].args.application", "upstream-teacher",
    ),
    "unknown field of stillhouse.yaml": (
        lambda o: stack(o, "  replicas: 6", "  replicaz: 6"),
        "kustomization.yaml", CONFIG, "data[stillhouse.yaml].router.replicaz", "unknown key",
    ),
    "route to an upstream that is not there": (
        lambda o: stack(o, "  support: teacher", "  support: teachers"),
        "kustomization.yaml", CONFIG, "data[stillhouse.yaml].(top level)", "no upstream 'teachers'",
    ),
    "unknown field of distill.yaml": (
        lambda o: stack(o, "  epochs: 3", "  epoch: 3", "distill.yaml"),
        "kustomization.yaml", CONFIG, "data[distill.yaml].train.epoch", "unknown key",
    ),
    "variable that nobody sets": (
        lambda o: stack(o, "${STILLHOUSE_LOG_URL}", "${STILLHOUSE_LOGS}"),
        "kustomization.yaml", CONFIG, "data[stillhouse.yaml]", "${STILLHOUSE_LOGS}",
    ),
    "engine that only its own pod reaches": (
        lambda o: stack(o, "      host: null", "      host: 127.0.0.1"),
        "kustomization.yaml", CONFIG, "data[stillhouse.yaml].upstreams.teacher.engine.host", "other pods",
    ),
    "replicas without room": (
        put(group, maxReplicas=2), BASE, RAY, "spec.rayClusterConfig.workerGroupSpecs", "6 replica(s)",
    ),
    "name of a Secret that nobody makes": (
        lambda o: container(o)["env"][0]["valueFrom"]["secretKeyRef"].update(name="stillhouse-stat"),
        BASE, RAY, f"{BOX}.env[0].valueFrom.secretKeyRef", "no Secret 'stillhouse-stat'",
    ),
    "key that a Secret does not have": (
        lambda o: container(o)["env"][0]["valueFrom"]["secretKeyRef"].update(key="uri"),
        BASE, RAY, f"{BOX}.env[0].valueFrom.secretKeyRef", "not 'uri'",
    ),
    "key of Prometheus that nobody makes": (
        lambda o: discovery(o)["authorization"]["credentials"].update(name="stillhouse-prom"),
        "monitoring/scrape.yaml", "ScrapeConfig/stillhouse-engines",
        "spec.httpSDConfigs[0].authorization.credentials", "no Secret 'stillhouse-prom'",
    ),
    "misspelt authorization of a scrape": (
        lambda o: discovery(o).update(authorization={"credential": {}}),
        "monitoring/scrape.yaml", "ScrapeConfig/stillhouse-engines",
        "spec.httpSDConfigs[0].authorization.credential", "unknown field",
    ),
    "name of a ConfigMap that nobody makes": (
        lambda o: group(o)["template"]["spec"]["volumes"][0]["configMap"].update(name="stillhouse-conf"),
        BASE, RAY, f"{POD}.volumes[0].configMap.name", "no ConfigMap 'stillhouse-conf'",
    ),
    "account that is not there": (
        lambda o: group(o)["template"]["spec"].update(serviceAccountName="stillhouse-workers"),
        BASE, RAY, f"{POD}.serviceAccountName", "no ServiceAccount",
    ),
    "mount without a volume": (
        lambda o: container(o)["volumeMounts"][0].update(name="configs"),
        BASE, RAY, f"{BOX}.volumeMounts[0].name", "no volume 'configs'",
    ),
    "image that moves": (
        put(container, image="stillhouse:latest"), BASE, RAY, f"{BOX}.image", "another image tomorrow",
    ),
    "image without a tag": (
        put(container, image="stillhouse"), BASE, RAY, f"{BOX}.image", "has no tag",
    ),
    "no memory limit": (
        lambda o: container(o)["resources"]["limits"].pop("memory"),
        BASE, RAY, f"{BOX}.resources.limits.memory", "missing",
    ),
    "request above its limit": (
        lambda o: container(o)["resources"]["requests"].update(memory="40Gi"),
        BASE, RAY, f"{BOX}.resources.requests.memory", "more than its limit",
    ),
    "bad quantity": (
        lambda o: container(o)["resources"]["limits"].update(memory="4 GB"),
        BASE, RAY, f"{BOX}.resources.limits.memory", "not a quantity",
    ),
    "root": (
        lambda o: group(o)["template"]["spec"]["securityContext"].update(runAsUser=0),
        BASE, RAY, f"{BOX}.securityContext.runAsUser", "is root",
    ),
    "writable root": (
        lambda o: container(o)["securityContext"].update(readOnlyRootFilesystem=False),
        BASE, RAY, f"{BOX}.securityContext.readOnlyRootFilesystem", "must be true",
    ),
    "password in a manifest": (
        lambda o: container(o)["env"].append({"name": "MLFLOW_TRACKING_PASSWORD", "value": "swordfish"}),
        BASE, RAY, f"{BOX}.env[11].value", "plain text",
    ),
    "no probe": (
        lambda o: admin(o)["containers"][0].pop("readinessProbe"),
        "base/admin.yaml", ADMIN, "spec.template.spec.containers[0].readinessProbe", "missing",
    ),
    "probe of a port that is not there": (
        lambda o: admin(o)["containers"][0]["livenessProbe"]["httpGet"].update(port="http"),
        "base/admin.yaml", ADMIN, "spec.template.spec.containers[0].livenessProbe.httpGet.port", "'http'",
    ),
    "service port that no pod has": (
        lambda o: one(o, "Service", "stillhouse-admin")["spec"]["ports"][0].update(targetPort="http"),
        "base/admin.yaml", "Service/stillhouse-admin", "spec.ports[0].targetPort", "no selected pod",
    ),
    "monitor of a port that no pod has": (
        monitor(port="routers"),
        "kustomization.yaml", "PodMonitor/planted", "spec.podMetricsEndpoints[0].port", "no selected pod",
    ),
    "selector that matches nothing": (
        lambda o: one(o, "Service", "stillhouse-admin")["spec"]["selector"].update(
            {"app.kubernetes.io/component": "admins"}
        ),
        "base/admin.yaml", "Service/stillhouse-admin", "spec.selector", "selects no pod",
    ),
    "policy that protects nothing": (
        lambda o: one(o, "NetworkPolicy", "stillhouse-clients")["spec"]["podSelector"]["matchLabels"].update(
            {"app.kubernetes.io/component": "routers"}
        ),
        "base/network.yaml", "NetworkPolicy/stillhouse-clients", "spec.podSelector", "selects no pod",
    ),
    "budget that blocks every drain": (
        lambda o: one(o, "PodDisruptionBudget", "stillhouse-routers")["spec"].update(minAvailable=3),
        "base/disruption.yaml", BUDGET, "spec.minAvailable", "no node could ever be drained",
    ),
    "budget that Kubernetes does not take for Ray": (
        lambda o: one(o, "PodDisruptionBudget", "stillhouse-routers")["spec"].update(minAvailable="50%"),
        "base/disruption.yaml", BUDGET, "spec.minAvailable", "whole `minAvailable` only",
    ),
    "preStop longer than the pod lives": (
        lambda o: group(o)["template"]["spec"].update(terminationGracePeriodSeconds=60),
        BASE, RAY, f"{POD}.terminationGracePeriodSeconds", "too short",
    ),
    "worker that does not drain": (
        lambda o: container(o).pop("lifecycle"), BASE, RAY, f"{BOX}.lifecycle.preStop", "cut, not moved",
    ),
    "schedule that is none": (
        lambda o: one(o, "RayCronJob")["spec"].update(schedule="weekly"),
        "distill-schedule/raycronjob.yaml", "RayCronJob/stillhouse-distill-weekly", "spec.schedule", "weekly",
    ),
}  # fmt: skip


def test_what_is_planted_into_is_right_before(overlays: dict[str, list[Object]], promtool: str) -> None:
    """The rule and the monitor that mistakes are planted into are themselves without one."""
    assert check([*overlays["production"], RULE, MONITOR], promtool) == []
    assert len(MISTAKES) >= 25


@pytest.mark.parametrize("what", MISTAKES)
def test_a_planted_mistake_is_named(what: str, overlays: dict[str, list[Object]], promtool: str) -> None:
    """The finding says which file and object it is, which field, and what is wrong; no other is blamed."""
    change, file, name, field, says = MISTAKES[what]
    objects = copy.deepcopy(overlays["production"])
    change(objects)
    found = check(objects, promtool)
    assert any(
        f.object == name and f.field == field and f.file.endswith(file) and says in f.says for f in found
    ), [str(f) for f in found]
    blamed = {f.object for f in found}
    assert blamed <= {name, RAY}, blamed


# the program ------------------------------------------------------------------------------------


def test_the_program_names_overlay_file_object_and_field(
    tmp_path: Path, kubectl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1 and one line a mistake, for CI."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thing.yaml").write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: thing}\nspec: {ports: [{port: 1, portt: 2}]}\n"
    )
    (folder / "kustomization.yaml").write_text(
        "buildMetadata: [originAnnotations]\nresources: [thing.yaml]\n"
    )
    assert main([str(folder), "--kubectl", kubectl]) == 1
    assert (
        capsys.readouterr().out == f"{folder}: thing.yaml: Service/thing spec.ports[0].portt: unknown field\n"
    )


def test_kustomize_and_yaml_errors_are_errors(tmp_path: Path, kubectl: str) -> None:
    """What cannot be built is said in kustomize's words; a key that stands twice is not silently the last."""
    (tmp_path / "kustomization.yaml").write_text("resources: [absent.yaml]\n")
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        build(tmp_path, kubectl)
    with pytest.raises(ConfigError, match="twice"):
        parse("kind: Service\nkind: Pod\n")
