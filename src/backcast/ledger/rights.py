"""What each part may do in the ledger: one table, which `backcast setup` grants after the migrations. Knows no URLs.

A setup runs while the pods of the release before still serve. So a right leaves this table one release after the last
statement that needs it, as migrations only add.
"""

import re
from collections.abc import Mapping

from backcast.errors import ConfigurationError
from backcast.ledger.connection import Ledger

# A worker claims any run, and moves it when it is over: it reads all of it. It needs no results of others.
_SETTLED = """fence, worker_id, started_at, prefetched, attempts_used, retries_used, usage, progress, run_at, flight,
 attempts"""
_MOVED = "state, error, promoted, pool, route, parked_at"
"""What the dispatch of due runs, a route or an unusable row changes: every worker and steward does that."""
_PAUSES = "select, update (complete), delete"
_WRITTEN = "id, fence, state, pool"
_REPEATED = (
    "id, task, pool, owner, lane, batch_id, retry_of, priority, state, max_attempts, signature, input, input_key,"
    " metadata"
)
"""What the retry of many runs takes over from each."""
_COUNTED = "promoted, refilled_at, tokens, served, recent"
"""What a promotion, or the end of a promoted run, changes in its lane."""

RIGHTS: Mapping[str, Mapping[str, str]] = {
    "api": {
        "alembic_version": "select",
        "batches": "select, insert, update (idem_key)",
        "events": "select",
        "flights": "select (key, run_id)",
        "lanes": "select, insert, update",
        "make_partitions(date,date)": "execute",
        "all_runs": "select",
        "ended": "select, insert",
        "ended_completed": "select",
        "ended_late": "select, insert",
        "ended_otherwise": "select",
        "idempotency_keys": "select, insert, delete, update (key)",
        "operations": "select, insert, update (idem_key, state, finished_at)",
        "pauses": "select, insert, update (reason, by, since, until, release, complete), delete",
        "retries": "select, insert",
        "runs": "select, insert, delete, update (state, route, promoted, parked_at, cancel_requested_at)",
        "task_types": "select",
        "workers": "select, update (drain_asked_at)",
    },
    "worker": {
        "alembic_version": "select",
        "cursors": "select, insert, update (moved_at)",
        "events": "select, insert",
        "flights": "select, insert, update, delete",
        "lanes": f"select, update ({_COUNTED})",
        "make_partitions(date,date)": "execute",
        "all_runs": "select (id, fence, state, worker_id, lost_fence)",
        "ended": f"select ({_WRITTEN}), insert",
        "ended_late": f"select ({_WRITTEN}), insert",
        "pauses": _PAUSES,
        "runs": f"select, delete, update ({_MOVED}, {_SETTLED})",
        "task_types": "select, insert, update",
        "workers": "select, insert, update, delete",
    },
    "steward": {
        "alembic_version": "select",
        "retire_partition(text)": "execute",
        "drop_retired()": "execute",
        "backlog": "select",
        "batches": "select, update (size), delete",
        "cursors": "select, insert, update",
        "events": "select, delete",
        "flights": "select, delete",
        "lanes": f"select, update ({_COUNTED})",
        "make_partitions(date,date)": "execute",
        "all_runs": "select",
        "ended": "select, insert",
        "ended_completed": "select, delete",
        "ended_late": "select, insert, delete",
        "ended_otherwise": "select, delete",
        "idempotency_keys": "select, delete, update (key)",
        "operations": "select, delete, update (cursor, done, skipped, failed, state, finished_at)",
        "pauses": _PAUSES,
        "retries": "select, insert, delete",
        "runs": f"select, insert ({_REPEATED}), delete, maintain,"
        f" update ({_MOVED}, attempts_used, attempts, lost_fence, cancel_requested_at)",
        "task_types": "select, delete, update (seen_at)",
        "workers": "select, delete",
    },
    "scaler": {"backlog": "select"},
}
"""By part and table, view or function, in the words of GRANT. `maintain` is the right to vacuum."""
PROCESSES = ("api", "worker", "steward")
"""The parts that are processes of ours."""


def each(rights: str) -> list[tuple[str, list[str]]]:
    """The single rights, each with its columns, or none for the whole table."""
    found = re.findall(r"(\w+)\s*(?:\(([^)]*)\))?", rights)
    return [(right, [name.strip() for name in names.split(",")] if names else []) for right, names in found]


# Before PostgreSQL 17 only the owner of a table, and members of its role, may vacuum it.
_LACKING = """
with given as (
  select name, right_, column_, n, case when name !~ '\\(' then ('backcast.' || name)::regclass end as id,
         right_ = 'maintain' and current_setting('server_version_num')::int < 170000 as is_owners
    from unnest($1::text[], $2::text[], $3::text[]) with ordinality as g(name, right_, column_, n))
select name || ': ' || string_agg(
         concat(right_, ' (' || column_ || ')',
                case when is_owners then format(' (`grant %I to %I`)', owner, current_user) end),
         ', ' order by n) as lacks
  from given left join lateral (select pg_get_userbyid(relowner) as owner from pg_class where oid = id) o on true
 where not case when id is null then has_function_privilege('backcast.' || name, right_)
                when is_owners then pg_has_role(owner, 'usage')
                when column_ is null then has_table_privilege(id, right_)
                else has_column_privilege(id, column_, right_) end
 group by name order by name"""


async def require(ledger: Ledger, part: str) -> None:
    """Raise `ConfigurationError` unless the ledger's role may do all that this part does."""
    wanted = [
        (name, right, column)
        for name, rights in RIGHTS[part].items()
        for right, columns in each(rights)
        for column in columns or [None]
    ]
    rows = await ledger.fetch(_LACKING, *map(list, zip(*wanted, strict=True)))
    if rows:
        raise ConfigurationError(
            f"The role lacks rights that the {part} needs in the schema backcast"
            f" ({'; '.join(row['lacks'] for row in rows)}): run `backcast setup` with the role in"
            f" BACKCAST_SETUP__{part.upper()}_URL, or grant them yourself."
        )
