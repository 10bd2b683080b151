"""Copies the objects of the fallback that the store lacks. May be stopped and begun anew; replaces nothing."""

import asyncio

from backcast.errors import ConfigurationError
from backcast.models import is_cached_value, run_of
from backcast.store import Missing, Store

_AT_ONCE = 4
"""Objects in memory at the same time."""


async def copy(store: Store) -> tuple[int, int]:
    """How many objects were copied, and how many were there already.

    An object of a run that has been removed meanwhile comes along; the orphan sweep removes it.

    Raises:
        ConfigurationError: there is no fallback.
        StoreUnavailable: one of the two is away.
    """
    older = store.fallback
    if older is None:
        raise ConfigurationError("BACKCAST_STORE__FALLBACK__URL must name the store to copy from.")
    copied = there = 0

    async def bring(key: str) -> bool:
        try:
            return await store.create(key, await older.get(key))
        except Missing:  # removed since it was listed
            return False

    for kind in ("inputs", "results", "logs", "cache"):
        present = {each.key async for page in store.pages(kind) for each in page}
        async for page in older.pages(kind):
            ours = [each.key for each in page if run_of(each.key) or is_cached_value(each.key)]
            wanted = [key for key in ours if key not in present]
            there += len(ours) - len(wanted)
            for at in range(0, len(wanted), _AT_ONCE):
                copied += sum(await asyncio.gather(*map(bring, wanted[at : at + _AT_ONCE])))
    return copied, there
