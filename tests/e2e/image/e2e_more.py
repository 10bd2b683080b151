"""A task that a later release of the user's image brings."""

from typing import Any

from prefect import task


@task
async def brought(key: str) -> list[Any]:
    return [key]
