"""Each page and button of the console, in a real browser against the real product."""

import json
import re

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, expect

from tests.browser.conftest import PHONE
from tests.browser.world import HOSTILE, World
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")
VIOLATIONS = {"resultTypes": ["violations"]}
"""For axe: to report what is right too costs as much again."""


def places(office: World) -> dict[str, str]:
    """Every page, by the heading that it has."""
    runs = office.runs
    return {
        ".": "Overview",
        "runs": "Runs",
        f"runs/{runs['retrying']}": "send_reminder",
        f"runs/{runs['failed']}": "read_scan",
        f"runs/{runs['hostile']}": "read_scan",
        f"runs/{runs['running']}": "transcribe",
        f"try?run={runs['cast']}": "Try it",
        "tasks": "Tasks",
        "tasks/extract_invoice": "extract_invoice",
        "lanes": "Lanes",
        "pools": "Pools",
        "batches": "Batches",
        f"batches/{office.batch}": office.batch,
        "many/retry?state=failed": "Retry many runs",
        "nothing": "There is no such page",
    }


async def overview(page: Page) -> None:
    """The page where the search for a trouble begins: clicks are counted from here."""
    await page.goto(".")
    await page.evaluate("sessionStorage.clicks = 0")


async def clicks(page: Page) -> int:
    return int(await page.evaluate("sessionStorage.clicks"))


async def test_every_page_is_accessible_and_fits_a_phone(page: Page, office: World) -> None:
    found = dict[str, object]()
    for path, heading in places(office).items():
        await page.set_viewport_size({"width": 1280, "height": 820})
        await page.goto(path)
        await expect(page.get_by_role("heading", level=1)).to_have_text(heading)
        await page.emulate_media(color_scheme="dark")
        dark = (await Axe().run(page, options=VIOLATIONS)).response
        await page.emulate_media(color_scheme="light")
        light = await page.evaluate("options => axe.run(options)", VIOLATIONS | {"runOnly": ["color-contrast"]})
        for scheme, answer in (("dark", dark), ("light", light)):
            for each in answer["violations"]:
                if each["impact"] in ("serious", "critical"):
                    found[f"{path} {scheme} {each['id']}"] = [node["html"] for node in each["nodes"]][:3]
        await page.set_viewport_size(PHONE)
        wider = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wider > 0:
            found[f"{path} on a phone"] = wider
    assert not found, json.dumps(found, indent=1)


async def test_a_hostile_text_stays_text(page: Page, office: World) -> None:
    await page.goto(f"runs/{office.runs['hostile']}")
    await expect(page.get_by_text(HOSTILE).first).to_be_visible()
    await expect(page.locator("[data-events] li")).to_have_count(3)
    await expect(page).to_have_title("read_scan " + office.runs["hostile"].replace("-", "")[-8:] + " · backcast")


async def test_a_cast_is_written_watched_and_found_again(page: Page) -> None:
    await page.goto("..")  # as `/` leads people: to the page where something can be tried
    await expect(page.get_by_role("heading", level=1)).to_have_text("Try it")
    await page.get_by_label("Text").fill("We put 31 chairs in the hall")
    await page.get_by_label("Shape").fill("count: int, words")
    await page.get_by_text("What is sent as the shape").click()
    await expect(page.locator("#shape")).to_contain_text('"count"')
    await page.get_by_role("button", name="Cast").click()
    await expect(page.locator("#answer")).to_contain_text('"count": 31')
    await page.get_by_role("button", name="Copy as curl").click()
    await expect(page.get_by_role("button", name="Copy as curl")).to_have_text("Copied")
    assert "We put 31 chairs" in await page.evaluate("navigator.clipboard.readText()")
    await page.get_by_role("link", name="Overview").click()
    await page.get_by_role("link", name="Try it").click()
    await page.get_by_role("link", name="We put 31 chairs in the hall").click()
    await expect(page.get_by_label("Text")).to_have_value("We put 31 chairs in the hall")
    await expect(page.locator("#answer")).to_contain_text('"count": 31')
    await page.locator("#live").get_by_role("link").click()
    await expect(page.locator("#result")).to_contain_text('"count": 31')
    await expect(page.locator("[data-events]")).to_contain_text("partial")


async def test_a_run_is_watched_to_its_end_without_reloading(page: Page, office: World) -> None:
    run = await office.submit("transcribe", {"recording": "call.m4a", "release": "release-call"})
    await page.goto(f"runs/{run}")
    await expect(page.get_by_text("minute 5 of 12").first).to_be_visible()
    await expect(page.locator("[data-events]")).to_contain_text("call.m4a, minute 5")
    (office.stack.folder / "release-call").touch()
    await expect(page.locator("#result")).to_contain_text("Thursday")
    await expect(page.locator("[data-events]")).to_contain_text("completed")
    await expect(page.get_by_role("button", name="Retry", exact=True)).to_be_visible()


async def test_a_failed_run_is_repeated_with_another_input(page: Page, office: World) -> None:
    await page.goto(f"runs/{office.runs['failed']}")
    await expect(page.locator("#traceback")).to_contain_text("UsageError")
    await expect(page.get_by_role("log")).to_contain_text("page 3 of 3")
    await page.get_by_text("Retry with a changed input").click()
    await page.get_by_label("Input, as JSON").fill('{"pages": 1}')
    await page.get_by_role("button", name="Retry with this input").click()
    await expect(page.get_by_text("page 1 is empty: scan it again").first).to_be_visible()
    await expect(page.get_by_text("Repeats")).to_be_visible()


async def test_a_waiting_run_is_cancelled(page: Page, office: World) -> None:
    run = await office.submit("extract_invoice", {"document": "x"}, run_at="2040-01-01T08:00:00Z")
    await page.goto(f"runs/{run}")
    await page.get_by_role("button", name="Cancel").click()
    await expect(page.locator(".state.cancelled").first).to_be_visible()


async def test_many_runs_are_cancelled_after_their_count(page: Page, office: World) -> None:
    for _ in range(3):
        await office.submit("extract_invoice", {"document": "x"}, run_at="2040-01-01T08:00:00Z", owner="nobody")
    await page.goto("runs?owner=nobody")
    await expect(page.locator("tbody tr")).to_have_count(3)
    await page.get_by_role("link", name="Cancel waiting…").click()
    await expect(page.locator("#matched")).to_have_text("3")
    await page.get_by_role("button", name="Cancel 3 runs").click()
    await expect(page.locator(".state.completed").first).to_be_visible()
    await expect(page.locator(".figures b").first).to_have_text("3")
    await page.goto("runs?owner=nobody&state=cancelled")
    await expect(page.locator("tbody tr")).to_have_count(3)


async def test_a_paused_lane_is_found_and_resumed(page: Page, office: World) -> None:
    await overview(page)
    warning = page.locator(".note.warn", has_text="letters")
    await expect(warning).to_contain_text("the mail server moves")
    await warning.get_by_role("link").click()
    await page.get_by_role("button", name="Resume lane letters").click()
    await expect(page.get_by_role("button", name="Resume lane letters")).to_have_count(0)
    assert await clicks(page) == 2
    await page.goto(f"runs/{office.runs['paused']}")
    await expect(page.locator("[data-events]")).to_contain_text("attempt 1")


async def test_a_lane_whose_limit_stops_it_is_found_and_mended(page: Page, office: World) -> None:
    (await office.stack.http.put("/v1/lanes/archive", json={"max_running": 0})).raise_for_status()
    run = await office.submit("extract_invoice", {"document": "old.pdf"}, lane="archive")
    await overview(page)
    warning = page.locator(".note.warn", has_text="archive")
    await expect(warning).to_contain_text("1 run waits: its limit is 0 at once")
    await warning.get_by_role("link").click()
    row = page.locator("tbody tr", has_text="archive")
    await row.get_by_text("Limits…").click()
    await row.get_by_label("At once").fill("5")
    await row.get_by_role("button", name="Set").click()
    await expect(row).to_contain_text("5 at once")
    assert await clicks(page) == 3
    assert (await office.stack.ended(run))["state"] == "completed"


async def test_a_task_that_always_fails_is_found_and_paused(page: Page) -> None:
    await overview(page)
    warning = page.locator(".note.warn", has_text="read_scan")
    await expect(warning).to_contain_text(re.compile(r"All \d+ runs of the task read_scan .* have failed"))
    await warning.get_by_role("link").click()
    await expect(page.locator("tbody")).to_contain_text("is empty: scan it again")  # why, without a click
    await page.get_by_text("Pause…").click()
    await page.get_by_label("Reason").fill("bad scans")
    await page.get_by_role("button", name="Pause", exact=True).click()
    await expect(page.locator("tbody tr", has_text="read_scan")).to_contain_text("paused")
    assert await clicks(page) == 3
    await overview(page)
    warning = page.locator(".note.warn", has_text="read_scan")
    await expect(warning).to_contain_text("paused: bad scans")
    await warning.get_by_role("link").click()
    await page.get_by_role("button", name="Resume task read_scan").click()
    await expect(page.locator(".state.paused")).to_have_count(0)
    assert await clicks(page) == 2


async def test_a_task_that_kills_its_executor_is_found_and_paused(page: Page, office: World) -> None:
    await office.studio("tests.browser.studio_tasks,tests.support.sample_tasks").ready()
    run = await office.submit("decode", {"film": "a.mkv"})
    assert (await office.stack.ended(run))["error"]["code"] == "executor_died"
    await overview(page)
    row = page.locator("tr", has_text="executor_died")
    await row.get_by_role("link", name="decode").click()
    await page.get_by_text("Pause…").click()
    await page.get_by_role("button", name="Pause", exact=True).click()
    await expect(page.locator("tbody tr", has_text="decode")).to_contain_text("paused")
    assert await clicks(page) == 3


async def test_a_missing_worker_is_found_and_its_runs_go_on_with_another(page: Page, office: World) -> None:
    """After the test before, whose worker it kills."""
    office.stack.parts[-1].kill()
    run = await office.submit("render", {"scene": 1})
    await office.silence("studio")
    await overview(page)
    warning = page.locator(".note.warn", has_text="studio")
    await expect(warning).to_contain_text("Pool studio has no live worker: 1 run waits for one.")
    await warning.get_by_role("link").click()
    await expect(page.get_by_text("BACKCAST_WORKER__POOL=studio")).to_be_visible()
    await expect(page.locator("tbody tr", has_text="silent")).to_contain_text("studio")
    assert await clicks(page) == 1
    await office.studio("tests.browser.studio_tasks").ready()
    assert (await office.stack.ended(run))["state"] == "completed"


async def test_a_task_that_no_worker_has_is_found_and_its_runs_cancelled(page: Page, office: World) -> None:
    """After the test before: the worker that it started has fewer tasks."""
    run = await office.submit("echo", {"value": 2})
    await until(lambda: office.stack.run(run), lambda run: run["error"] is not None)
    await overview(page)
    await page.locator(".note.warn", has_text="No worker of pool studio").get_by_role("link").click()
    await expect(page.locator("tbody tr")).to_have_count(1)
    await expect(page.locator("tbody tr")).to_contain_text("unknown_task")
    await page.get_by_role("link", name="Cancel waiting…").click()
    await page.get_by_role("button", name="Cancel 1 run").click()
    await expect(page.locator(".figures b").first).to_have_text("1")
    assert await clicks(page) == 3
    assert (await office.stack.ended(run))["state"] == "cancelled"


async def test_limits_are_set_and_lifted(page: Page) -> None:
    await page.goto("lanes")
    await page.get_by_role("textbox", name="Lane").fill("search")
    await page.get_by_label("At once").last.fill("2")
    await page.get_by_role("button", name="Set").last.click()
    row = page.locator("tbody tr", has_text="search")
    await expect(row).to_contain_text("2 at once")
    await row.get_by_text("Limits…").click()
    await row.get_by_label("At once").fill("")
    await row.get_by_role("button", name="Set").click()
    await expect(row).to_have_count(0)


async def test_a_task_is_started_by_its_form(page: Page) -> None:
    await page.goto("tasks")
    await page.get_by_role("link", name="extract_invoice").click()
    await page.get_by_role("textbox", name="document Where").fill("inbox/new.pdf")
    await page.get_by_role("button", name="Start").click()
    await expect(page.locator("#result")).to_contain_text("inbox/new.pdf")


async def test_a_batch_is_repeated(page: Page, office: World) -> None:
    await page.goto("batches")
    await page.locator("tbody a").first.click()
    await page.get_by_role("button", name="Retry 1 that failed").click()
    await expect(page.locator(".state.completed").first).to_be_visible()


async def test_the_keyboard_is_enough(page: Page) -> None:
    await page.goto("runs")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the page")).to_be_focused()
    await page.keyboard.press("/")
    await expect(page.get_by_label("State")).to_be_focused()
    await page.keyboard.type("failed")
    await page.keyboard.press("Enter")
    await page.get_by_role("button", name="Filter").focus()
    await page.keyboard.press("Enter")
    await expect(page).to_have_url(re.compile("state=failed"))
    link = page.locator("tbody a").first
    focused = page.locator(f"#{await link.get_attribute('id')}")
    await focused.focus()
    async with page.expect_response(re.compile("runs.state=failed")):  # the page refreshes itself
        pass
    await expect(focused).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1)).to_have_text("read_scan")


async def test_signing_out_shows_nothing_more(page: Page) -> None:
    await page.goto(".")
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    await page.goto("runs")
    await expect(page.get_by_role("button", name="Sign in")).to_be_visible()


async def test_a_worker_is_drained(page: Page) -> None:
    """The last one: no run goes on after it."""
    await page.goto("pools")
    row = page.locator("tbody tr", has_text="takes runs").filter(has_text="default")
    await row.get_by_text("Drain…").click()
    await row.get_by_role("button", name="Drain", exact=True).click()
    await expect(row).to_have_count(0)
