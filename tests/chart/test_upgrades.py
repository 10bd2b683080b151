"""The chart looks up a cluster's state before it renders: existing passwords, running replicas, missing objects."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from backcast.ledger.rights import PROCESSES
from tests.chart.rendering import Cluster, Values, cluster, refusal, render

OWN = "demo-backcast"
"""The Secret that the chart makes."""


@pytest.fixture
def live() -> Iterator[Cluster]:
    with cluster() as served:
        yield served


def coded(**data: str) -> dict[str, str]:
    return {name.replace("_", "-"): base64.b64encode(value.encode()).decode() for name, value in data.items()}


# Secrets


def test_generated_values_are_kept_and_new_ones_are_added(live: Cluster) -> None:
    before = render({"prefectServer": {"mode": "off"}}, cluster=live).the("Secret")["data"]
    live.add("Secret", OWN, data=before)
    after = render({}, cluster=live).the("Secret")["data"]
    assert before.items() < after.items()
    assert set(after) - set(before) == {"prefect-auth-string"}


def test_a_release_whose_parts_shared_a_role_gets_passwords_for_theirs(live: Cluster) -> None:
    now = render({}, cluster=live).the("Secret")["data"]
    new = {f"{part}-password" for part in PROCESSES}
    before = {key: value for key, value in now.items() if key not in new}
    live.add("Secret", OWN, data=before)
    after = render({}, cluster=live, revision=2).the("Secret")["data"]
    assert before.items() < after.items()
    assert set(after) - set(before) == new


def test_without_a_cluster_they_are_new_each_time() -> None:
    one, other = (render({}).the("Secret")["data"] for _ in range(2))
    assert one.keys() == other.keys()
    assert not one.items() & other.items()


def test_generated_values_can_stand_in_a_url_and_are_long() -> None:
    for key, value in render({}).the("Secret")["data"].items():
        value = base64.b64decode(value).decode()
        assert value.removeprefix("admin:").isalnum(), key
        assert len(value) >= 20, key


def test_the_secret_outlives_the_release() -> None:
    assert render({}).the("Secret")["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_the_volumes_passwords_are_kept_while_another_server_is_in_use(live: Cluster) -> None:
    live.add("Secret", OWN, data=coded(postgres_password="old", worker_password="old", api_key="old"))
    external = {"url": "postgresql://b:p@h/b", "prefectUrl": "postgresql://p:p@h/p"}
    data = render({"postgres": {"mode": "external", "external": external}}, cluster=live).the("Secret")["data"]
    assert data["postgres-password"] == data["worker-password"] == coded(x="old")["x"]
    assert "steward-password" not in data
    assert base64.b64decode(data["database-url"]).decode() == "postgresql://b:p@h/b"


def test_an_old_volume_without_its_passwords_is_refused(live: Cluster) -> None:
    live.add("PersistentVolumeClaim", "data-demo-backcast-postgres-0")
    sentence = refusal({}, live)
    assert (
        "The volume data-demo-backcast-postgres-0 of an earlier release is there, but the Secret demo-backcast with"
        in sentence
    )
    assert "kubectl -n team delete pvc data-demo-backcast-postgres-0" in sentence
    live.add("Secret", OWN, data=coded(postgres_password="old"))
    render({}, cluster=live)


# Moves


def installed(live: Cluster, values: Values) -> None:
    """Let the cluster have what an install of these values makes."""
    for each in render(values, cluster=live).objects:
        if each["kind"] in ("ConfigMap", "Secret", "StatefulSet"):
            content = {name: each[name] for name in ("metadata", "data", "spec") if name in each}
            live.add(each["kind"], each["metadata"]["name"], **content)


MINIO, WEED = "s3://backcast at http://demo-backcast-minio:9000", "s3://backcast at http://demo-backcast-seaweedfs:8333"
AT_AWS: Values = {"store": {"mode": "external", "external": {"bucket": "b", "prefix": "p"}}}
SEAWEEDFS: Values = {"store": {"bundled": {"kind": "seaweedfs"}}}
EXCHANGED: Values = {"store": {"bundled": {"kind": "seaweedfs"}, "fallback": {"mode": "bundled"}}}
ONE = {"url": "postgresql://b:secret@one/b", "prefectUrl": "postgresql://p:p@one/p"}
OTHER = {"url": "postgresql://b:secret@other:6432/b", "prefectUrl": "postgresql://p:p@other/p"}


def postgres(**external: str) -> Values:
    return {"postgres": {"mode": "external", "external": external}}


# What is installed, what comes, and the name of what would be lost.
MOVES: dict[str, tuple[Values, Values, str]] = {
    "another kind": ({}, SEAWEEDFS, MINIO),
    "back again": (SEAWEEDFS, {}, WEED),
    "a bucket elsewhere": ({}, AT_AWS, MINIO),
    "from elsewhere": (AT_AWS, {}, "s3://b/p at AWS"),
    "another prefix": (AT_AWS, {"store": {"mode": "external", "external": {"bucket": "b"}}}, "s3://b/p at AWS"),
    "another bucket inside": ({}, {"store": {"bundled": {"bucket": "other"}}}, MINIO),
    "a fallback that is dropped": (EXCHANGED, SEAWEEDFS, MINIO),
    "a database elsewhere": ({}, postgres(**ONE), "bundled"),
    "a database from elsewhere": (postgres(**ONE), {}, "one/b"),
    "another host": (postgres(**ONE), postgres(**OTHER), "one/b"),
    "a Secret for the database": ({"postgres": {"mode": "external", "external": ONE}}, {}, "one/b"),
}


@pytest.mark.parametrize("case", MOVES)
def test_an_upgrade_that_would_lose_runs_is_refused(live: Cluster, case: str) -> None:
    before, after, name = MOVES[case]
    installed(live, before)
    render(before, cluster=live, revision=2)
    sentence = refusal(after, live)
    section = "store" if name.startswith("s3:") else "postgres"
    assert f'set {section}.movedFrom to "{name}"' in sentence
    assert "secret" not in sentence.replace("Secret", "")
    told = {**after, section: {**after.get(section, {}), "movedFrom": name}}
    render(told, cluster=live, revision=2)


@pytest.mark.parametrize("renamed", [{"fullnameOverride": "shop"}, {"nameOverride": "shop"}])
def test_an_upgrade_under_another_name_is_refused(live: Cluster, renamed: Values) -> None:
    installed(live, {})
    sentence = refusal(renamed, live)
    assert 'This release is installed as "demo-backcast", and these values name it' in sentence
    assert 'Set fullnameOverride to "demo-backcast" and nameOverride to "backcast".' in sentence
    render({"fullnameOverride": "demo-backcast", "nameOverride": "backcast"}, cluster=live, revision=2)


def test_another_release_in_the_namespace_has_a_name_of_its_own(live: Cluster) -> None:
    installed(live, {})
    render({}, name="other", cluster=live)


@pytest.mark.parametrize(
    ("reason", "revision", "refused"),
    [
        ("ReplicaSetUpdated", "1", False),
        ("ProgressDeadlineExceeded", "1", False),
        ("NewReplicaSetAvailable", "1", True),
        ("ProgressDeadlineExceeded", "2", True),
    ],
)
def test_values_may_be_corrected_until_the_api_was_ready(
    live: Cluster, reason: str, revision: str, refused: bool
) -> None:
    installed(live, {})
    live.add("Deployment", "demo-backcast-api", spec={"replicas": 2}, status={"conditions": [{"reason": reason}]})
    for each in live.objects.values():
        each["metadata"]["annotations"] = {"deployment.kubernetes.io/revision": revision}
    if refused:
        assert "This release keeps objects of its runs in" in refusal(AT_AWS, live)
    else:
        render(AT_AWS, cluster=live, revision=2)


@pytest.mark.parametrize("mode", ["bundled", "external"])
def test_a_store_moves_while_every_pod_can_read_both(live: Cluster, mode: str) -> None:
    external = {"bucket": "b", "accessKey": "a", "secretKey": "s"}
    into = {"mode": mode, "kind": "seaweedfs"} | ({"external": external} if mode == "external" else {})
    both: Values = {"store": {"fallback": into}}
    new = {"bundled": {"kind": "seaweedfs"}} if mode == "bundled" else {"mode": mode, "external": external}
    exchanged: Values = {"store": {**new, "fallback": {"mode": "bundled"}}}
    installed(live, {})
    key = live.objects[f"/api/v1/namespaces/team/secrets/{OWN}"]["data"]["s3-access-key"]
    assert "make it store.fallback first, and exchange the two by the next upgrade" in refusal(exchanged, live)
    installed(live, both)
    release = render(exchanged, cluster=live, revision=3)
    assert release.config["store"]["fallback"]["endpoint"] == "http://demo-backcast-minio:9000"
    assert release.the("Secret")["data"]["bundled-s3-access-key"] == key
    [minio] = [each for each in release.of("StatefulSet", "store") if each["metadata"]["name"].endswith("minio")]
    environment = {each["name"]: each for each in minio["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["MINIO_ROOT_USER"]["valueFrom"]["secretKeyRef"]["key"] == "bundled-s3-access-key"


def in_secret(live: Cluster, name: str, database: str) -> Values:
    """Values that name a Secret of the user's, which is there."""
    url = base64.b64encode(database.encode()).decode()
    live.add("Secret", name, data=dict.fromkeys(["database-url", "prefect-database-url"], url))
    return postgres(existingSecret=name)


def test_a_secret_may_take_the_place_of_a_url(live: Cluster) -> None:
    installed(live, postgres(**ONE))
    render(in_secret(live, "theirs", ONE["url"]), cluster=live, revision=2)


@pytest.mark.parametrize("password", ["p^w", "100%zz", "a@b", "x/y", "{}"])
def test_no_password_in_a_secret_stops_or_shows_itself(live: Cluster, password: str) -> None:
    installed(live, postgres(**ONE))
    url = f"postgresql://b:{password}@one/b"
    if "/" in password:  # no URL: nothing is known of it
        assert render(in_secret(live, "theirs", url), cluster=live, revision=2).the("ConfigMap")["data"].keys() == {
            "backcast.yaml"
        }
    else:
        release = render(in_secret(live, "theirs", url), cluster=live, revision=2)
        assert release.the("ConfigMap")["data"]["database"] == "one/b"


@pytest.mark.parametrize("by_secret", [True, False])
def test_a_secret_for_another_database_is_refused(live: Cluster, by_secret: bool) -> None:
    installed(live, in_secret(live, "theirs", ONE["url"]) if by_secret else postgres(**ONE))
    other = in_secret(live, "others", OTHER["url"])
    assert 'set postgres.movedFrom to "one/b"' in refusal(other, live)
    other["postgres"]["movedFrom"] = "one/b"
    render(other, cluster=live, revision=2)


# Secrets of others

EXISTING: dict[str, tuple[Values, list[str]]] = {
    "auth": ({"auth": {"existingSecret": "theirs"}}, ["api-key"]),
    "model": ({"model": {"existingSecret": "theirs"}}, ["model-api-key"]),
    "postgres": (
        {"postgres": {"bundled": {"existingSecret": "theirs"}}},
        [f"{role}-password" for role in ("postgres", "backcast", *PROCESSES, "prefect", "scaler")],
    ),
    "external postgres": (
        {"postgres": {"mode": "external", "external": {"existingSecret": "theirs"}}},
        ["database-url", "prefect-database-url"],
    ),
    "external postgres with roles": (
        {"postgres": {"mode": "external", "external": {"existingSecret": "theirs", "rolePerPart": True}}},
        ["database-url", "prefect-database-url", *(f"{part}-database-url" for part in PROCESSES)],
    ),
    "external postgres for KEDA": (
        {
            "postgres": {"mode": "external", "external": {"existingSecret": "theirs"}},
            "prefectServer": {"mode": "off"},
            "workers": {"pools": {"default": {"autoscaling": {"mode": "hpa"}}}},
        },
        ["database-url"],
    ),
    "store": ({"store": {"bundled": {"existingSecret": "theirs"}}}, ["s3-access-key", "s3-secret-key"]),
    "external store": (
        {"store": {"mode": "external", "external": {"bucket": "b", "existingSecret": "theirs"}}},
        ["s3-access-key", "s3-secret-key"],
    ),
    "prefect": ({"prefectServer": {"auth": {"existingSecret": "theirs"}}}, ["prefect-auth-string"]),
    "one for two": (
        {"auth": {"existingSecret": "theirs"}, "model": {"existingSecret": "theirs"}},
        ["api-key", "model-api-key"],
    ),
}


@pytest.mark.parametrize("case", EXISTING)
def test_an_existing_secret_must_have_its_keys(live: Cluster, case: str) -> None:
    values, keys = EXISTING[case]
    expected = ", ".join(keys)
    assert f"There is no Secret theirs in the namespace team: create it, with the keys {expected}." in refusal(
        values, live
    )
    live.add("Secret", "theirs", data=dict.fromkeys(keys[:-1], "eA=="))
    assert f"The Secret theirs has no key {keys[-1]}: add it; it needs {expected}." in refusal(values, live)
    live.add("Secret", "theirs", data=dict.fromkeys(keys, "eA=="))
    release = render(values, cluster=live)
    assert not set(keys) & {key for each in release.of("Secret") for key in each["data"]}, (
        "the chart makes none of them"
    )
    used = {
        each["valueFrom"]["secretKeyRef"]["name"]
        for pod in release.pods
        for container in pod.containers
        for each in container["env"]
        if each.get("valueFrom", {}).get("secretKeyRef", {}).get("key") in keys
    }
    assert used == {"theirs"}


def test_a_key_of_prefect_cloud_is_enough(live: Cluster) -> None:
    external = {"apiUrl": "https://api.prefect.cloud/api/accounts/a/workspaces/w", "existingSecret": "cloud"}
    values = {"prefectServer": {"mode": "external", "external": external}}
    assert "There is no Secret cloud in the namespace team: create it." in refusal(values, live)
    live.add("Secret", "cloud", data={"prefect-api-key": "eA=="})
    environment = {each["name"]: each for each in render(values, cluster=live).pod("worker").main["env"]}
    for name in ("BACKCAST_PREFECT__API_KEY", "BACKCAST_PREFECT__AUTH_STRING"):
        assert environment[name]["valueFrom"]["secretKeyRef"]["optional"], name


def test_a_secret_that_the_release_itself_may_make_is_not_missed(live: Cluster) -> None:
    made = {"apiVersion": "external-secrets.io/v1", "kind": "ExternalSecret", "metadata": {"name": "theirs"}}
    render({"auth": {"existingSecret": "theirs"}, "extraObjects": [made]}, cluster=live)


def test_keda_must_be_there(live: Cluster) -> None:
    sentence = refusal({"workers": {"pools": {"default": {"autoscaling": {"mode": "keda"}}}}}, live)
    assert (
        "autoscaling.mode is keda, but this cluster has no KEDA: install it, or set the mode to hpa or off." in sentence
    )


# Replicas


@pytest.mark.parametrize(("live_count", "least", "expected"), [(4, 1, 4), (1, 2, 2), (0, 1, 1)])
def test_turning_a_scaler_on_keeps_the_running_replicas(
    live: Cluster, live_count: int, least: int, expected: int
) -> None:
    scaler: dict[str, Any] = {"minReplicas": least, "maxReplicas": 9}
    for name in ("demo-backcast-api", "demo-backcast-worker-default"):
        live.add("Deployment", name, spec={"replicas": live_count})
    values = {
        "api": {"autoscaling": {"enabled": True, **scaler}},
        "workers": {"pools": {"default": {"autoscaling": {"mode": "hpa", **scaler}}}},
    }
    release = render(values, cluster=live)
    assert [release.pod(part).owner["spec"]["replicas"] for part in ("api", "worker")] == [expected, expected]


def test_turning_a_scaler_off_restores_the_number_in_the_values(live: Cluster) -> None:
    live.add("Deployment", "demo-backcast-api", spec={"replicas": 7})
    assert render({}, cluster=live).pod("api").owner["spec"]["replicas"] == 2


# The setup Job


def test_the_setup_job_is_a_new_one_when_anything_changes() -> None:
    names = {
        render(values, revision=revision).the("Job")["metadata"]["name"]
        for values in ({}, {"image": {"tag": "next"}}, {"config": {"lease": 30}})
        for revision in (1, 2)
    }
    assert len(names) == 6
    assert render({}).the("Job")["metadata"]["name"] in names, "a rollback makes the old one again"
    job = render({}).the("Job")
    assert "helm.sh/hook" not in str(job)
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
