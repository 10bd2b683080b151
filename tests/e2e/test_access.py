"""Access: the API is open from outside with a key; every other port only to the parts that need it."""

import asyncio
import hashlib
import json
import ssl
from typing import Any

import httpx
import pytest_asyncio

from tests.e2e.cluster import Cluster
from tests.e2e.images import NOW, REGISTRY
from tests.e2e.programs import run
from tests.e2e.release import Release, merged
from tests.e2e.scripted import NAMESPACE as MODEL_NAMESPACE
from tests.e2e.scripted import PORT, RESTRICTED, RESTRICTED_POD

ROGUE_NAMESPACE = "backcast-e2e-rogue"
JSON = {"Content-Type": "application/json"}
MODEL = f"model.{MODEL_NAMESPACE}.svc.cluster.local:{PORT}"


# -- through the front door -------------------------------------------------------------------------------------------


async def test_the_api_asks_for_its_key(shared: Release) -> None:
    for authorization in (None, "Bearer wrong", f"Basic {shared.secret['api-key']}"):
        headers = {"Host": shared.http.headers["Host"]} | ({"Authorization": authorization} if authorization else {})
        async with httpx.AsyncClient(base_url=shared.http.base_url, headers=headers, trust_env=False) as stranger:
            answer = await stranger.get("/v1/runs")
            assert answer.status_code == 401, answer.text
            assert answer.headers["content-type"].startswith("application/problem+json")
    assert (await shared.http.get("/v1/runs")).status_code == 200


async def test_casts_through_the_client(shared: Release) -> None:
    """The product's own client, the scripted model, and a result that only the store can hold."""
    async with shared.client() as client:
        assert await client.cast("12 boxes, 2 broken", list[int], "how many", timeout=120) == [12, 2]
        run = await client.submit("enlarge", {"key": "large", "word": "cast", "times": 100_000})
        await client.wait(run.id, timeout=120)
        assert await client.result(run.id) == ["large", "cast" * 100_000]
    assert len(await shared.stored(str(run.id))) == 1


async def test_a_poll_is_held_and_a_large_body_refused(shared: Release) -> None:
    run_id = await shared.submit("nap", key="held", seconds=3)
    answer = await shared.http.get(f"/v1/runs/{run_id}", headers={"Prefer": "wait=20"})
    assert answer.json()["state"] == "completed", "the answer came through the proxy once the run had ended"
    answer = await shared.http.post("/v1/tasks/add/runs", content=b"[" + b" " * 5_000_000, headers=JSON)
    assert answer.status_code == 413, answer.text


async def test_only_the_api_has_a_way_in(shared: Release) -> None:
    ask, cluster = shared.cluster.asking, shared.cluster
    services = ask(cluster.core.list_namespaced_service, shared.namespace, label_selector=shared.selector()).items
    assert services
    assert {service.spec.type for service in services} == {"ClusterIP"}
    ingresses = ask(cluster.network.list_namespaced_ingress, shared.namespace).items
    backends = {path.backend.service.name for each in ingresses for rule in each.spec.rules for path in rule.http.paths}
    assert backends == {shared.named("api")}


# -- from inside ------------------------------------------------------------------------------------------------------


async def test_a_worker_gets_few_secrets_and_may_write_nothing(shared: Release) -> None:
    found = await shared.do("look_around")
    assert not found["token"], "a worker's token would let users' code change the cluster"
    assert (found["uid"], found["writable"]) == (10001, ["/tmp"])
    assert any(pod.metadata.name == found["host"] for pod in shared.pods("worker"))
    visible = {
        name for name, value in shared.secret.items() for seen in found["environment"].values() if seen == _sha(value)
    }
    assert visible <= {"worker-password", "model-api-key", "prefect-auth-string", "s3-access-key", "s3-secret-key"}
    allowed = shared.secret["prefect-auth-string"]
    assert _sha(allowed) in found["environment"].values(), "a secret in the environment is found this way"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


async def test_each_part_has_a_database_role_that_may_do_no_more_than_it_does(shared: Release) -> None:
    sessions = await shared.sql(
        "select distinct application_name, usename from pg_stat_activity where application_name like 'backcast-%'"
    )
    parts = ("api", "worker", "steward")
    assert sorted(sessions) == sorted([f"backcast-{part}", f"backcast_{part}"] for part in parts)
    run = await shared.do("add", key="roles", a=1, b=2)
    for part in parts:
        done = await shared.cluster.execute(shared.namespace, shared.pod(part), "python", "-c", _ASK, *_FORBIDDEN)
        assert json.loads(done.out) == dict.fromkeys([*_FORBIDDEN, "prefect"], "InsufficientPrivilegeError"), part
    assert await shared.do("add", key="roles", a=1, b=2) == run


_FORBIDDEN = (
    "create table backcast.mine (id int)",
    "drop table backcast.runs",
    "truncate backcast.runs",
    "update backcast.runs set input = '1'",
    "delete from backcast.lanes",
    "create role mine",
)
# With the URL that the part has: the error of each statement, and of a connection to Prefect's database.
_ASK = """
import asyncio, json, os, sys
import asyncpg

url = os.environ["BACKCAST_DATABASE__URL"]

async def error(sql, url):
    try:
        connection = await asyncpg.connect(url, timeout=10)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()
    except asyncpg.PostgresError as error:
        return type(error).__name__

async def main():
    found = {sql: await error(sql, url) for sql in sys.argv[1:]}
    found["prefect"] = await error("select 1", url.rpartition("/")[0] + "/prefect")
    print(json.dumps(found))

asyncio.run(main())
"""


async def test_only_the_steward_has_a_token(shared: Release) -> None:
    having = {
        pod.metadata.labels["app.kubernetes.io/component"]
        for pod in shared.pods()
        for volume in pod.spec.volumes
        for source in (volume.projected.sources if volume.projected else [])
        if source.service_account_token
    }
    assert having == {"steward"}
    account = shared.pods("steward")[0].spec.service_account_name
    as_steward = f"--as=system:serviceaccount:{shared.namespace}:{account}"
    may = {}
    for verb, what in (("patch", "pods"), ("get", "pods"), ("create", "pods"), ("get", "secrets")):
        command = ("kubectl", "auth", "can-i", verb, what, "-n", shared.namespace, as_steward)
        may[f"{verb} {what}"] = (await run(*command, check=False)).out.strip()
    assert may == {"patch pods": "yes", "get pods": "no", "create pods": "no", "get secrets": "no"}


_COST = {"metadata": {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "7"}}}
_OWNER = {"apiVersion": "v1", "kind": "ConfigMap", "name": "kube-root-ca.crt", "uid": "1"}
_PATCHES: dict[str, dict[str, Any]] = {
    "another annotation": {"metadata": {"annotations": {"e2e/note": "x"}}},
    "another annotation beside it": merged(_COST, {"metadata": {"annotations": {"e2e/note": "x"}}}),
    "an annotation less": {"metadata": {"annotations": {"e2e/there": None}}},
    "a label": {"metadata": {"labels": {"e2e": "x"}}},
    "a label less": {"metadata": {"labels": {"backcast/pool": None}}},
    "an owner": {"metadata": {"ownerReferences": [_OWNER]}},
    "a finalizer": {"metadata": {"finalizers": ["e2e/finalizer"]}},
    "an image": {"spec": {"containers": [{"name": "worker", "image": "busybox"}]}},
    "a deadline": {"spec": {"activeDeadlineSeconds": 1}},
    "a toleration": {"spec": {"tolerations": [{"key": "e2e", "operator": "Exists"}]}},
}


async def test_the_stewards_token_changes_the_deletion_cost_of_its_workers_only(
    shared: Release, rogues: list[tuple[str, str]]
) -> None:
    account = shared.pods("steward")[0].spec.service_account_name
    command = ("kubectl", "create", "token", account, "-n", shared.namespace)
    token = (await run(*command)).out.strip()
    cluster, config = shared.cluster, shared.cluster.api.configuration
    worker = shared.pod("worker", "default")
    await run("kubectl", "annotate", "pod", worker, "e2e/there=x", "-n", shared.namespace, "--overwrite")
    stranger = shared.pods("worker")[0].metadata.labels | {"app.kubernetes.io/instance": "another"}
    await cluster.apply(shared.namespace, _rogue("rogue-release", stranger))

    async with httpx.AsyncClient(
        base_url=f"{config.host}/api/v1/namespaces/{shared.namespace}/pods",
        verify=ssl.create_default_context(cafile=config.ssl_ca_cert),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/strategic-merge-patch+json"},
        trust_env=False,
    ) as api:

        async def patch(pod: str, body: dict[str, Any]) -> tuple[int, str]:
            answer = await api.patch(f"/{pod}", content=json.dumps(body), params={"dryRun": "All"})
            return answer.status_code, answer.json().get("message", "")

        refused = {what: await patch(worker, body) for what, body in _PATCHES.items()}
        others = [pod.metadata.name for pod in shared.pods() if "worker" not in pod.metadata.name]
        refused |= {pod: await patch(pod, _COST) for pod in (*others, "rogue", "rogue-release")}
        passed = {
            what: answer for what, answer in refused.items() if answer[0] != 422 or "steward may" not in answer[1]
        }
        assert not passed
        assert len(refused) > len(_PATCHES) + 5
        assert (await patch(f"{worker}/status", _COST))[0] == 403
        assert (await api.delete(f"/{worker}", params={"dryRun": "All"})).status_code == 403
        assert (await patch(worker, _COST))[0] == 200


def _rogue(name: str, labels: dict[str, str]) -> dict[str, Any]:
    container = {
        "name": "rogue",
        "image": f"{REGISTRY}/api:{NOW}",
        "command": ["python", "-c", "import time; time.sleep(3600)"],
        "securityContext": RESTRICTED,
        "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}},
    }
    spec = {
        "securityContext": RESTRICTED_POD,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
        "containers": [container],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


@pytest_asyncio.fixture(loop_scope="session")
async def rogues(shared: Release) -> list[tuple[str, str]]:
    """Foreign pods: a neighbour in the namespace, a stranger, and one with a worker's labels in another namespace."""
    cluster = shared.cluster
    await cluster.make_namespace(ROGUE_NAMESPACE)
    worker = shared.pods("worker")[0].metadata.labels
    pods = [(shared.namespace, "rogue", {}), (ROGUE_NAMESPACE, "rogue", {}), (ROGUE_NAMESPACE, "rogue-worker", worker)]
    for namespace, name, labels in pods:
        await cluster.apply(namespace, _rogue(name, labels))
    for namespace, name, _ in pods:
        await cluster.pod_ready(namespace, name)
    return [(namespace, name) for namespace, name, _ in pods]


async def _open_from(cluster: Cluster, namespace: str, pod: str, places: list[str]) -> set[str]:
    """Those of these `host:port` that take a connection from that pod."""
    done = await cluster.execute(namespace, pod, "python", "-c", _TRY, *places)
    return set(done.out.split())


_TRY = """
import asyncio, sys

async def reach(place):
    try:
        async with asyncio.timeout(4):
            await asyncio.open_connection(*place.rsplit(":", 1))
        print(place)
    except OSError:
        pass

async def main():
    await asyncio.gather(*map(reach, sys.argv[1:]))

asyncio.run(main())
"""


async def test_network_policies_block_strangers(shared: Release, rogues: list[tuple[str, str]]) -> None:
    cluster = shared.cluster
    closed = [
        f"{pod.status.pod_ip}:{port.container_port}"
        for pod in shared.pods()
        for container in pod.spec.containers
        for port in container.ports or []
        if port.container_port != 8000  # the API's for callers
    ]
    components = {pod.metadata.labels["app.kubernetes.io/component"] for pod in shared.pods()}
    assert {"postgres", "store", "worker", "steward", "prefect-server"} <= components
    assert len(closed) >= 5, closed
    found = await asyncio.gather(*(_open_from(cluster, *rogue, [*closed, MODEL]) for rogue in rogues))
    for rogue, opened in zip(rogues, found, strict=True):
        assert opened == {MODEL}, f"{'/'.join(rogue)} reaches {opened - {MODEL}}, or not even {MODEL}"


async def test_network_policies_let_the_product_work(shared: Release) -> None:
    """A worker reaches what it needs, users' services too, and neither the cloud's metadata nor another worker."""
    wanted = [f"{shared.named(component)}:{port}" for component, port in _NEEDED]
    found = await shared.do("reach", places=[*wanted, MODEL, "169.254.169.254:80"])
    assert found.pop("169.254.169.254:80") != "open"
    assert set(found.values()) == {"open"}, found


_NEEDED = (("postgres", 5432), ("store", 9000), ("prefect-server", 4200))
