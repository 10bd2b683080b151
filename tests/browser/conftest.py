"""One browser and one office for the tests of a file; all of them are skipped, loudly, without a Chromium."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, StorageState, async_playwright, expect

from backcast.local import postgres
from tests.browser.browser import CHROMIUM
from tests.browser.world import World, world
from tests.integration.conftest import _no_ambient_environment, server
from tests.support import databases
from tests.support.waiting import PATIENCE

__all__ = ["_no_ambient_environment", "server"]

CLICKS = """addEventListener("click", event => {
  if (event.detail) sessionStorage.clicks = 1 + Number(sessionStorage.clicks);
}, true)"""
"""Counts what a mouse clicks in a tab, over all of its pages."""

KEY = "a-key-of-the-office"
PHONE = {"width": 390, "height": 844}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if CHROMIUM is None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="there is no Chromium: apt-get install chromium"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    expect.set_options(timeout=PATIENCE * 1000)
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        await running.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def office(server: postgres.Postgres, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    database = databases.create(server, "office")
    async with world(database, tmp_path_factory.mktemp("office"), KEY) as made:
        yield made


def _url(office: World) -> str:
    return f"{office.url}/console/"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session(browser: Browser, office: World) -> StorageState:
    """The cookies of somebody who has signed in."""
    context = await browser.new_context(base_url=_url(office))
    shown = await context.new_page()
    await shown.goto("login")
    await shown.get_by_label("Key").fill(KEY)
    await shown.get_by_role("button", name="Sign in").click()
    await expect(shown.get_by_role("heading", name="Overview")).to_be_visible()
    state = await context.storage_state()
    await context.close()
    return state


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, office: World, session: StorageState) -> AsyncIterator[Page]:
    """Signed in. Errors of scripts, refusals by the content policy included, fail the test."""
    context = await browser.new_context(
        base_url=_url(office),
        storage_state=session,
        permissions=["clipboard-read", "clipboard-write"],
        color_scheme="dark",
    )
    await context.add_init_script(CLICKS)
    context.set_default_timeout(PATIENCE * 1000)
    shown = await context.new_page()
    faults = list[str]()
    shown.on("pageerror", lambda error: faults.append(str(error)))
    shown.on("console", lambda each: faults.append(each.text) if "Content Security Policy" in each.text else None)
    yield shown
    await context.close()
    assert not faults
