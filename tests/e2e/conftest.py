"""The session's cluster, images and releases. The tests that leave a release as they found it share one; `shared`
restores it before each of them, so a test that failed half-way does not fail the next one too.
"""

import logging
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e import cluster as clusters
from tests.e2e import dumps, images, scripted
from tests.e2e.cluster import Cluster
from tests.e2e.programs import run
from tests.e2e.release import Release, merged, small

ORDER = (
    "images",
    "values",
    "defaults",
    "access",
    "switches",
    "scaling",
    "faults",
    "upgrade",
    "second",
    "external",
    "moves",
    "drain",
)
"""The cheap ones first; `defaults` leaves volumes behind that the shared release is installed onto."""
NAMESPACE, NAME = "backcast-e2e", "backcast"
KEEP = bool(os.environ.get("E2E_KEEP"))
"""Leave everything in the cluster at the end, for inspection."""

for _noisy in ("httpx", "kubernetes", "urllib3"):
    logging.getLogger(_noisy).setLevel(logging.WARNING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.nodeid.startswith("tests/e2e/")]
    for item in here:
        item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
        if item.get_closest_marker("timeout") is None:
            # By a signal: the other method ends the whole process, without any clean-up. Fixtures do not count: the
            # first test waits for the cluster, and each step of that has a deadline.
            item.add_marker(pytest.mark.timeout(420, method="signal", func_only=True))
    if len(here) == len(items):
        items.sort(key=lambda item: ORDER.index(item.path.stem.removeprefix("test_")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed and "cluster" in getattr(item, "fixturenames", ()):
        report.sections.append(("the cluster", dumps.dump(item.nodeid)))
    return report


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def tools() -> None:
    """Docker answers and the programs are there, or the session ends with a sentence."""
    await clusters.find_tools()


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def built(tools: None) -> dict[str, str]:
    """Our images by name, with their ids."""
    return await images.build()


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def bare(tools: None) -> AsyncIterator[Cluster]:
    """The cluster without any image of ours."""
    cluster = await clusters.connect()
    await cluster.clear()
    yield cluster
    if not KEEP:
        await cluster.clear(wait=False)
    cluster.api.close()


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def cluster(bare: Cluster, built: dict[str, str]) -> Cluster:
    """The cluster, with every image that a release may need: loaded once."""
    rendered = [
        (await run(*images.RENDER, "--set", f"store.bundled.kind={kind}")).out for kind in ("minio", "seaweedfs")
    ]
    await bare.load(built | await images.others(*rendered))
    return bare


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def model(cluster: Cluster) -> str:
    """The URL, in the cluster, of a model that answers by script."""
    await scripted.serve_model(cluster)
    return scripted.MODEL


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def shared_values(cluster: Cluster, model: str) -> dict[str, Any]:
    """Small, with the scalers that this cluster can drive."""
    values = small("shared.e2e.localhost", model)
    groups = cluster.groups()
    if "metrics.k8s.io" in groups:
        # It never scales by itself: the target is out of reach.
        scaler = {"enabled": True, "minReplicas": 1, "maxReplicas": 2, "targetCPUUtilizationPercentage": 1000}
        values = merged(values, {"api": {"autoscaling": scaler}})
    if "keda.sh" in groups:
        scaler = {"mode": "keda", "minReplicas": 0, "maxReplicas": 3}
        pool = {"slots": 1, "tasks": ["e2e_elastic"], "builtinTasks": False, "autoscaling": scaler}
        values = merged(values, {"workers": {"pools": {"elastic": pool}}})
    return values


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def _shared(cluster: Cluster, shared_values: dict[str, Any]) -> AsyncIterator[Release]:
    release = Release(cluster, NAME, NAMESPACE)
    await release.restore(shared_values)
    await release.watch_ends()
    yield release
    await release.http.aclose()


@pytest_asyncio.fixture(loop_scope="session")
async def shared(_shared: Release, shared_values: dict[str, Any]) -> Release:
    await _shared.restore(shared_values)
    return _shared
