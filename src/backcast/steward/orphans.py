"""The orphan sweep: removes stored objects that no run needs. Decides why each removal is safe while work goes on."""

import logging
from collections.abc import Iterator
from uuid import UUID

from backcast.ledger import cursors, maintenance
from backcast.ledger.connection import Ledger
from backcast.models import uuid7
from backcast.store import Missing, Object, Store

log = logging.getLogger("backcast.steward")

SUBMITTED_WITHIN = 3600.0
"""Seconds after which an input without a run never gets one: its submission is over, with or without success."""
SIGNATURE = "ledger/id"
"""The object that names the ledger that owns this store."""


async def is_ours(ledger: Ledger, store: Store) -> bool:
    """Whether the store belongs to this ledger alone. The runs of another ledger are unknown here, so their objects
    would look like orphans. The first ledger that sweeps a store signs it; of two at once, one does."""
    ours = str(await cursors.identity(ledger)).encode()
    try:
        owner = await store.get(SIGNATURE)
    except Missing:
        await store.create(SIGNATURE, ours)
        owner = await store.get(SIGNATURE)
    if owner != ours:
        log.error(
            "the store belongs to another ledger, so nothing is swept: give each its own bucket or prefix, or"
            " remove the object %s to give the store to this one",
            SIGNATURE,
        )
    return owner == ours


async def sweep(ledger: Ledger, store: Store) -> None:
    """Remove the orphans of a store that `is_ours`."""
    for kind in ("results", "inputs"):
        await _sweep(ledger, store, kind)


async def _sweep(ledger: Ledger, store: Store, kind: str) -> None:
    """Remove the objects that no run needs.

    A result is stored while its run is running, and the next attempt reads it only before the run has ended; the
    ledger is asked after the object was seen. So if the run has ended and names another object, or is gone, no
    worker can come to name this one: a settlement that does so is refused.

    An input is stored before its run is recorded. One without a run may belong to a submission that is under way,
    but for less than an hour.
    """
    removed = 0
    async for objects in store.pages(kind):
        youngest = uuid7(SUBMITTED_WITHIN)
        candidates = {key: run for key, run in _runs(objects) if kind == "results" or run < youngest}
        if candidates and (found := await maintenance.orphans(ledger, candidates)):
            await store.delete(found)
            removed += len(found)
    if removed:
        log.info("removed %d objects from %s that no run needs", removed, kind)


def _runs(objects: list[Object]) -> Iterator[tuple[str, UUID]]:
    """The keys that are ours, `results/<run>/<fence>.json` and `inputs/<run>.json`, each with its run's id."""
    for each in objects:
        try:
            yield each.key, UUID(each.key.split("/")[1].removesuffix(".json"))
        except ValueError:
            continue
