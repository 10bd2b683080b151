"""Each part by itself: its command, the Services that lead to it, its volumes, its rights."""

from typing import Any

import pytest

from tests.chart.rendering import COMPONENT, SCENARIOS, render, scenario


def test_what_each_part_runs() -> None:
    commands = {
        f"{pod.component}/{container['name']}": " ".join(container["args"])
        for pod in scenario("defaults").pods
        for container in pod.containers
    }
    assert commands == {
        "api/api": "api",
        "worker/worker": "worker",
        "steward/steward": "steward",
        "prefect-server/await-database": "await-database",
        "prefect-server/prefect-server": "server start --host 0.0.0.0 --port 4200",
        "llm/llm": "model",
        "postgres/postgres": "-c max_connections=200",
        "store/minio": "minio server /data",
        "setup/setup": "setup",
        "test/check": "check",
        "test/call": "cast We put 31 chairs in the hall --to int --timeout 240",
    }


@pytest.mark.parametrize("listen", ["0.0.0.0", "::"])
def test_one_value_is_the_address_of_every_process(listen: str) -> None:
    release = render({"listen": listen, "store": {"bundled": {"kind": "seaweedfs"}}})
    hosts = {f"{part}.{name}": value for part, its in release.config.items() for name, value in its.items()}
    names = ("api.host", "api.metrics_host", "model.host", "steward.host", "worker.host")
    assert {name: hosts[name] for name in names} == dict.fromkeys(names, listen)
    assert release.pod("prefect-server").main["args"] == ["server", "start", "--host", listen, "--port", "4200"]
    assert f"-s3.ip.bind={listen}" in release.pod("store").main["args"]
    assert any("0.0.0.0" in text.replace("0.0.0.0/0", "") for text in release.files.values()) == (listen == "0.0.0.0")


@pytest.mark.parametrize(
    "values",
    [
        {"tests": {"cast": False}},
        {"workers": {"pools": {"default": {"builtinTasks": False, "tasks": ["own"]}}}},
    ],
)
def test_helm_test_casts_only_where_a_worker_can(values: dict[str, Any]) -> None:
    calls = [pod.main for pod in render(values).pods if pod.main["name"] == "call"]
    assert [call["args"] for call in calls] == [["list"]]


def test_setup_and_tests_can_be_left_out() -> None:
    release = render({"setup": {"enabled": False}, "tests": {"enabled": False}})
    assert not {pod.component for pod in release.pods} & {"setup", "test"}
    assert "setup Job" not in release.notes


@pytest.mark.parametrize("name", SCENARIOS)
def test_services_and_ingresses_lead_to_ports_that_are_there(name: str) -> None:
    release = scenario(name)
    for service in release.of("Service"):
        selector = dict(service["spec"]["selector"])
        first = selector.pop("statefulset.kubernetes.io/pod-name", None)  # which Kubernetes sets
        chosen = [
            pod
            for pod in release.pods
            if selector.items() <= pod.metadata["labels"].items()
            and first in (None, f"{pod.owner['metadata']['name']}-0")
        ]
        assert {pod.component for pod in chosen} == {service["metadata"]["labels"][COMPONENT]}
        [port] = service["spec"]["ports"]
        assert all(port["targetPort"] in [each["containerPort"] for each in pod.main["ports"]] for pod in chosen)
    ports = {
        (each["metadata"]["name"], port["port"]) for each in release.of("Service") for port in each["spec"]["ports"]
    }
    for ingress in release.of("Ingress"):
        [rule] = ingress["spec"]["rules"]
        [path] = rule["http"]["paths"]
        backend = path["backend"]["service"]
        assert (backend["name"], backend["port"]["number"]) in ports
        assert backend["name"] == ingress["metadata"]["name"]


def test_the_only_way_in_is_the_apis() -> None:
    release = scenario("defaults")
    assert {service["spec"].get("type", "ClusterIP") for service in release.of("Service")} == {"ClusterIP"}
    [ingress] = release.of("Ingress")
    assert ingress["metadata"]["labels"][COMPONENT] == "api"
    assert set(ingress["spec"]) == {"rules"}, "no class, no certificate"
    assert "host" not in ingress["spec"]["rules"][0]


def test_an_ingress_by_name_and_with_a_certificate() -> None:
    api, pages = scenario("external").the("Ingress", "api"), scenario("everything").the("Ingress", "prefect-server")
    assert api["spec"]["ingressClassName"] == "nginx"
    assert api["spec"]["tls"] == [{"hosts": ["backcast.example.org"], "secretName": "demo-backcast-api-tls"}]
    assert api["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert pages["spec"]["tls"] == [{"hosts": ["prefect.example.org"], "secretName": "prefect-cert"}]
    assert pages["spec"]["rules"][0]["host"] == "prefect.example.org"


def test_what_is_kept_on_volumes() -> None:
    found = {
        pod.component: (pod.owner["spec"]["volumeClaimTemplates"][0]["spec"], pod.main["volumeMounts"])
        for pod in scenario("everything").pods
        if pod.owner["kind"] == "StatefulSet"
    }
    claim = {"accessModes": ["ReadWriteOnce"]}
    assert found["postgres"][0] == claim | {
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "20Gi"}},
    }
    assert found["store"][0] == claim | {
        "storageClassName": "slow",
        "resources": {"requests": {"storage": "50Gi"}},
    }
    mounts = {part: {mount["name"]: mount["mountPath"] for mount in mounts} for part, (_, mounts) in found.items()}
    assert mounts["postgres"]["data"] == "/var/lib/postgresql/data"
    assert mounts["store"]["data"] == "/data"
    assert "storageClassName" not in str(scenario("defaults").of("StatefulSet")), "the cluster's default"


def test_what_the_steward_may() -> None:
    release = scenario("defaults")
    [rule] = release.the("Role")["rules"]
    assert rule == {"apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]}
    binding = release.the("RoleBinding")
    [subject] = binding["subjects"]
    assert binding["roleRef"]["name"] == release.the("Role")["metadata"]["name"]
    assert release.pod("steward").spec["serviceAccountName"] == subject["name"]
    others = {pod.spec["serviceAccountName"] for pod in release.pods if pod.component != "steward"}
    assert others == {"demo-backcast"}
    assert all(account["automountServiceAccountToken"] is False for account in release.of("ServiceAccount"))
    policy = release.the("ValidatingAdmissionPolicy")
    assert release.the("ValidatingAdmissionPolicyBinding")["spec"]["policyName"] == policy["metadata"]["name"]
    [condition] = policy["spec"]["matchConditions"]
    assert f"system:serviceaccount:team:{subject['name']}'" in condition["expression"]
    for rbac in ({"create": False}, {"admissionPolicy": False}):
        assert not render({"rbac": rbac}).of("ValidatingAdmissionPolicy")


def test_an_account_of_ones_own() -> None:
    release = render({"serviceAccount": {"create": False, "name": "ours"}, "rbac": {"create": False}})
    assert {pod.spec["serviceAccountName"] for pod in release.pods} == {"ours"}
    assert not release.of("ServiceAccount")
    annotated = scenario("everything").of("ServiceAccount")
    assert all("eks.amazonaws.com/role-arn" in account["metadata"]["annotations"] for account in annotated)


def test_the_steward_shares_the_identity_of_an_account_of_ones_own() -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/casting"}
    account = {"create": False, "name": "ours", "annotations": role}
    release = render({"serviceAccount": account, "store": {"mode": "external", "external": {"bucket": "b"}}})
    assert release.the("ServiceAccount")["metadata"]["annotations"] == role
    assert release.pod("steward").spec["serviceAccountName"] == release.the("ServiceAccount")["metadata"]["name"]


def test_more_objects_are_templates_too() -> None:
    objects = scenario("everything").objects
    found = {each["metadata"]["name"]: each["data"] for each in objects if "note" in each.get("data", {})}
    assert found == {"demo-casting-notes": {"note": "as a map"}, "demo-casting-text": {"note": "as a template"}}
