"""The orphan sweep: removes stored objects that no run needs. Decides why each removal is safe while work goes on."""

import logging
from datetime import timedelta

from backcast.ledger import cursors, maintenance
from backcast.ledger.connection import Ledger
from backcast.ledger.submissions import RECORDED_WITHIN
from backcast.models import run_of
from backcast.store import Store

log = logging.getLogger("backcast.steward")

SIGNATURE = "ledger/id"
"""The object that names the ledger that owns this store."""


async def is_ours(ledger: Ledger, store: Store) -> bool:
    """Whether the store belongs to this ledger alone. The runs of another ledger are unknown here, so their objects
    would look like orphans. The first ledger that sweeps a store signs it; of two at once, one does."""
    ours = str(await cursors.identity(ledger)).encode()
    await store.create(SIGNATURE, ours)  # first: of a fallback, the signature would be read too
    owner = await store.get(SIGNATURE)
    if owner != ours:
        log.error(
            "the store belongs to another ledger, so nothing is swept: give each its own bucket or prefix, or"
            " remove the object %s to give the store to this one",
            SIGNATURE,
        )
    return owner == ours


async def sweep(
    ledger: Ledger, store: Store, keep: timedelta | None, *, inputs_after: timedelta = 2 * RECORDED_WITHIN
) -> int:
    """Remove the orphans of a store that `is_ours`, and return how many results are left of runs that the ledger does
    not know.

    A result is stored while its run is running, and the next attempt reads it only before the run has ended; the
    ledger is asked after the object was seen. So if a run has ended and names another object, no worker can come to
    name this one: a settlement that does so is refused, and the object is removed at once.

    A result of an unknown run may be the only trace of a run that was lost with a part of the ledger, as when an older
    backup was restored. It is kept for as long as the ledger keeps results; retention removes a run's objects before
    its row, so few other results have no run.

    A log is kept as long as its run. Of a run that was removed it is older than `keep`, and is removed as if it were
    a result of an unknown run.

    An input is stored before its run is recorded, which happens within `RECORDED_WITHIN` or never, by the database's
    clock. An input without a run is removed after twice that time, by the store's clock. Neither is compared with
    another clock, so it does not matter how far they are apart.
    """
    now = await store.now()
    removed, unknown = {"results": 0, "logs": 0, "inputs": 0}, 0
    for kind, after in (("results", keep), ("logs", keep), ("inputs", inputs_after)):
        async for objects in store.pages(kind):
            changed = {each.key: each.changed for each in objects}
            runs = {each.key: run for each in objects if (run := run_of(each.key)) is not None}
            found = await maintenance.orphans(ledger, runs)
            young = {
                key
                for key, is_unknown in found.items()
                if is_unknown and (after is None or now - changed[key] <= after)
            }
            await store.delete(found.keys() - young)
            removed[kind] += len(found) - len(young)
            unknown += len(young) if kind == "results" else 0
    for kind, count in removed.items():
        if count:
            log.info("removed %d objects from %s that no run needs", count, kind)
    return unknown
