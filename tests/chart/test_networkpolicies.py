"""The connections that the NetworkPolicies allow, computed as a CNI does: any other connection is closed."""

from typing import Any

import pytest

from tests.chart.rendering import COMPONENT, NAMESPACE, SCENARIOS, Object, Pod, Release, render, scenario

Labels = dict[str, str]
PODS = "10.0.0.0/8"
"""The network of the pods, where a policy names it."""


def _matches(selector: Object, labels: Labels) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"]
        for rule in selector.get("matchExpressions", [])
    )


def _lets(rule: Object, side: str, port: int, labels: Labels | None, namespace: str) -> bool:
    """Whether an edge fits: the pods of that side have these labels, or are outside of the cluster (None)."""
    if "ports" in rule and not any(
        each["port"] == port and each.get("protocol", "TCP") == "TCP" for each in rule["ports"]
    ):
        return False
    for peer in rule.get(side, []):
        if "ipBlock" in peer:
            if peer["ipBlock"]["cidr"] == "0.0.0.0/0" and not (
                labels is not None and PODS in peer["ipBlock"].get("except", [])
            ):
                return True
        elif labels is not None:
            there = {"kubernetes.io/metadata.name": namespace}
            home = _matches(peer["namespaceSelector"], there) if "namespaceSelector" in peer else namespace == NAMESPACE
            if home and _matches(peer.get("podSelector", {}), labels):
                return True
    return side not in rule


def _open(release: Release, way: str, pod: Pod, port: int, other: Labels | None, namespace: str = NAMESPACE) -> bool:
    side = {"Ingress": "from", "Egress": "to"}[way]
    policies = [each["spec"] for each in release.of("NetworkPolicy")]
    own = [
        each
        for each in policies
        if _matches(each["podSelector"], pod.metadata["labels"]) and way in each["policyTypes"]
    ]
    return not own or any(
        _lets(rule, side, port, other, namespace) for each in own for rule in each.get(way.lower(), [])
    )


def reaches(release: Release, source: Pod, target: Pod, port: int) -> bool:
    return _open(release, "Egress", source, port, target.metadata["labels"]) and _open(
        release, "Ingress", target, port, source.metadata["labels"]
    )


def admits(release: Release, target: Pod, port: int, labels: Labels, namespace: str) -> bool:
    return _open(release, "Ingress", target, port, labels, namespace)


def _port(pod: Pod) -> int:
    """That for other parts."""
    return int(pod.main["ports"][0]["containerPort"])


EDGES = {
    "api": {"postgres", "store"},
    "worker": {"postgres", "store", "prefect-server", "llm", "api"},
    "steward": {"postgres", "store", "prefect-server"},
    "prefect-server": {"postgres"},
    "llm": set[str](),
    "postgres": set[str](),
    "store": set[str](),
    "setup": {"postgres", "store"},
    "test": {"postgres", "store", "api"},
}
"""All open connections between parts of a release; the API is open to every pod that may send at all."""


@pytest.mark.parametrize("name", ["defaults", "seaweedfs", "everything"])
def test_parts_reach_what_they_need_and_nothing_else(name: str) -> None:
    release = scenario(name)
    pods = {pod.component: pod for pod in release.pods}
    found = {
        source: {
            target
            for target, pod in pods.items()
            if pod.runs_on and target != source and reaches(release, pods[source], pod, _port(pod))
        }
        for source in pods
    }
    assert found == EDGES


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_port_of_a_policy_is_one_of_the_containers(name: str) -> None:
    """A policy for a port without a listener lets nothing through, and reports no error."""
    release = scenario(name)
    for policy in release.of("NetworkPolicy"):
        chosen = [pod for pod in release.pods if _matches(policy["spec"]["podSelector"], pod.metadata["labels"])]
        assert chosen, policy["metadata"]["name"]
        listening = {port["containerPort"] for pod in chosen for port in pod.main.get("ports", [])}
        asked = {port["port"] for rule in policy["spec"].get("ingress", []) for port in rule["ports"]}
        assert asked <= listening, policy["metadata"]["name"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_open_but_what_is_opened(name: str) -> None:
    release = scenario(name)
    rogue = {"app": "rogue"}
    for pod in release.pods:
        for container_port in pod.main.get("ports", []):
            port = container_port["containerPort"]
            assert admits(release, pod, port, rogue, "elsewhere") == (
                port == 8000 and not {"ingressNamespace", "apiPeers"} & _values(name).keys()
            ), pod.name


def _values(name: str) -> dict[str, Any]:
    return SCENARIOS[name].get("networkPolicy", {})


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_pod_may_resolve_names(name: str) -> None:
    release = scenario(name)
    [everybody] = [
        each for each in release.of("NetworkPolicy") if COMPONENT not in each["spec"]["podSelector"]["matchLabels"]
    ]
    assert all(_matches(everybody["spec"]["podSelector"], pod.metadata["labels"]) for pod in release.pods)
    rule = everybody["spec"]["egress"][0]
    assert "to" not in rule, "a node's own resolver has an address of its own"
    assert {(each["port"], each["protocol"]) for each in rule["ports"]} >= {(53, "UDP"), (53, "TCP")}


def test_the_metadata_service_of_clouds_is_closed() -> None:
    release = scenario("defaults")
    blocks = [
        peer["ipBlock"]
        for policy in release.of("NetworkPolicy")
        for rule in policy["spec"].get("egress", [])
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    ]
    assert {block["cidr"]: block.get("except") for block in blocks} == {
        "0.0.0.0/0": ["169.254.169.254/32"],
        "::/0": ["fd00:ec2::254/128", "fd20:ce::254/128"],
    }


def test_the_front_door_can_be_left_to_the_ingress_controller() -> None:
    release = scenario("everything")
    api, pages = release.pod("api"), release.pod("prefect-server")
    assert admits(release, api, 8000, {"any": "pod"}, "traefik")
    assert not admits(release, api, 8000, {"any": "pod"}, "elsewhere")
    assert admits(release, api, 8000, {"any": "pod"}, NAMESPACE), "by apiPeers"
    assert admits(release, pages, 4200, {"any": "pod"}, "traefik")
    assert not admits(scenario("defaults"), scenario("defaults").pod("prefect-server"), 4200, {}, "traefik")


def test_the_front_door_can_be_left_to_peers_only() -> None:
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "traefik"}}}
    release = render({"networkPolicy": {"apiPeers": [peer]}})
    api = release.pod("api")
    assert admits(release, api, 8000, {"any": "pod"}, "traefik")
    assert not admits(release, api, 8000, {"any": "pod"}, "elsewhere")
    assert reaches(release, release.pod("worker"), api, 8000)


def test_prometheus_reads_the_metrics_of_api_workers_and_steward() -> None:
    release = scenario("everything")
    for pod in release.pods:
        for port in [each["containerPort"] for each in pod.main["ports"]] if pod.runs_on else ():
            expected = port in (8081, 8082, 8084)
            assert admits(release, pod, port, {"any": "pod"}, "monitoring") == expected, pod.name


def test_keda_reads_the_backlog_when_it_is_asked_to() -> None:
    operator = {"app": "keda-operator"}
    for name in SCENARIOS:
        if release := scenario(name):
            for pod in release.pods:
                if pod.component == "postgres":
                    assert admits(release, pod, 5432, operator, "keda") == (name == "keda")
                    assert not admits(release, pod, 5432, {"app": "other"}, "keda")


def test_what_is_elsewhere_is_reached_by_its_port() -> None:
    release = scenario("external")
    api, steward, setup = (release.pod(component) for component in ("api", "steward", "setup"))
    assert all(_open(release, "Egress", pod, port, None) for pod in (api, steward, setup) for port in (6432, 9443))
    assert not _open(release, "Egress", api, 443, None)
    assert _open(release, "Egress", steward, 443, None), "Prefect's"


def test_the_port_of_a_database_is_that_of_its_url() -> None:
    external = {"url": "postgresql://b:p@h:25060/b", "prefectUrl": "postgresql://p:p@[::1]:6432,h/p?sslmode=require"}
    release = render({"postgres": {"mode": "external", "external": external}})
    for component in ("api", "worker", "steward", "setup", "prefect-server"):
        pod = release.pod(component)
        assert all(_open(release, "Egress", pod, port, None) for port in (25060, 6432, 5432)), component
    release = render({"postgres": {"mode": "external", "external": external | {"prefectUrl": external["url"]}}})
    assert not _open(release, "Egress", release.pod("api"), 5432, None)


def test_they_can_be_left_out() -> None:
    assert not render({"networkPolicy": {"enabled": False}}).of("NetworkPolicy")


def test_releases_in_one_namespace_keep_to_themselves() -> None:
    """Only the API is open to them, as to every other pod."""
    ours, theirs = scenario("defaults"), render({}, name="other")
    for target in ours.pods:
        if target.runs_on and target.component != "api":
            promoted = {
                pod.name
                for pod in theirs.pods
                if admits(ours, target, _port(target), pod.metadata["labels"], NAMESPACE)
            }
            assert not promoted, target.name
    for policy in ours.of("NetworkPolicy"):
        chosen = [pod.name for pod in theirs.pods if _matches(policy["spec"]["podSelector"], pod.metadata["labels"])]
        assert not chosen, policy["metadata"]["name"]


def test_blocked_networks_do_not_cut_workers_off_their_servers() -> None:
    blocked = ["169.254.169.254/32", PODS, "172.16.0.0/12", "192.168.0.0/16"]
    release = render({"networkPolicy": {"blockedCidrs": blocked}})
    pods = {pod.component: pod for pod in release.pods if pod.runs_on}
    for source, targets in EDGES.items():
        for target in targets if source in ("worker", "steward") else ():
            assert reaches(release, pods[source], pods[target], _port(pods[target])), f"{source} to {target}"
    assert not _open(release, "Egress", pods["worker"], 9999, {"app": "another"}), "what tasks reach is still blocked"
    elsewhere = {
        "networkPolicy": {"blockedCidrs": blocked},
        "postgres": {"mode": "external", "external": {"url": "postgresql://b:p@h:6432/b", "port": 6432}},
        "prefectServer": {"mode": "external", "external": {"apiUrl": "http://prefect.example.org:4200/api"}},
        "store": {"mode": "external", "external": {"bucket": "b", "endpoint": "http://s3.example.org:9000"}},
        "model": {"baseUrl": "http://models.example.org:8080/v1"},
    }
    release = render(elsewhere)
    for component, ports in (("worker", (6432, 4200, 9000, 8080)), ("steward", (6432, 4200, 9000, 443, 6443))):
        pod = release.pod(component)
        for port in ports:
            assert _open(release, "Egress", pod, port, {"app": "theirs"}), f"{component} to port {port}"
    for policy in release.of("NetworkPolicy", "worker"):
        for rule in policy["spec"]["egress"]:
            blocks = [peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer]
            assert all("169.254.169.254/32" in block["except"] for block in blocks if ":" not in block["cidr"])
