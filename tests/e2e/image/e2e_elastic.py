"""The tasks of a pool that may have no worker at all."""

import asyncio
from typing import Any

from prefect import task


@task
async def elastic_nap(key: str, seconds: float) -> list[Any]:
    await asyncio.sleep(seconds)
    return [key, seconds]
