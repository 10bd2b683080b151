"""Connects a process to the database. Decides how long a call may take, and which errors are an outage."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import asyncpg

from backcast import database_urls
from backcast.errors import ConfigurationError, LedgerFault, LedgerFull, LedgerUnavailable
from backcast.ledger import session
from backcast.process.background import OnDemand
from backcast.settings import Database

CHANNEL = "backcast_ready"
NOTIFY_INTERVAL = 0.01
"""Seconds between two notifications of one pool: NOTIFY serialises commits, so it is sent rarely and by itself."""
ENDED = "backcast_ended"
ENDED_INTERVAL = 0.05
"""Seconds between two notifications that runs have ended. They name none: who waits for some looks for all of them."""
REPORTED = "backcast_reported"
REPORTED_INTERVAL = 0.1
"""Seconds between two notifications that running runs have reported something."""
LOGS_READ = "backcast_logs_read"
"""Names running runs whose logs are read now. It is sent again for as long as they are, so that none has to arrive."""


REFUSED = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError)
"""A value that the database does not take, in an argument or in a row that the statement met."""
_FULL = "The database's disk is full: nothing can be stored until it has room again."
_AWAY = "The database can't be used right now."
_READ_ONLY = "The database is read-only: look at its disk, or for the primary server."
_NO_SCHEMA = "The database has no schema of this release: run `backcast setup`."
NEWEST = max(path.name[:4] for path in (Path(__file__).parent / "migrations/versions").glob("0*.py"))
"""The schema's version in this release."""
FULL_FOR = 30.0
"""Seconds for which a process whose write found the disk full is not ready, unless the same write succeeds earlier."""
LISTENS_FOR = 10.0
"""Seconds after which a connection that listens is tried: a firewall or a lost machine ends it without a word."""
_AT_ONCE = contextlib.nullcontext()


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Turn every error of a database that is away, full or not ready into `LedgerUnavailable`, which a wait may end,
    and every error that no wait ends into `LedgerFault`. `REFUSED` stays: it depends on a value."""
    try:
        yield
    except session.LOST_STATEMENTS:
        raise ConfigurationError(session.POOLED) from None
    except asyncpg.DiskFullError as error:
        raise LedgerFull(_FULL, reason=_words(error)) from None
    except asyncpg.ReadOnlySQLTransactionError as error:
        raise LedgerUnavailable(_READ_ONLY, reason=_words(error)) from None
    except (asyncpg.SyntaxOrAccessError, asyncpg.InternalServerError) as error:  # classes 42 and XX
        raise LedgerFault(_words(error)) from error
    except (
        OSError,
        TimeoutError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        asyncpg.PostgresConnectionError,  # class 08
        asyncpg.InvalidTransactionStateError,  # class 25: idle for too long
        asyncpg.InvalidAuthorizationSpecificationError,  # class 28
        asyncpg.TransactionRollbackError,  # class 40: a deadlock
        asyncpg.InsufficientResourcesError,  # class 53: too many connections, out of memory
        asyncpg.ObjectNotInPrerequisiteStateError,  # class 55: a database that takes no connections, a lock not given
        asyncpg.OperatorInterventionError,  # class 57: shutting down, starting up, cancelled by time-out
        asyncpg.PostgresSystemError,  # class 58: I/O errors of the server's disk
        asyncpg.InvalidCatalogNameError,
    ) as error:
        if isinstance(error, asyncpg.InterfaceError) and "arguments for this query" in str(error):
            raise LedgerFault(_words(error)) from error
        raise LedgerUnavailable(_AWAY, reason=_words(error)) from None
    except REFUSED:
        raise
    except asyncpg.PostgresError as error:  # such as a trigger's own: no process may end because of it
        raise LedgerFault(_words(error)) from error


def _words(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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

    No call takes longer than `timeout`, or the time that a transaction asks for, even when the database refuses, hangs,
    or has no connection left.
    """

    def __init__(
        self, url: str, *, pool: int = 10, name: str = "backcast", timeout: timedelta = timedelta(seconds=10)
    ) -> None:
        self._url = database_urls.for_asyncpg(url)
        self._size = pool
        self._turns = asyncio.Semaphore(max(1, pool // 3))
        self.timeout = timeout.total_seconds()
        self._name = {"application_name": name}
        self._keeps_sessions = False
        self._full: tuple[str, float] | None = None
        self._pool: asyncpg.Pool | None = None
        self._notifiers: dict[tuple[str, str], OnDemand] = {}

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
                server_settings=self._name,
                init=self._set_up,
                timeout=min(5.0, self.timeout),
                max_inactive_connection_lifetime=60,
            )
            await self._pool
        return self._pool

    async def _connect(self) -> asyncpg.Connection:
        return await asyncpg.connect(self._url, server_settings=self._name, command_timeout=self.timeout, timeout=5)

    async def _set_up(self, connection: Any) -> None:
        if not self._keeps_sessions:  # before anything is set, which another client's session might get
            await session.keeps(connection, self._connect)
            self._keeps_sessions = True
        await connection.execute(session.settings(connection.get_server_version().major, hurried=True))

    @contextlib.asynccontextmanager
    async def _reached(self, sql: str = "") -> AsyncIterator[None]:
        """`_reaching`, and what only this process knows: whether the schema is there, and which statement last found
        the disk full."""
        try:
            with _reaching():
                yield
        except LedgerFull:
            self._full = sql, time.monotonic()
            raise
        except LedgerFault as fault:
            if isinstance(fault.__cause__, asyncpg.SyntaxOrAccessError) and await self._lacks_schema():
                raise LedgerUnavailable(_NO_SCHEMA) from None
            raise
        if self._full is not None and self._full[0] == sql:
            self._full = None

    async def _lacks_schema(self) -> bool:
        """Whether the database has no schema yet, or that of an older release. One that can't be read is a fault, but
        for a database that does not let this role in: `backcast setup` does that last."""
        try:
            with _reaching():
                try:
                    connection = await self._connect()
                except asyncpg.InsufficientPrivilegeError:
                    return True
                try:
                    version = await connection.fetchval("select version_num from backcast.alembic_version")
                    return version is None or version < NEWEST
                finally:
                    connection.terminate()
        except LedgerFault as fault:
            if not isinstance(fault.__cause__, asyncpg.UndefinedTableError | asyncpg.InvalidSchemaNameError):
                raise
            return True

    @contextlib.asynccontextmanager
    async def _connection(
        self, sql: str = "", *, times: int = 1, turn: contextlib.AbstractAsyncContextManager[Any] = _AT_ONCE
    ) -> AsyncIterator[Any]:
        """A pooled connection, for so many times `timeout` in all: the wait for it counts, and so does a look at the
        schema."""
        timeout = times * self.timeout
        try:
            async with asyncio.timeout(timeout), turn, self._reached(sql):
                pool = await self._connections()
                connection = await pool.acquire()
                try:
                    yield connection
                except asyncio.CancelledError:
                    # Out of time, or the caller went away. asyncpg would ask the server to cancel the statement and
                    # wait for its answer; a server that hangs never answers.
                    _drop(connection)
                    raise
                except asyncpg.ReadOnlySQLTransactionError:
                    # The next one may reach the primary server, or a session whose default has changed. The pool
                    # would give this one out again and again.
                    _drop(connection)
                    raise
                finally:
                    await pool.release(connection)
        except TimeoutError:
            raise LedgerUnavailable(f"The database did not answer within {timeout:g} s.") from None

    async def fetch(self, sql: str, *values: Any) -> list[asyncpg.Record]:
        async with self._connection(sql) as connection:
            return await connection.fetch(sql, *values)

    async def fetchrow(self, sql: str, *values: Any) -> asyncpg.Record | None:
        async with self._connection(sql) as connection:
            return await connection.fetchrow(sql, *values)

    async def execute(self, sql: str, *values: Any) -> str:
        async with self._connection(sql) as connection:
            return await connection.execute(sql, *values)

    @contextlib.asynccontextmanager
    async def transaction(self, *, times: int = 1) -> AsyncIterator[asyncpg.Connection]:
        """A connection with an open transaction, committed at the end; so many times `timeout` holds for all of it. A
        third of the connections serve transactions, which may wait long for each other, and leave the others free."""
        async with self._connection(times=times, turn=self._turns) as connection:
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
        async with self._reached():
            connection = await self._connect()
            try:
                await self._set_up(connection)
                yield connection
            finally:
                connection.terminate()

    async def verify(self) -> None:
        """Connect once. Raises `LedgerUnavailable`, or `ConfigurationError`: what is reached keeps no sessions."""
        async with self.session():
            pass

    async def check(self) -> None:
        """Readiness: reachable, writable, and the schema is there. Raises `LedgerUnavailable`.

        Nothing but a write finds a full disk, so this repeats what the latest one found.
        """
        if self._full is not None and time.monotonic() - self._full[1] < FULL_FOR:
            raise LedgerFull(_FULL)
        async with self._connection() as connection:
            row = await connection.fetchrow(
                "select current_setting('transaction_read_only')::bool as read_only, exists (select from task_types)"
            )
            if row["read_only"]:
                raise asyncpg.ReadOnlySQLTransactionError("transaction_read_only is on")

    def wake(self, pool: str, route: str = "") -> None:
        """Notify idle workers of `pool` that runs are ready on `route`: at once, then at most every 10 ms.

        The notification is a hint, sent after the commit and outside of its transaction; heartbeats see what waits too.
        """
        self._hint(CHANNEL, f"{pool}\n{route}" if route else pool, NOTIFY_INTERVAL)

    def wake_for(self, rows: Iterable[asyncpg.Record]) -> None:
        """`wake` for those of these runs (pool, route, state) that are queued."""
        for pool, route in {(row["pool"], row["route"]) for row in rows if row["state"] == "queued"}:
            self.wake(pool, route)

    def report_ends(self) -> None:
        """Notify those who wait for the end of a run that some have ended; a hint as well."""
        self._hint(ENDED, "", ENDED_INTERVAL)

    def report_events(self) -> None:
        """Notify those who follow runs that some have reported something; a hint as well."""
        self._hint(REPORTED, "", REPORTED_INTERVAL)

    def _hint(self, channel: str, payload: str, interval: float) -> None:
        if (channel, payload) not in self._notifiers:
            notify = partial(self._notify, channel, payload)
            self._notifiers[channel, payload] = OnDemand("notify by PostgreSQL", notify, lambda: interval)
        self._notifiers[channel, payload].ask()

    async def _notify(self, channel: str, payload: str) -> None:
        with contextlib.suppress(LedgerUnavailable):
            # A hint need not be durable; without this, its commit would wait for the disk like a run's.
            await self.execute(
                "select set_config('synchronous_commit', 'off', true), pg_notify($1, $2)", channel, payload
            )

    async def listen(
        self, pool: str, ready: Callable[[str], None], logs_read: Callable[[Collection[UUID]], object] | None = None
    ) -> None:
        """Call `ready` with the route whenever a run of `pool` may be ready, and `logs_read` with the runs whose logs
        somebody reads, for ever; a lost connection is opened again."""

        def notified(_connection: object, _pid: int, _channel: str, payload: object) -> None:
            of, _, route = str(payload).partition("\n")
            if of == pool:
                ready(route)

        def read(_connection: object, _pid: int, _channel: str, payload: object) -> None:
            if logs_read is not None:
                logs_read({UUID(run) for run in str(payload).split()})

        while True:
            with contextlib.suppress(LedgerUnavailable):
                async with self.session() as connection:
                    lost = asyncio.get_running_loop().create_future()
                    connection.add_termination_listener(partial(_closed, lost))
                    await connection.add_listener(CHANNEL, notified)
                    await connection.add_listener(LOGS_READ, read)
                    ready("")  # runs may have become ready while no connection listened
                    while not lost.done():
                        await asyncio.wait({lost}, timeout=LISTENS_FOR)
                        await connection.execute("select")  # an end that was not announced shows only here
            await asyncio.sleep(1)

    async def aclose(self) -> None:
        for notifier in self._notifiers.values():
            notifier.cancel()
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None
