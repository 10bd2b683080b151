"""Rules that every pod of every scenario keeps."""

import re
from typing import Any

import pytest

from tests.chart.rendering import SCENARIOS, Object, Pod, render, scenario

PODS = [pytest.param(pod, id=f"{name}-{pod.name}") for name in SCENARIOS for pod in scenario(name).pods]
CONTAINERS = [
    pytest.param(pod, container, id=f"{name}-{pod.name}-{container['name']}")
    for name in SCENARIOS
    for pod in scenario(name).pods
    for container in pod.containers
]
each_pod = pytest.mark.parametrize("pod", PODS)
each_container = pytest.mark.parametrize(("pod", "container"), CONTAINERS)


@each_pod
def test_the_restricted_standard(pod: Pod) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards: the rules of `restricted`."""
    spec, security = pod.spec, pod.spec["securityContext"]
    assert not any(spec.get(host) for host in ("hostNetwork", "hostPID", "hostIPC"))
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["runAsNonRoot"]
    assert security["runAsUser"] > 0
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for volume in spec["volumes"]:
        assert set(volume) - {"name"} <= kinds, volume
    for container in pod.containers:
        own = container["securityContext"]
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not any(port.get("hostPort") for port in container.get("ports", []))


@each_pod
def test_only_the_steward_has_a_token(pod: Pod) -> None:
    assert pod.spec["automountServiceAccountToken"] is (pod.component == "steward")
    assert pod.spec["enableServiceLinks"] is False


@each_pod
def test_labels_match_the_selector(pod: Pod) -> None:
    selector = pod.owner["spec"].get("selector", {}).get("matchLabels", {})
    assert selector.items() <= pod.metadata["labels"].items()
    assert pod.owner["metadata"]["labels"].items() >= selector.items()
    assert selector or not pod.runs_on


@each_pod
def test_replicas_are_spread_but_never_held_back(pod: Pod) -> None:
    for constraint in pod.spec.get("topologySpreadConstraints", []):
        assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"
        assert constraint["labelSelector"]["matchLabels"] == pod.owner["spec"]["selector"]["matchLabels"]


@each_container
def test_probes_and_resources(pod: Pod, container: Object) -> None:
    assert container["resources"]["limits"]["memory"]
    assert "cpu" not in container["resources"]["limits"]
    if pod.component != "worker":  # a pool may ask for a GPU by limits alone
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    if pod.runs_on and container is pod.main:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["timeoutSeconds"] >= 5, "a busy node answers late"
        ports = {port["containerPort"] for port in container["ports"]}
        assert {probe["port"] for probe in _http_probes(container)} <= ports


def _http_probes(container: Object) -> list[Object]:
    return [container[name]["httpGet"] for name in container if name.endswith("Probe") and "httpGet" in container[name]]


@each_container
def test_every_mount_has_its_volume(pod: Pod, container: Object) -> None:
    volumes = [volume["name"] for volume in pod.spec["volumes"]]
    volumes += [claim["metadata"]["name"] for claim in pod.owner["spec"].get("volumeClaimTemplates", [])]
    assert len(volumes) == len(set(volumes))
    assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)


@each_container
def test_secrets_come_from_secrets(pod: Pod, container: Object) -> None:
    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names))
    for number, variable in enumerate(container["env"]):
        if re.search(r"PASSWORD|_URL|KEY|AUTH_STRING", variable["name"]) and "value" in variable:
            needs = re.findall(r"\$\((\w+)\)", variable["value"])
            assert set(needs) <= set(names[:number]), (
                f"{variable['name']}: Kubernetes expands only variables that stand above"
            )
            assert needs or "@" not in variable["value"], variable


# Images


def images(values: dict[str, Any]) -> dict[str, str]:
    return {
        f"{pod.component}/{container['name']}": container["image"]
        for pod in render(values).pods
        for container in pod.containers
    }


def test_images_of_the_defaults() -> None:
    assert set(images({}).values()) == {
        "ghcr.io/backcast/api:0.1.0",
        "ghcr.io/backcast/worker:0.1.0",
        "ghcr.io/backcast/prefect-server:0.1.0",
        "ghcr.io/backcast/llm:0.1.0",
        "docker.io/library/postgres:17",
        "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z",
    }


@pytest.mark.parametrize("store", ["minio", "seaweedfs"])
def test_one_registry_takes_the_place_of_all(store: str) -> None:
    values = {"global": {"imageRegistry": "mirror.example.org/x/"}, "store": {"bundled": {"kind": store}}}
    found = images(values).values()
    assert all(re.match(r"mirror\.example\.org/x/[a-z]", image) for image in found)
    assert {image.removeprefix("mirror.example.org/x/").split("/")[0] for image in found} == {
        "backcast",
        "library",
        {"minio": "minio", "seaweedfs": "chrislusf"}[store],
    }


def test_a_digest_beats_a_tag() -> None:
    for name, image in images(dict(SCENARIOS["mirror-registry"])).items():
        assert re.fullmatch(r"mirror\.example\.org/backcast/[a-z/-]+@sha256:\d+", image), name


def test_ours_follow_one_tag_and_others_do_not() -> None:
    found = images({"image": {"tag": "next", "registry": "r.example.org"}, "steward": {"image": {"tag": "own"}}})
    ours = {image for name, image in found.items() if name.split("/")[0] not in ("postgres", "store", "steward")}
    assert {image.rpartition(":")[2] for image in ours} == {"next"}
    assert {image.split("/")[0] for image in ours} == {"r.example.org"}
    assert found["steward/steward"] == "r.example.org/backcast/api:own"
    assert found["postgres/postgres"] == "docker.io/library/postgres:17"


# Room


UNITS = {"": 1.0, "m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30}


def _number(quantity: str) -> float:
    [(number, unit)] = re.findall(r"([\d.]+)(\w*)", str(quantity))
    return float(number) * UNITS[unit]


@pytest.mark.parametrize(("name", "cpu", "memory"), [("defaults", 0.9, 3 * 2**30), ("small", 0.5, 2**30)])
def test_the_resources_that_a_release_asks_for(name: str, cpu: float, memory: float) -> None:
    """With the setup Job; a node of 2 CPUs has half of them left for us."""
    asked = {"cpu": 0.0, "memory": 0.0}
    for pod in scenario(name).pods:
        if pod.component == "test":
            continue
        for what in asked:
            most = max(_number(container["resources"]["requests"][what]) for container in pod.containers)
            asked[what] += most * pod.owner["spec"].get("replicas", 1)
    assert asked["cpu"] <= cpu
    assert asked["memory"] <= memory


# Additions of users


def test_extras_reach_every_pod_and_parts_add_to_them() -> None:
    extra = {
        "extraEnv": {"FOR_ALL": "1", "BACKCAST_LOG_LEVEL": "debug"},
        "extraVolumes": [{"name": "all", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "all", "mountPath": "/all"}],
        "podAnnotations": {"all": "1"},
        "podLabels": {"all": "1"},
        "nodeSelector": {"all": "1"},
    }
    own = {
        "env": {"OWN": True, "FOR_ALL": 2000000, "REF": {"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}},
        "extraVolumes": [{"name": "own", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "own", "mountPath": "/own"}],
        "podAnnotations": {"own": "1"},
        "nodeSelector": {"own": "1"},
    }
    release = render(extra | {"workers": {"pools": {"default": own}}})
    for pod in release.pods:
        worker = pod.component == "worker"
        for container in pod.containers:
            found = {variable["name"]: variable.get("value") for variable in container["env"]}
            assert found["FOR_ALL"] == ("2000000" if worker else "1")
            assert found.get("OWN") == ("true" if worker else None)
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/all", "/own"} & mounts == ({"/all", "/own"} if worker else {"/all"})
        assert pod.metadata["annotations"]["all"] == "1"
        assert pod.metadata["labels"]["all"] == "1"
        assert pod.metadata["annotations"].get("own") == ("1" if worker else None)
        assert pod.spec["nodeSelector"] == ({"own": "1"} if worker else {"all": "1"})


def test_a_variable_of_the_users_replaces_the_charts() -> None:
    release = render({"api": {"extraEnv": {"BACKCAST_DATABASE__URL": "postgresql://elsewhere/db"}}})
    [found] = [each for each in release.pod("api").main["env"] if each["name"] == "BACKCAST_DATABASE__URL"]
    assert found == {"name": "BACKCAST_DATABASE__URL", "value": "postgresql://elsewhere/db"}


def test_users_of_their_own_can_be_left_out() -> None:
    """As OpenShift requires: it gives each namespace its own range of users."""
    for pod in render({"podSecurity": {"setUser": False}}).pods:
        assert pod.spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_without_rbac_no_pod_has_a_token() -> None:
    release = render({"rbac": {"create": False}})
    assert not any(pod.spec["automountServiceAccountToken"] for pod in release.pods)
    assert not release.of("Role")
    assert release.config["steward"]["deletion_cost"] is False


@pytest.mark.parametrize(
    ("change", "rolls"),
    [
        ({"config": {"max_attempts": 5}}, {"api", "worker", "steward"}),
        ({"model": {"apiKey": "another"}}, {"worker"}),
        ({"ingress": {"host": "other.example.org"}}, set[str]()),
    ],
)
def test_a_change_of_its_configuration_rolls_a_pod(change: dict[str, Any], rolls: set[str]) -> None:
    base = {"model": {"apiKey": "one"}}
    before, after = (
        {pod.component: (pod.metadata, pod.spec) for pod in release.pods if pod.runs_on}
        for release in (render(base), render(base | change))
    )
    assert {component for component in before if before[component] != after[component]} == rolls
