"""A release moves to another store and another database, by the commands in docs/operations.md; its accepted runs come
along."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.cluster import Cluster
from tests.e2e.programs import run
from tests.e2e.release import Release, merged, small
from tests.e2e.test_external import DATABASE, PASSWORD, SERVERS, servers  # noqa: F401  # a fixture
from tests.support.waiting import until

NAMESPACE, HOST = "backcast-e2e-moves", "moves.e2e.localhost"
TEXT = "a large input " * 10_000
IDLE = {"workers": {"pools": {"default": {"replicas": 0}}}}
SEAWEEDFS = {"store": {"bundled": {"kind": "seaweedfs"}}}
FALLBACK = {"store": {"fallback": {"mode": "bundled", "kind": "minio"}}}
MINIO = "s3://backcast at http://moving-backcast-minio:9000"


def _values(model: str) -> dict[str, Any]:
    return merged(small(HOST, model), {"prefectServer": {"mode": "off"}})


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def moving(cluster: Cluster, model: str) -> AsyncIterator[Release]:
    release = Release(cluster, "moving", NAMESPACE)
    await release.first_install(_values(model))
    yield release
    await release.http.aclose()
    await release.uninstall()


async def _queue(release: Release, key: str) -> str:
    """Submit a run whose input is in the store; no worker is there."""
    return await release.submit("measure", key=key, text=TEXT)


async def _refused(release: Release, values: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match="UPGRADE FAILED") as refused:
        await release.install(values)
    assert words in str(refused.value)


async def test_from_minio_to_seaweedfs(moving: Release, model: str) -> None:
    done = await moving.submit("enlarge", key="large", word="cast", times=100_000)
    large = await moving.result(done)
    idle = merged(_values(model), IDLE)
    await moving.install(idle)
    queued = await _queue(moving, "queued")

    await _refused(moving, merged(idle, SEAWEEDFS), f'set store.movedFrom to "{MINIO}"')
    assert [pod.spec.containers[0].name for pod in moving.pods("store")] == ["minio"], "nothing has changed"

    exchanged = merged(_values(model), SEAWEEDFS, FALLBACK)
    await _refused(moving, exchanged, "make it store.fallback first")
    await moving.install(merged(idle, {"store": {"fallback": {"mode": "bundled", "kind": "seaweedfs"}}}))
    assert sorted(pod.spec.containers[0].name for pod in moving.pods("store")) == ["minio", "seaweedfs"]
    await moving.install(exchanged)
    assert await moving.result(done) == large, "read from the fallback"
    assert (await moving.result(queued))[0] == "queued", "its input too"
    after = await moving.submit("enlarge", key="after", word="cast", times=100_000)
    expected = await moving.result(after)

    only = merged(_values(model), SEAWEEDFS)
    await _refused(moving, only, f'set store.movedFrom to "{MINIO}"')
    copy = ("exec", f"deployment/{moving.named('api')}", "-n", NAMESPACE, "--", "backcast", "copy-objects")
    assert "Copied" in (await run("kubectl", *copy)).out
    assert "Copied 0 objects" in (await run("kubectl", *copy)).out
    await moving.install(merged(only, {"store": {"movedFrom": MINIO}}))

    async def servers_left() -> list[str]:
        return [pod.spec.containers[0].name for pod in moving.pods("store", leaving=True)]

    await until(servers_left, lambda left: left == ["seaweedfs"], timeout=120, every=1)
    assert await moving.result(done) == large
    assert await moving.result(after) == expected
    assert (await moving.do("add", key="anew", a=1, b=2)) == ["anew", 3]


async def test_from_the_bundled_database_to_another(
    moving: Release,
    model: str,
    servers: Cluster,  # noqa: F811
) -> None:
    at_sea = merged(_values(model), SEAWEEDFS)
    await moving.install(merged(at_sea, IDLE))
    done, queued = await moving.submit("add", key="done", a=1, b=2), await _queue(moving, "waits")
    url = f"postgresql://moved:moved-password@{DATABASE}/moved"
    there = {"postgres": {"mode": "external", "external": {"url": url}}}
    await _refused(moving, merged(at_sea, there), 'set postgres.movedFrom to "bundled"')

    stop = ("scale", "deployment", "-n", NAMESPACE, "-l", moving.selector(), "--replicas=0")
    await run("kubectl", *stop)
    psql = ("exec", "-i", "-n", SERVERS, "postgres", "--", "psql", "-q", "-v", "ON_ERROR_STOP=1")
    admin = f"postgresql://postgres:{PASSWORD}@127.0.0.1/postgres"
    for statement in ("create role moved login password 'moved-password'", "create database moved owner moved"):
        await run("kubectl", *psql, admin, "-c", statement)
    dump = ("exec", "-n", NAMESPACE, f"{moving.named('postgres')}-0", "--", "pg_dump", "-U", "postgres")
    dumped = await run("kubectl", *dump, "--no-owner", "--no-privileges", "backcast")
    await run("kubectl", *psql, "postgresql://moved:moved-password@127.0.0.1/moved", stdin=dumped.out)

    await moving.install(merged(at_sea, there, {"postgres": {"movedFrom": "bundled"}}))
    assert not moving.pods("postgres")
    assert await moving.result(done) == ["done", 3]
    assert (await moving.result(queued))[0] == "waits"
