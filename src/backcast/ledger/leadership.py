"""Decides which steward leads: one at a time, by an advisory lock that ends with its session."""

from uuid import UUID

import asyncpg

_LOCK = "backcast.steward"


async def take_lead(connection: asyncpg.Connection) -> bool:
    """Whether this session leads: it does until it ends, or has been silent for ten seconds.

    The database must notice by itself that a leader is stopped (its session would stay) or that its machine is gone
    (its session would stay for hours).
    """
    if not await connection.fetchval("select pg_try_advisory_lock(hashtext($1))", _LOCK):
        return False
    for setting, value in (
        ("idle_session_timeout", "10s"),
        ("tcp_keepalives_idle", "5"),  # on a unix socket these three are ignored
        ("tcp_keepalives_interval", "2"),
        ("tcp_keepalives_count", "3"),
    ):
        await connection.execute("select set_config($1, $2, false)", setting, value)
    return True


async def beat(connection: asyncpg.Connection, steward: UUID) -> None:
    """Record the leader. While this statement does not get through, the heartbeats of workers do not either."""
    await connection.execute(
        """insert into cursors (name, value) values ('leader', $1)
           on conflict (name) do update set value = excluded.value, moved_at = now()""",
        steward,
    )
