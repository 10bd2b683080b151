"""Sets what every session relies on, whatever the server, the database and the role have as defaults, and recognises
a pooler between us and the server that does not keep sessions.

All of it is done by statements after the connection is made: poolers refuse or ignore settings in the startup packet.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from backcast.errors import ConfigurationError

_SETTINGS = {
    "statement_timeout": "0",  # first: the role's own may be so short that the rest would not be reached
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",  # or sessions that listen, or hold the lead, would end
    "search_path": "backcast",
    # An update that waited for a row's lock decides by the row's newest version: see `runs`.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "timezone": "UTC",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "transform_null_equals": "off",
}
# Every statement on the hot path is an index probe; planning it anew costs more than running it. A plan made with the
# statistics of another moment, when a table was empty or no run was queued, must not become a scan, or a sort, of a
# million rows.
_PLANS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_sort": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_indexscan": "on",
    "enable_indexonlyscan": "on",
    "enable_nestloop": "on",
    "jit": "off",
    "idle_in_transaction_session_timeout": "10s",
    "statement_timeout": "30s",
}
# A commit must be on the disk before its 202 is sent. Stricter settings, such as a standby's confirmation, stay.
_DURABLE = """
select set_config('synchronous_commit', 'on', false) where current_setting('synchronous_commit') = 'off'"""
POOLED = (
    "The database is reached through a pooler that gives every transaction another session, as PgBouncer does with"
    " pool_mode = transaction. Notifications, advisory locks and settings are lost there: connect to PostgreSQL itself,"
    " or set pool_mode = session for this database."
)


def settings(version: int, *, hurried: bool) -> str:
    """The statements for a server of this major version, in one text. `hurried` sessions have short statements only."""
    values = _SETTINGS | (_PLANS if hurried else {}) | ({"transaction_timeout": "0"} if version >= 17 else {})
    return ";".join([*(f"set {name} = {_quoted(value)}" for name, value in values.items()), _DURABLE])


def _quoted(value: str) -> str:
    return ", ".join(f"'{part.strip()}'" for part in value.split(","))


async def keeps(connection: Any, connect: Callable[[], Awaitable[Any]]) -> None:
    """Raise `ConfigurationError` if this connection's session is not its own.

    A pooler makes up the process id that it gives to a client, so a server that reports the same one is reached
    directly. Behind a pooler, another client opens transactions: it gets this connection's session or, while it holds
    one, this connection may get another, or none. Once is not enough, as further clients take sessions meanwhile.
    """
    try:
        mine = await _pid(connection)
        if mine == connection.get_server_pid():
            return
        other = await connect()
        try:
            shared = await _share(connection, mine, other)
        finally:
            other.terminate()
    except LOST_STATEMENTS:
        shared = True
    if shared:
        raise ConfigurationError(POOLED)


async def _share(connection: Any, mine: int, other: Any) -> bool:
    for _ in range(10):
        if await _pid(connection) != mine:  # and if not: poolers give the session that was used last to who comes next
            return True
        try:
            await other.execute("begin", timeout=3)
        except TimeoutError:  # it waits for the only session, which is this connection's own
            return False
        try:
            if await _pid(other) == mine or await _pid(connection) != mine:
                return True
        except TimeoutError:  # the only session is the other's
            return True
        await other.execute("rollback", timeout=3)
    return False


LOST_STATEMENTS = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)
"""A statement that was prepared in one session was executed in another one."""


async def _pid(connection: Any) -> int:
    return await connection.fetchval("select pg_backend_pid()", timeout=3)
