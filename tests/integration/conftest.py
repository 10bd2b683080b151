"""One PostgreSQL server for the whole run; every test that asks for `database` gets a migrated one of its own."""

import itertools
import os
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from backcast.ledger import provisioning
from backcast.ledger.connection import Ledger
from backcast.ledger.migration import migrate
from backcast.local import postgres
from backcast.settings import Store as StoreSettings
from backcast.store import Store, open_store
from tests.support.roles import give_roles
from tests.support.waiting import PATIENCE

_numbers = itertools.count()
_LONGEST = (
    "test_abuse",
    "test_up",
    "test_worker",
    "test_ledger_machine",
    "test_chaos",
    "test_steward",
    "test_docs",
    "test_history",
    "test_signals",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes, so that no process works alone at the end."""
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


@pytest.fixture(autouse=True, scope="session")
def _no_ambient_environment() -> None:
    for name in list(os.environ):
        if name.startswith(("BACKCAST_", "PREFECT_", "AWS_", "OPENAI_", "MARVIN_")):
            del os.environ[name]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[postgres.Postgres]:
    with postgres.running(
        tmp_path_factory.mktemp("postgres") / "data", settings={"max_connections": "300", "fsync": "off"}
    ) as running:
        yield running


@pytest.fixture(scope="session")
def _template(server: postgres.Postgres) -> str:
    provisioning.create_database(server.url(), "template_backcast")
    assert migrate(server.url("template_backcast")) == "The schema is now 0001."
    give_roles(server.url("template_backcast"))
    return "template_backcast"


@pytest.fixture
async def database(server: postgres.Postgres, _template: str) -> str:
    """The URL of a fresh, migrated database."""
    name = f"test_{next(_numbers)}"
    admin = await asyncpg.connect(server.url())
    await admin.execute(f'create database "{name}" template "{_template}"')
    await admin.close()
    return server.url(name)


@pytest.fixture
async def ledger(database: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(database, pool=30, timeout=timedelta(seconds=PATIENCE))
    yield ledger
    await ledger.aclose()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


@pytest.fixture
async def store(folder: str) -> AsyncIterator[Store]:
    store = open_store(StoreSettings(url=folder, timeout=timedelta(seconds=PATIENCE)))
    await store.ensure()
    yield store
    await store.aclose()
