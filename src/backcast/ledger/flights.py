"""Single flight: of all runs that would compute the same cached value at the same time, one does, the others wait.

A flight is a row by the hash of the cache key; it names the computing run and its attempt. Waiting runs are scheduled
and hold no slot. The landing makes them ready; without a landing, as after the loss of the worker, their own time does.
"""

from collections.abc import Sequence
from uuid import UUID

from backcast.ledger import lanes, waiting
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger

# The key's row lock lets one of the racing runs in. A flight whose attempt is over is taken over, but not in its first
# seconds: a racing statement's snapshot may be older than the claim of the run that it finds there.
_TAKE = """
insert into flights as f (key, run_id, fence) values ($1, $2, $3)
on conflict (key) do update set run_id = excluded.run_id, fence = excluded.fence, taken_at = now()
   where f.run_id = excluded.run_id
      or (f.taken_at < now() - interval '3 seconds' and not exists (
            select from runs r where r.id = f.run_id and r.fence = f.fence and r.state = 'running'))
returning key"""


async def take(ledger: Ledger, key: str, claim: Claim) -> bool:
    """Whether this run is the one that computes the value of `key`."""
    return await ledger.fetchrow(_TAKE, key, claim.id, claim.fence) is not None


# Followers first become scheduled, then look whether the flight is still there; a landing first removes the flight,
# then looks for followers. So one of the two sees the other, and no follower is left waiting.
_WAKE_FOLLOWERS = f"""
with free as materialized (
  select id from runs where state = 'scheduled' and flight = any($1)
     and not exists (select from flights f where f.key = runs.flight) limit 10000 for update skip locked)
update runs r set run_at = now(), flight = null,
       state = {waiting.ready("r")}
 where id = any(array(select id from free)) returning pool, route, state, lane"""  # noqa: S608  # a constant


async def land(ledger: Ledger, flights: Sequence[tuple[str, UUID, int]]) -> None:
    """End the flights (key, run, fence) of these attempts; the runs that wait for one of these keys become ready."""
    keys = [key for key, _, _ in flights]
    await ledger.execute(
        "delete from flights f using unnest($1::text[], $2::uuid[], $3::bigint[]) as l(key, run_id, fence)"
        " where f.key = l.key and f.run_id = l.run_id and f.fence = l.fence",
        keys,
        [run_id for _, run_id, _ in flights],
        [fence for _, _, fence in flights],
    )
    rows = await ledger.fetch(_WAKE_FOLLOWERS, keys)
    ledger.wake_for(rows)
    await lanes.try_promote(ledger, {row["lane"] for row in rows if row["state"] == "held"})
