import asyncio

from prefect import task


@task
async def noop(n: int) -> dict[str, int]:
    return {"n": n}


@task
async def sleep(n: int, seconds: float) -> dict[str, int]:
    await asyncio.sleep(seconds)
    return {"n": n}
