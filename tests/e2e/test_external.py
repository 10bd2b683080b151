"""Servers that the chart did not install: first with every usual mistake, which the setup Job's last line must name;
then with the right values."""

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.cluster import Cluster, is_ready
from tests.e2e.images import RENDER
from tests.e2e.programs import run
from tests.e2e.release import Release, merged, small
from tests.support.waiting import until

NAMESPACE, SERVERS = "backcast-e2e-external", "backcast-e2e-servers"
HOST = "external.e2e.localhost"
PASSWORD, KEY, SECRET = "a-long-password", "an-access-key", "a-long-secret-key"
DATABASE = f"postgres.{SERVERS}.svc.cluster.local:5432"
STORE = f"http://store.{SERVERS}.svc.cluster.local:9000"


def _server(name: str, uid: int, port: int, probe: dict[str, Any], **container: Any) -> list[dict[str, Any]]:
    """A pod without a volume, and its Service."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": uid,
                "runAsGroup": uid,
                "fsGroup": uid,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": name,
                    # Not the second of the default: after three slow answers the service has no pods, and refuses.
                    "readinessProbe": {**probe, "periodSeconds": 1, "timeoutSeconds": 60},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "data", "mountPath": "/e2e"}],
                    **container,
                }
            ],
            "volumes": [{"name": "data", "emptyDir": {}}],
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": port}]},
    }
    return [pod, service]


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def servers(cluster: Cluster) -> Cluster:
    """A PostgreSQL and a MinIO outside of our chart, from the images that the chart names."""
    rendered = (await run(*RENDER)).out
    image = {part: next(iter(re.findall(rf"image: \"?(\S*{part}\S*?)\"?$", rendered, re.MULTILINE)))
             for part in ("/postgres", "/minio")}  # fmt: skip
    await cluster.make_namespace(SERVERS)
    postgres = _server(
        "postgres",
        999,
        5432,
        {"exec": {"command": ["pg_isready", "-h", "127.0.0.1", "-U", "postgres"]}},
        image=image["/postgres"],
        env=[{"name": "POSTGRES_PASSWORD", "value": PASSWORD}, {"name": "PGDATA", "value": "/e2e/data"}],
    )
    store = _server(
        "store",
        1000,
        9000,
        {"httpGet": {"path": "/minio/health/ready", "port": 9000}},
        image=image["/minio"],
        args=["server", "/e2e/data"],
        env=[{"name": "MINIO_ROOT_USER", "value": KEY}, {"name": "MINIO_ROOT_PASSWORD", "value": SECRET}],
    )
    await cluster.apply(SERVERS, *postgres, *store)
    await cluster.pod_ready(SERVERS, "postgres")
    await cluster.pod_ready(SERVERS, "store")
    return cluster


def _values(model: str) -> dict[str, Any]:
    """Right in all respects: the setup Job makes the missing parts, with the administrator's rights."""
    external = {
        "url": f"postgresql://backcast:backcast-password@{DATABASE}/backcast",
        "prefectUrl": f"postgresql://prefect:prefect-password@{DATABASE}/prefect",
        "adminUrl": f"postgresql://postgres:{PASSWORD}@{DATABASE}/postgres",
        **{
            f"{part}Url": f"postgresql://backcast_{part}:{part}-password@{DATABASE}/backcast"
            for part in ("api", "worker", "steward")
        },
    }
    bucket = {"endpoint": STORE, "bucket": "somebody", "prefix": "ours", "accessKey": KEY, "secretKey": SECRET}
    return merged(
        small(HOST, model),
        {
            "config": {"setup": {"patience": "PT30S"}},
            "postgres": {"mode": "external", "external": external},
            "store": {"mode": "external", "external": bucket},
        },
    )


# The wrong values, and words of the sentence that names the remedy.
MISTAKES = {
    "password": (
        {"postgres": {"external": {"adminUrl": f"postgresql://postgres:wrong@{DATABASE}/postgres"}}},
        ["password"],
    ),
    "host": (
        {"postgres": {"external": {"adminUrl": "postgresql://postgres:x@nowhere.example:5432/postgres"}}},
        ["nowhere.example"],
    ),
    "endpoint": ({"store": {"external": {"endpoint": "http://nowhere.example:9000"}}}, ["nowhere.example"]),
    "keys": ({"store": {"external": {"secretKey": "wrong"}}}, ["key"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_the_setup_names_the_mistake(servers: Cluster, model: str, mistake: str) -> None:
    wrong, words = MISTAKES[mistake]
    values = {"ingress": {"enabled": False, "host": ""}, "config": {"setup": {"patience": "PT5S"}}}
    release = Release(servers, f"wrong-{mistake}", f"{NAMESPACE}-{mistake}")
    async with release.installing(merged(_values(model), values, wrong)):
        sentence = await release.setup_fails()
        assert all(word in sentence for word in words), sentence
        assert "Traceback" not in sentence
        assert PASSWORD not in sentence
        assert SECRET not in sentence


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def external(servers: Cluster, model: str) -> AsyncIterator[Release]:
    release = Release(servers, "theirs", NAMESPACE)
    await release.first_install(_values(model))
    yield release
    await release.http.aclose()


async def test_works_on_external_servers(external: Release) -> None:
    async with external.client() as client:
        assert await client.cast("12 boxes, 2 broken", list[int], "how many", timeout=120) == [12, 2]
    run_id = await external.submit("enlarge", key="large", word="cast", times=100_000)
    assert await external.result(run_id) == ["large", "cast" * 100_000]
    [key] = await external.stored(run_id)
    assert key.startswith("ours/"), key
    assert not external.pods("postgres")
    assert not external.pods("store")


async def test_is_not_ready_while_the_database_is_away_and_recovers(external: Release) -> None:
    """Nothing crashes in a loop: the parts stay, are not ready, and go on when the database is back."""
    before = {pod.metadata.uid for pod in external.pods()}
    psql = ("psql", "-h", "127.0.0.1", "-U", "postgres", "-c")
    switch = "alter database backcast with allow_connections {}"
    leave = "select pg_terminate_backend(pid) from pg_stat_activity where datname = 'backcast'"

    async def sql(statement: str) -> None:
        command = ("env", f"PGPASSWORD={PASSWORD}", *psql, statement)
        await external.cluster.execute(SERVERS, "postgres", *command)

    async def status() -> int:
        return (await external.http.get("/v1/runs")).status_code

    async def ready() -> list[str]:
        parts = ("api", "worker", "steward")
        return [pod.metadata.name for part in parts for pod in external.pods(part) if is_ready(pod)]

    await sql(switch.format("false"))
    try:
        await sql(leave)
        await until(ready, lambda ready: not ready, timeout=60, every=0.5)
        # The status of an Ingress without a backend depends on the controller.
        assert await status() in (404, 502, 503)
    finally:
        await sql(switch.format("true"))
    await until(status, lambda status: status == 200, timeout=90, every=0.5)
    assert await external.do("add", key="back", a=1, b=2) == ["back", 3]
    pods = external.pods()
    assert {pod.metadata.uid for pod in pods} == before
    assert not any(status.restart_count for pod in pods for status in pod.status.container_statuses)
