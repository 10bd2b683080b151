"""An upgrade to the next release, with a migration, and a rollback: under load, without a lost run."""

from typing import Any

from tests.e2e.images import NEXT, NEXT_SCHEMA, NOW, head
from tests.e2e.load import load
from tests.e2e.release import Release, merged


def _tags(release: Release) -> set[str]:
    """The tags of the images that the release's own pods run."""
    return {
        container.image.rpartition(":")[2]
        for component in ("api", "worker", "steward", "prefect-server")
        for pod in release.pods(component)
        for container in pod.spec.containers
    }


async def _schema(release: Release) -> str:
    [[version]] = await release.sql("select version_num from backcast.alembic_version")
    return version


async def test_upgrade_and_rollback_under_load(shared: Release, shared_values: dict[str, Any]) -> None:
    assert (_tags(shared), await _schema(shared)) == ({NOW}, head())
    async with load(shared, "upgrade") as work:
        await shared.install(merged(shared_values, {"image": {"tag": NEXT}}))
        await shared.settled()
        assert (_tags(shared), await _schema(shared)) == ({NEXT}, NEXT_SCHEMA)
        await work.more(20)

        await shared.rollback()
        await shared.settled()
        assert _tags(shared) == {NOW}
        assert await _schema(shared) == NEXT_SCHEMA, "a schema has no way back, and needs none"
        assert "newer" in await shared.setup_log()
        await work.more(20)
    await work.verify()
