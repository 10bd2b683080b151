"""A second release beside the first, in its namespace: the longest name, SeaweedFS, and a lost Secret at the end."""

import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.e2e.cluster import Cluster
from tests.e2e.conftest import NAMESPACE
from tests.e2e.programs import run
from tests.e2e.release import Release, merged, small
from tests.e2e.test_values import LONGEST

HOST = "second.e2e.localhost"


def _values(model: str) -> dict[str, Any]:
    return merged(
        small(HOST, model),
        {"prefectServer": {"mode": "off"}, "store": {"bundled": {"kind": "seaweedfs"}}},
    )


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def second(cluster: Cluster, model: str) -> AsyncIterator[Release]:
    release = Release(cluster, LONGEST, NAMESPACE)
    await release.first_install(_values(model))
    yield release
    await release.http.aclose()
    if await release.is_installed():
        await release.uninstall()


async def test_casts_and_stores_in_seaweedfs(second: Release) -> None:
    async with second.client() as client:
        assert await client.cast("12 boxes, 2 broken", list[int], "how many", timeout=120) == [12, 2]
    run_id = await second.submit("enlarge", key="large", word="cast", times=100_000)
    assert await second.result(run_id) == ["large", "cast" * 100_000]
    assert len(await second.stored(run_id)) == 1
    [store] = second.pods("store")
    assert "seaweedfs" in store.spec.containers[0].image


async def test_two_releases_keep_to_themselves(shared: Release, second: Release) -> None:
    ours, theirs = await shared.submit("add", key="ours", a=1, b=2), await second.submit("add", key="theirs", a=3, b=4)
    assert (await shared.result(ours), await second.result(theirs)) == (["ours", 3], ["theirs", 7])
    assert (await shared.http.get(f"/v1/runs/{theirs}")).status_code == 404
    assert (await second.http.get(f"/v1/runs/{ours}")).status_code == 404
    headers = {"Host": shared.http.headers["Host"], "Authorization": second.http.headers["Authorization"]}
    async with httpx.AsyncClient(base_url=shared.http.base_url, headers=headers, trust_env=False) as client:
        assert (await client.get("/v1/runs")).status_code == 401, "the other release's key"
    names = [f"{release.named('postgres')}:5432" for release in (shared, second)]
    found = await second.do("reach", places=names)
    assert found == {names[0]: "no answer", names[1]: "open"}


async def test_an_old_volume_and_a_lost_secret(second: Release, model: str) -> None:
    """The first failure that users meet: helm names the cause and the remedy, and installs nothing."""
    core, ask = second.cluster.core, second.cluster.asking
    await second.uninstall()
    [kept] = [
        secret.metadata.name
        for secret in ask(core.list_namespaced_secret, NAMESPACE, label_selector=second.selector()).items
    ]
    ask(core.delete_namespaced_secret, kept, NAMESPACE)
    with pytest.raises(AssertionError, match=f"the Secret {kept} with its passwords is gone") as refused:
        await second.first_install(_values(model))
    [remedy] = re.findall(r"\((kubectl .*? delete pvc \S+)\)", str(refused.value))
    await run(*remedy.split())
    # The store's volume stays: its keys are not on it.
    await second.first_install(_values(model))
    assert await second.do("add", key="anew", a=1, b=2) == ["anew", 3]
