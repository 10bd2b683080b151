"""Connects a process to the database. Decides how long a call may take, and which errors are an outage."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, Self

import asyncpg

from backcast.errors import LedgerUnavailable
from backcast.settings import Database

CHANNEL = "backcast_ready"
NOTIFY_INTERVAL = 0.01
"""Seconds between two notifications of one pool: NOTIFY serialises commits, so it is sent rarely and by itself."""
ENDED = "backcast_ended"
ENDED_INTERVAL = 0.05
"""Seconds between two notifications that runs have ended. They name none: who waits for some looks for all of them."""


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Turn every error of a database that is away, full or not ready into `LedgerUnavailable`."""
    try:
        yield
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.InvalidCatalogNameError) as error:
        raise LedgerUnavailable(
            f"The database has no schema of this release ({error}): run `backcast setup`."
        ) from None
    except (
        OSError,
        TimeoutError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        asyncpg.PostgresConnectionError,  # class 08
        asyncpg.OperatorInterventionError,  # class 57: shutting down, starting up, cancelled by time-out
        asyncpg.InsufficientResourcesError,  # class 53: disk full, too many connections, out of memory
        asyncpg.ReadOnlySQLTransactionError,
        asyncpg.DeadlockDetectedError,
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InsufficientPrivilegeError,  # of the role: to connect, or to a table
        asyncpg.ObjectNotInPrerequisiteStateError,  # a database that takes no connections
        asyncpg.PostgresSystemError,  # class 58: I/O errors of the server's disk
        asyncpg.InternalServerError,  # class XX
    ) as error:
        if isinstance(error, asyncpg.InterfaceError) and "arguments for this query" in str(error):
            raise  # a bug of ours: no wait would end it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LedgerUnavailable(f"The database can't be used right now: {reason}") from None


def _closed(lost: asyncio.Future[None], _connection: object) -> None:
    if not lost.done():
        lost.set_result(None)


def _drop(connection: Any) -> None:
    with contextlib.suppress(asyncpg.InterfaceError):  # it is closed, and the pool has taken it back
        connection.terminate()


class _Stateless(asyncpg.Connection):
    """A pooled connection. No statement leaves state in a session, so its return to the pool costs no round trip."""

    def get_reset_query(self) -> str:
        return ""


class Ledger:
    """A process's connection pool. It connects lazily, reconnects by itself and raises `LedgerUnavailable`.

    No call takes longer than `timeout`, even when the database refuses, hangs, or has no connection left.
    """

    def __init__(
        self, url: str, *, pool: int = 10, name: str = "backcast", timeout: timedelta = timedelta(seconds=10)
    ) -> None:
        self._url = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", url)
        self._size = pool
        self.timeout = timeout.total_seconds()
        self._server_settings = {
            "application_name": name,
            "search_path": "backcast",
            # Every statement on the hot path is an index probe; planning it anew costs more than running it, and a
            # plan made while a table was empty must not become a scan of a million rows.
            "plan_cache_mode": "force_generic_plan",
            "enable_seqscan": "off",
            "jit": "off",
            "idle_in_transaction_session_timeout": "10s",
            "statement_timeout": "30s",
        }
        self._pool: asyncpg.Pool | None = None
        self._dirty: set[tuple[str, str]] = set()
        self._notifiers: dict[tuple[str, str], asyncio.Task[None]] = {}

    @classmethod
    def of(cls, database: Database, *, name: str, pool: int | None = None) -> Self:
        """The ledger that the settings name; `name` is shown in pg_stat_activity."""
        return cls(database.url.get_secret_value(), pool=pool or database.pool, name=name, timeout=database.timeout)

    async def _connections(self) -> asyncpg.Pool:
        if self._pool is None:
            # min_size=0: the first statement, and not the process's start, waits for a database that is away
            self._pool = asyncpg.create_pool(
                self._url,
                min_size=0,
                max_size=self._size,
                connection_class=_Stateless,
                server_settings=self._server_settings,
                timeout=min(5.0, self.timeout),
                max_inactive_connection_lifetime=60,
            )
            await self._pool
        return self._pool

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        """A pooled connection, for `timeout` in all: the wait for it counts."""
        with _reaching():
            try:
                async with asyncio.timeout(self.timeout):
                    pool = await self._connections()
                    connection = await pool.acquire()
                    try:
                        yield connection
                    except asyncio.CancelledError:
                        # Out of time, or the caller went away. asyncpg would ask the server to cancel the statement and
                        # wait for its answer; a server that hangs never answers.
                        _drop(connection)
                        raise
                    finally:
                        await pool.release(connection)
            except TimeoutError:
                raise LedgerUnavailable(f"The database did not answer within {self.timeout:g} s.") from None

    async def fetch(self, sql: str, *values: Any) -> list[asyncpg.Record]:
        async with self._connection() as connection:
            return await connection.fetch(sql, *values)

    async def fetchrow(self, sql: str, *values: Any) -> asyncpg.Record | None:
        async with self._connection() as connection:
            return await connection.fetchrow(sql, *values)

    async def execute(self, sql: str, *values: Any) -> str:
        async with self._connection() as connection:
            return await connection.execute(sql, *values)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection with an open transaction, committed at the end; `timeout` holds for all of it."""
        async with self._connection() as connection:
            try:
                await connection.execute("begin")
                yield connection
                await connection.execute("commit")
            except BaseException:
                _drop(connection)  # which rolls back, without an answer to wait for
                raise

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection of its own, outside of the pool: for listening, heartbeats and advisory locks."""
        with _reaching():
            connection = await asyncpg.connect(
                self._url, server_settings=self._server_settings, command_timeout=self.timeout, timeout=5
            )
        try:
            with _reaching():
                yield connection
        finally:
            connection.terminate()

    async def check(self) -> None:
        """Readiness: reachable, writable, and the schema is there. Raises `LedgerUnavailable`."""
        row = await self.fetchrow(
            "select current_setting('transaction_read_only')::bool as read_only, exists (select from task_types)"
        )
        if row is not None and row["read_only"]:
            raise LedgerUnavailable("The database is read-only: look at its disk, or for the primary server.")

    def wake(self, pool: str) -> None:
        """Notify idle workers of `pool` that runs are ready: the first time at once, then at most every 10 ms.

        The notification is a hint, sent after the commit and outside of its transaction; workers also poll.
        """
        self._hint(CHANNEL, pool, NOTIFY_INTERVAL)

    def report_ends(self) -> None:
        """Notify those who wait for the end of a run that some have ended; a hint as well."""
        self._hint(ENDED, "", ENDED_INTERVAL)

    def _hint(self, channel: str, payload: str, interval: float) -> None:
        self._dirty.add((channel, payload))
        if (channel, payload) not in self._notifiers:
            self._notifiers[channel, payload] = asyncio.create_task(self._notify(channel, payload, interval))

    async def _notify(self, channel: str, payload: str, interval: float) -> None:
        while (channel, payload) in self._dirty:
            self._dirty.discard((channel, payload))
            with contextlib.suppress(LedgerUnavailable):
                # A hint need not be durable; without this, its commit would wait for the disk like a run's.
                await self.execute(
                    "select set_config('synchronous_commit', 'off', true), pg_notify($1, $2)", channel, payload
                )
            await asyncio.sleep(interval)
        del self._notifiers[channel, payload]

    async def listen(self, pool: str, ready: Callable[[], None]) -> None:
        """Call `ready` whenever a run of `pool` may be ready, for ever; a lost connection is opened again."""

        def notified(_connection: object, _pid: int, _channel: str, payload: object) -> None:
            if payload == pool:
                ready()

        while True:
            with contextlib.suppress(LedgerUnavailable):
                async with self.session() as connection:
                    lost = asyncio.get_running_loop().create_future()
                    connection.add_termination_listener(partial(_closed, lost))
                    await connection.add_listener(CHANNEL, notified)
                    ready()  # runs may have become ready while no connection listened
                    await lost
            await asyncio.sleep(1)

    async def aclose(self) -> None:
        for task in [*self._notifiers.values()]:
            task.cancel()
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None
