"""Sets aside runs whose row has a value that statements can't compute with, such as the largest fence there is.

Every statement of a poll takes many rows, and fails for all of them when one such row is among them. No release writes
such values; a person or a damaged backup can. So they are looked for only after a statement has been refused.
"""

import json
import logging
from uuid import UUID

from backcast.ledger import ended, lanes
from backcast.ledger.connection import REFUSED, Ledger
from backcast.models import Problem

log = logging.getLogger("backcast.ledger")

_COUNT = "between 0 and 1000000000"
UNUSABLE = Problem(
    code="unusable_row",
    title="The run's row has an impossible value",
    detail="Its fence, its attempts or its times are out of range, so no worker can claim it: submit the run again.",
)

# Lanes first, then runs, as everywhere. It reads all live rows, which takes seconds for a million: so it happens only
# after an error, and once in ten seconds however many processes meet one. The row lock of the cursor lets one of them
# in. A worker that executes such a run can't settle it: the row is no longer running.
_SET_ASIDE = f"""
with turn as materialized (
  insert into cursors as c (name, value) values ('unusable', '{UUID(int=0)}')
      on conflict (name) do update set moved_at = now() where c.moved_at < now() - interval '10 seconds'
  returning name),
bad as materialized (
  select id, lane from runs where exists (select from turn)
     and not (fence between 0 and 1000000000000000000 and attempts_used {_COUNT} and retries_used {_COUNT}
              and max_attempts {_COUNT} and run_at >= '0001-01-01 00:00:00+00' and run_at < '10000-01-01 00:00:00+00')),
lane as materialized (
  select name from lanes where name = any(array(select lane from bad)) order by name for update),
gone as (
  delete from runs where id = any(array(select id from bad)) and (select count(*) from lane) >= 0 returning *),
{ended.moved(state="'failed'", error="$1::json")},
{lanes.FREED}
select id from moved"""  # noqa: S608  # constants


async def set_aside(ledger: Ledger, error: Exception) -> None:
    """Fail the runs that may have caused this error, if it was about a value; if somebody has just done so, nothing is
    done. Raises nothing."""
    if not isinstance(error, REFUSED):
        return
    try:
        for row in await ended.fetch(ledger, _SET_ASIDE, json.dumps(UNUSABLE.model_dump())):
            log.error("run %s is set aside as failed: its row has an impossible value", row["id"])
            ledger.report_ends()
    except Exception:
        log.exception("can't look for runs with impossible values")
