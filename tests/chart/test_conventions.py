"""Values in the forms that users of other charts know."""

from typing import Any

import pytest

from tests.chart.rendering import Object, refusal, render

COMMON = {"commonLabels": {"team": "casting"}, "commonAnnotations": {"example.org/owner": "casting"}}


def environment(pod: Any) -> dict[str, Object]:
    return {each["name"]: {name: value for name, value in each.items() if name != "name"} for each in pod.main["env"]}


def test_variables_may_be_a_list_or_a_map() -> None:
    secret = {"valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    as_map = {"ZONE": "a", "PORT": 1, "TOKEN": secret}
    as_list = [{"name": "ZONE", "value": "a"}, {"name": "PORT", "value": "1"}, {"name": "TOKEN", **secret}]
    found = [environment(render({"extraEnv": given}).pod("api")) for given in (as_map, as_list)]
    assert found[0] == found[1]
    assert found[0].items() >= {"ZONE": {"value": "a"}, "PORT": {"value": "1"}, "TOKEN": secret}.items()


def test_a_list_of_variables_keeps_its_order_and_wins_over_the_charts() -> None:
    given = [
        {"name": "Z", "value": "1"},
        {"name": "A", "value": "$(Z)2"},
        {"name": "BACKCAST_CONFIG", "value": "/mine"},
    ]
    pools = {"pools": {"default": {"env": [{"name": "Z", "value": "3"}], "extraEnv": {"M": "m"}}}}
    pod = render({"extraEnv": given, "workers": pools}).pod("worker")
    names = [each["name"] for each in pod.main["env"]]
    assert len(set(names)) == len(names)
    assert names[-4:] == ["Z", "A", "BACKCAST_CONFIG", "M"]
    assert (environment(pod)["Z"], environment(pod)["BACKCAST_CONFIG"]) == ({"value": "3"}, {"value": "/mine"})


def test_secrets_for_pulling_are_names_or_references() -> None:
    [both] = {str(pod.spec["imagePullSecrets"]) for pod in render({"imagePullSecrets": ["one", {"name": "two"}]}).pods}
    assert both == str([{"name": "one"}, {"name": "two"}])


@pytest.mark.parametrize("values", [{}, {"ingress": {"host": "h"}, "api": {"service": {"annotations": {"a": "b"}}}}])
def test_every_object_and_every_pod_has_the_common_labels_and_annotations(values: dict[str, Any]) -> None:
    release = render({**values, **COMMON})
    for metadata in [*(each["metadata"] for each in release.objects), *(pod.metadata for pod in release.pods)]:
        assert metadata["labels"].items() >= COMMON["commonLabels"].items(), metadata
        assert metadata["annotations"].items() >= COMMON["commonAnnotations"].items(), metadata
    selectors = [each["spec"]["selector"] for each in release.objects if each["kind"] in ("Deployment", "StatefulSet")]
    assert "team" not in str(
        [*selectors, *(each["spec"].get("volumeClaimTemplates") for each in release.of("StatefulSet"))]
    )


def test_a_label_of_the_users_takes_the_place_of_a_default() -> None:
    theirs = {"app.kubernetes.io/part-of": "shop", "app.kubernetes.io/version": "theirs"}
    release = render({"commonLabels": theirs})
    for metadata in [*(each["metadata"] for each in release.objects), *(pod.metadata for pod in release.pods)]:
        assert metadata["labels"].items() >= theirs.items(), metadata
    for text in release.files.values():
        for each in text.split("\n---"):
            keys = [line for line in each.partition("\nspec:")[0].splitlines() if "part-of" in line]
            assert len(keys) <= 1, each


def test_several_hosts() -> None:
    ingress = {"host": "a.example.org", "hosts": ["b.example.org", "a.example.org"], "tls": {"enabled": True}}
    spec = render({"ingress": ingress}).the("Ingress", "api")["spec"]
    assert [rule["host"] for rule in spec["rules"]] == ["a.example.org", "b.example.org"]
    assert spec["tls"][0]["hosts"] == ["a.example.org", "b.example.org"]
    [rule] = render({"ingress": {"hosts": ["only.example.org"]}}).the("Ingress", "api")["spec"]["rules"]
    assert rule["host"] == "only.example.org"
    assert "host" not in render({}).the("Ingress", "api")["spec"]["rules"][0]


def test_a_path_is_known_to_the_api() -> None:
    release = render({"ingress": {"path": "/casts"}})
    assert release.the("Ingress", "api")["spec"]["rules"][0]["http"]["paths"][0]["path"] == "/casts"
    assert release.config["api"]["prefix"] == "/casts"
    assert render({}).config["api"]["prefix"] == ""


NAMED = {
    "auth": {"existingSecret": "s"},
    "prefectServer": {"auth": {"existingSecret": "s"}},
    "postgres": {"bundled": {"existingSecret": "s"}},
    "store": {"bundled": {"existingSecret": "s"}},
}


def test_secrets_may_be_demanded() -> None:
    """Where the chart is rendered without a cluster, a generated key would be another one each time."""
    sentence = refusal({"requireExistingSecrets": True})
    assert (
        "requireExistingSecrets is on, and the chart would generate keys: set auth.existingSecret, "
        "postgres.bundled.existingSecret, prefectServer.auth.existingSecret, store.bundled.existingSecret."
    ) in sentence
    for part in NAMED:
        assert f"set {part}" in refusal(
            {"requireExistingSecrets": True, **{k: v for k, v in NAMED.items() if k != part}}
        )
    release = render({"requireExistingSecrets": True, **NAMED})
    assert not release.of("Secret")
    assert release.objects == render({"requireExistingSecrets": True, **NAMED}).objects, "no render differs"


ALL = {"api", "worker", "steward", "llm"}


@pytest.mark.parametrize(
    ("config", "rolls"),
    [
        ({"log_level": "debug"}, ALL),
        ({"api": {"max_body": 2097152}}, {"api"}),
        ({"worker": {"stall": 3}}, {"worker"}),
        ({"steward": {"keep_runs": "P1D"}}, {"steward"}),
        ({"store": {"timeout": 5}}, {"api", "worker", "steward"}),
        ({"model": {"max_tokens": 100}}, {"worker", "llm"}),
        ({"setup": {"patience": 600}}, set[str]()),
    ],
)
def test_a_setting_restarts_only_the_pods_that_read_it(config: dict[str, Any], rolls: set[str]) -> None:
    before, after = (
        {
            pod.component: pod.metadata["annotations"]
            for pod in render(values).pods
            if pod.runs_on and pod.component in ALL
        }
        for values in ({}, {"config": config})
    )
    assert {component for component in before if before[component] != after[component]} == rolls
