"""Provisions roles, databases, the schema and the store; `check` only tries them.

Decides the order, the waiting time, and the sentences that an operator reads. Runs once per release, by a Job or by
hand.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from backcast.errors import BackcastError, ConfigurationError, LedgerUnavailable, StoreUnavailable, Unavailable
from backcast.ledger import inspection, provisioning
from backcast.ledger.connection import Ledger
from backcast.ledger.migration import migrate
from backcast.ledger.rights import PROCESSES
from backcast.models import uuid7
from backcast.process.outages import Outage
from backcast.settings import Settings
from backcast.store import Missing, Store, copying, open_store

Report = Callable[[str], object]
T = TypeVar("T")

AGAIN_EVERY = 1.0
"""Seconds between two tries while something is not there yet."""


def prepare(settings: Settings, report: Report) -> None:
    """Provision everything, then try it. Safe to repeat, and to run from several places at once.

    Raises:
        ConfigurationError: a person must change something; the sentence names it.
        Unavailable: the database or the store was not there for `setup.patience`.
    """
    url, setup = settings.database.url.get_secret_value(), settings.setup
    deadline = time.monotonic() + setup.patience.total_seconds()
    if setup.admin_url is not None:
        admin = setup.admin_url.get_secret_value()
        _wait(admin, deadline, report)
        _verify(admin, deadline, report)
        for each in (settings.database.url, setup.prefect_url):
            if each is not None:
                report(provisioning.provision(admin, each.get_secret_value()))
    _wait(url, deadline, report)
    _verify(url, deadline, report)
    asyncio.run(_inspect(settings))
    report(migrate(url))
    if setup.admin_url is not None:
        for part, its in setup.roles.items():
            report(provisioning.provision_role(setup.admin_url.get_secret_value(), its, url, part))
    if setup.roles:
        report(provisioning.grant(url, setup.roles))
    for part in PROCESSES:
        if part in setup.roles:
            _wait(setup.roles[part], deadline, report)
            asyncio.run(_inspect(settings, part))
    _prepare_store(settings, deadline, report)


def await_prefect_database(settings: Settings, report: Report) -> None:
    """Return when `setup.prefect_url` can be connected to. Waits without a limit, also for its role to be made.

    Raises:
        ConfigurationError: there is no such setting.
    """
    if settings.setup.prefect_url is None:
        raise ConfigurationError("BACKCAST_SETUP__PREFECT_URL must name the database to wait for.")
    url = settings.setup.prefect_url.get_secret_value()
    _until_there(lambda: _why_not(url), math.inf, report)


def _why_not(url: str) -> str | None:
    try:
        return provisioning.why_not_ready(url)
    except ConfigurationError as error:  # refused as long as the role does not exist
        return error.detail


def _wait(url: str, deadline: float, report: Report) -> None:
    if why := _until_there(lambda: provisioning.why_not_ready(url), deadline, report):
        raise Unavailable(f"{why}. Is it running, and does the setting name its address?")


def _verify(url: str, deadline: float, report: Report) -> None:
    """Before anything is set or locked: behind some poolers, another client's session would be."""

    def why_not() -> str | None:
        try:
            asyncio.run(Ledger(url, name="backcast-setup").verify())
        except LedgerUnavailable as error:
            return error.detail
        return None

    if why := _until_there(why_not, deadline, report):
        raise Unavailable(why)


async def _inspect(settings: Settings, part: str | None = None) -> None:
    """The database, or with a part what its role may do there."""
    url = settings.setup.roles.get(part or "", settings.database.url.get_secret_value())
    async with aclosing(Ledger(url, name="backcast-check", pool=2, timeout=settings.database.timeout)) as ledger:
        await (inspection.rights(ledger, part) if part else inspection.settings(ledger))


def _prepare_store(settings: Settings, deadline: float, report: Report) -> None:
    with asyncio.Runner() as runner:
        store = open_store(settings.store)

        async def ensure() -> None:
            await store.ensure()
            if store.fallback is not None and settings.store.fallback.create:
                await store.fallback.ensure()

        def why_not() -> str | None:
            try:
                runner.run(ensure())
            except StoreUnavailable as error:
                return str(error)
            return None

        try:
            if why := _until_there(why_not, deadline, report):
                raise StoreUnavailable(why)
            runner.run(_try(store, report))
        finally:
            runner.run(store.aclose())
    report(f"The store {settings.store.url} is there, and every call works.")


def _until_there(why_not: Callable[[], str | None], deadline: float, report: Report) -> str | None:
    """Wait until nothing is missing, and return None; after the deadline, return the reason that is left."""
    outage = Outage(report)
    while (why := why_not()) is not None and time.monotonic() <= deadline:
        outage.failed(why)
        time.sleep(AGAIN_EVERY)
    return why


def check(settings: Settings, report: Report, parts: Sequence[str] = PROCESSES) -> bool:
    """Try the database, with the roles of these parts, and each call to the store; return whether all is well. Writes
    only one object of its own."""
    return asyncio.run(_check(settings, report, parts))


def copy_objects(settings: Settings, report: Report) -> None:
    """Copy the objects that only the fallback has into the store.

    Raises:
        ConfigurationError: there is no fallback.
        StoreUnavailable: one of the two is away.
    """

    async def run() -> tuple[int, int]:
        async with aclosing(open_store(settings.store)) as store:
            return await copying.copy(store)

    copied, there = asyncio.run(run())
    report(f"Copied {copied} objects; {there} were there already.")


async def _check(settings: Settings, report: Report, parts: Sequence[str]) -> bool:
    ledger = Ledger.of(settings.database, name="backcast-check", pool=2)
    store = open_store(settings.store)
    async with aclosing(ledger), aclosing(store):
        fine = True
        for step in (
            _step("database (BACKCAST_DATABASE__URL): reachable, writable, of this schema", ledger.check(), report),
            _step("database: keeps text and settings", inspection.settings(ledger), report),
            *(_step(f"database: the {part} may do what it does", _inspect(settings, part), report) for part in parts),
            _step("store (BACKCAST_STORE__URL): there, and lets us in", store.check(), report),
            _try(store, report),
            *(
                []
                if store.fallback is None
                else [_step("store: the fallback is there", store.fallback.check(), report)]
            ),
        ):
            try:
                await step
            except BackcastError:
                fine = False
    return fine


async def _try(store: Store, report: Report) -> None:
    """Make every call that the processes make, on an object of our own, which is removed at the end."""
    key, body = f"checks/{uuid7()}", b"backcast"

    async def read() -> None:
        if await store.get(key) != body:
            raise StoreUnavailable("The store returned other bytes than were put into it.")

    async def listed() -> None:
        if key not in [found.key async for page in store.pages("checks") for found in page]:
            raise StoreUnavailable("The store does not list an object that it holds: may the key list the bucket?")

    async def gone() -> None:
        try:
            await store.get(key)
        except Missing:
            return
        raise StoreUnavailable("The store still has an object that was deleted: has the bucket got a retention lock?")

    try:
        await _step("store: put", store.put(key, body), report)
        await _step("store: get", read(), report)
        await _step("store: list", listed(), report)
    finally:
        await _step("store: delete", store.delete([key]), report)
    await _step("store: a missing object is not taken for a missing bucket", gone(), report)


async def _step(name: str, step: Awaitable[T], report: Report) -> T:
    try:
        value = await step
    except (BackcastError, Missing) as error:
        why = str(error) if isinstance(error, BackcastError) else "the object that was just stored is not there"
        report(f"FAILED {name}: {why}")
        raise error if isinstance(error, BackcastError) else StoreUnavailable(why) from None
    report(f"ok     {name}")
    return value
