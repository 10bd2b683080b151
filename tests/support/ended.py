"""Puts runs among those that are over, past the product's own rules for their ends."""

import time
from datetime import date, timedelta
from uuid import UUID

from backcast.ledger import ended
from backcast.ledger.connection import Ledger


async def end(ledger: Ledger, state: str, where: str = "true", *values: object) -> None:
    """End these runs, in this state."""
    moved = ended.moved(state=f"'{state}'", result_key="'k'" if state == "completed" else "null::text")
    sql = f"with gone as (delete from runs where {where} returning *), {moved} select id from moved"
    await ended.fetch(ledger, sql, *values)


async def add(ledger: Ledger, run: UUID, *, since: float, **columns: object) -> None:
    """Record a run that ended `since` seconds ago, in the partition of its day if it did not end too late for that."""
    began, ended_at = (run.int >> 80) // 86_400_000, (time.time() - since) // 86_400
    table = "ended" if ended_at - ended.LATE <= began < ended_at + ended.AHEAD else "ended_late"
    names, places = ", ".join(columns), ", ".join(f"${n}" for n in range(3, len(columns) + 3))
    day = date(1970, 1, 1) + timedelta(days=began)
    await ledger.execute("select make_partitions($1, $1)", day)
    await ledger.execute(
        f"insert into {table} (finished_at, id, {names}) values (now() - make_interval(secs => $1), $2, {places})",
        since,
        run,
        *columns.values(),
    )
