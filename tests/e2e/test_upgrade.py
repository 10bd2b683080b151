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


async def test_runs_of_a_task_that_a_roll_back_took_away_wait_for_it(
    shared: Release, shared_values: dict[str, Any]
) -> None:
    """No worker has the task for a while. Its runs are neither failed nor charged, and hold up no other run."""
    pool = {"workers": {"pools": {"default": {"tasks": ["e2e_tasks", "e2e_more"]}}}}
    later = merged(shared_values, pool)
    await shared.install(later)
    await shared.knows("brought")
    none = {"workers": {"pools": {"default": {"replicas": 0}}}}
    await shared.install(merged(later, none))
    runs = [await shared.submit("brought", key=f"{n}") for n in range(8)]
    await shared.install(shared_values)
    for n in range(40):  # far longer than a worker takes to look at the eight
        assert await shared.do("nap", key=f"{n}", seconds=1) == [f"{n}", 1]
    waiting = [await shared.run(run) for run in runs]
    assert {(run["state"], run["attempts"]) for run in waiting} == {("queued", 0)}
    await shared.install(later)
    assert [await shared.result(run) for run in runs] == [[f"{n}"] for n in range(8)]
    assert {(await shared.run(run))["attempts"] for run in runs} == {1}
