"""Helm and the cluster accept or refuse values, before anything runs."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.cluster import Cluster
from tests.e2e.images import CHART
from tests.e2e.programs import run
from tests.support.waiting import until

NAMESPACE = "backcast-e2e-values"
SCENARIOS = sorted((CHART / "ci").glob("*.yaml"))
LONGEST = "x" * 53
"""helm's own limit for the name of a release."""

# Wrong values, and words of the one sentence that each gets.
BAD = {
    "unknown key": ({"apii": {"replicas": 2}}, ["apii"]),
    "unknown key inside": ({"api": {"replica": 2}}, ["replica"]),
    "wrong type": ({"api": {"replicas": "many"}}, ["replicas", "integer"]),
    "unknown mode": ({"postgres": {"mode": "cloud"}}, ["mode", "bundled", "external"]),
    "external database without its address": ({"postgres": {"mode": "external"}}, ["postgres.external"]),
    "external store without a bucket": ({"store": {"mode": "external"}}, ["store.external"]),
    "external Prefect without its address": ({"prefectServer": {"mode": "external"}}, ["prefectServer.external"]),
    "no worker at all": ({"workers": {"pools": {"default": None}}}, ["pool"]),
    "a pool with a long name": ({"workers": {"pools": {"a-name-that-is-too-long": {}}}}, ["a-name-that-is-too-long"]),
    "unknown setting": ({"config": {"leese": "PT5S"}}, ["leese"]),
}


async def render(values: Any, *, name: str = "any", check: bool = True) -> Any:
    """The manifests that helm would install, with the cluster's own versions and objects for `lookup`."""
    command = ("helm", "install", name, str(CHART), "-n", NAMESPACE, "--dry-run=server", "-o", "json", "--values", "-")
    return await run(*command, stdin=json.dumps(values), check=check)


def objects(release: dict[str, Any]) -> list[dict[str, Any]]:
    texts = [release["manifest"], *(hook["manifest"] for hook in release.get("hooks") or [])]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


KEYS = ("api-key", "model-api-key", "s3-access-key", "s3-secret-key")


def secret(name: str, *keys: str) -> dict[str, Any]:
    """A Secret made before the release."""
    metadata = {"name": name}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": dict.fromkeys(keys, "any")}


async def accepted(cluster: Cluster, found: list[dict[str, Any]]) -> None:
    """The API server validates every object, admission included, and stores none."""
    known = cluster.groups() | {""}
    here = [each for each in found if each["apiVersion"].rpartition("/")[0] in known | {"v1"}]
    assert len(here) > len(found) // 2
    for each in here:
        if each["kind"] == "Pod":  # its account and its class would have to exist, and neither is stored
            each["spec"] |= {"serviceAccountName": "default"}
            each["spec"].pop("priorityClassName", None)
    body = yaml.safe_dump_all(here)
    command = ("kubectl", "apply", "-n", NAMESPACE, "--server-side", "--dry-run=server", "-f", "-")
    done = await run(*command, stdin=body)
    assert "would violate PodSecurity" not in done.err, done.err
    assert "nrecognized" not in done.err, done.err


MONITORS = {"servicemonitors": "ServiceMonitor", "podmonitors": "PodMonitor", "prometheusrules": "PrometheusRule"}


@pytest.fixture
async def operator(bare: Cluster) -> AsyncIterator[None]:
    """The kinds of Prometheus's operator, with any content: tests/chart looks at that."""
    names = [f"{plural}.monitoring.coreos.com" for plural in MONITORS]
    for name, (plural, kind) in zip(names, MONITORS.items(), strict=True):
        any_content = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
        spec = {
            "group": "monitoring.coreos.com",
            "scope": "Namespaced",
            "names": {"plural": plural, "kind": kind},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": any_content}],
        }
        metadata, version = {"name": name}, "apiextensions.k8s.io/v1"
        body = {"apiVersion": version, "kind": "CustomResourceDefinition", "metadata": metadata, "spec": spec}
        await run("kubectl", "apply", "-f", "-", stdin=json.dumps(body))
    await run("kubectl", "wait", "--for=condition=Established", *(f"crd/{name}" for name in names), "--timeout=60s")
    yield
    await run("kubectl", "delete", "crd", *names)


async def kinds() -> set[str]:
    """Those that the default values install."""
    return {each["kind"] for each in objects(json.loads((await render({})).out))}


async def test_without_prometheus_operator_there_are_no_monitors(bare: Cluster) -> None:
    await bare.make_namespace(NAMESPACE)
    assert not await kinds() & set(MONITORS.values())


@pytest.mark.usefixtures("operator")
async def test_prometheus_operator_gets_monitors_and_rules(bare: Cluster) -> None:
    await bare.make_namespace(NAMESPACE)

    async def look() -> bool:  # helm's discovery may be a moment old
        return await kinds() >= set(MONITORS.values())

    await until(look)


@pytest.mark.parametrize("case", BAD)
async def test_bad_values_get_one_sentence(bare: Cluster, case: str) -> None:
    values, words = BAD[case]
    done = await render(values, check=False)
    assert done.code != 0
    assert all(word in done.err for word in words), done.err
    assert "nil pointer" not in done.err, done.err
    lines = [line for line in done.err.splitlines() if line.strip() and "values don't meet" not in line]
    assert len(lines) <= 3, f"one sentence, not a page:\n{done.err}"


@pytest.mark.parametrize("keys", [None, ("model-api-key",)])
async def test_a_secret_that_is_not_there_gets_one_sentence(bare: Cluster, keys: tuple[str, ...] | None) -> None:
    await bare.make_namespace(NAMESPACE)
    await run("kubectl", "delete", "secret", "mine", "-n", NAMESPACE, "--ignore-not-found")
    if keys:
        await bare.apply(NAMESPACE, secret("mine", *keys))
    done = await render({"auth": {"existingSecret": "mine"}}, check=False)
    assert done.code != 0
    assert ("has no key api-key" if keys else "There is no Secret mine") in done.err, done.err


async def test_what_is_global_is_the_parents(bare: Cluster) -> None:
    await render({"global": {"someone": {"elses": "key"}}})


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: path.stem)
async def test_every_scenario_is_accepted_by_the_cluster(bare: Cluster, scenario: Path) -> None:
    await bare.make_namespace(NAMESPACE)
    urls = [f"{each}database-url" for each in ("", "api-", "worker-", "steward-")]
    await bare.apply(NAMESPACE, secret("backcast", *urls, "prefect-auth-string", *KEYS))
    done = await render(yaml.safe_load(scenario.read_text()))
    await accepted(bare, objects(json.loads(done.out)))


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("name", [LONGEST, "backcast-" + "x" * 44])
async def test_the_longest_release_names(bare: Cluster, name: str) -> None:
    everything = CHART / "ci" / "everything.yaml"
    await bare.make_namespace(NAMESPACE)
    done = await render(yaml.safe_load(everything.read_text()) if everything.is_file() else {}, name=name)
    found = objects(json.loads(done.out))
    await accepted(bare, found)
    names = [(each["kind"], each["metadata"]["name"]) for each in found]
    assert len(set(names)) == len(names), "two objects of a kind have the same name"
    for kind, called in names:
        called = called.removeprefix(f"{NAMESPACE}.") if kind.startswith("ValidatingAdmission") else called
        # A StatefulSet's pods carry its name and a hash in a label, which the API server does not count in time.
        assert len(called) <= (52 if kind == "StatefulSet" else 63), f"{kind} {called}"
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", called), called
