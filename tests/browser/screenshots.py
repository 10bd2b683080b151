"""`python -m tests.browser.screenshots`: pictures of the console, light and dark, into docs/images. With a folder given
every page goes there, as a phone shows it too. Look at them before you commit them."""

import asyncio
import json
import math
import random
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from playwright.async_api import async_playwright

from backcast.ledger.connection import Ledger
from backcast.local import postgres
from backcast.models import uuid7
from tests.browser.browser import CHROMIUM
from tests.browser.world import HOSTILE, World, world
from tests.support import databases, ended
from tests.support.stack import ROOT

COMMITTED = ("overview", "runs", "run", "try")
WIDE, PHONE = {"width": 1280, "height": 820}, {"width": 390, "height": 844}


def pages(made: World) -> dict[str, str]:
    runs = made.runs
    return {
        "overview": "/",
        "runs": "/runs",
        "run": f"/runs/{runs['retrying']}",
        "try": f"/try?run={runs['cast']}&shape=name,%20age",
        "run-failed": f"/runs/{runs['failed']}",
        "run-running": f"/runs/{runs['running']}",
        "run-completed": f"/runs/{runs['completed']}",
        "run-hostile": f"/runs/{runs['hostile']}",
        "tasks": "/tasks",
        "task": "/tasks/extract_invoice",
        "lanes": "/lanes",
        "pools": "/pools",
        "batches": "/batches",
        "batch": f"/batches/{made.batch}",
        "many": "/many/retry?state=failed",
        "missing": "/nothing",
    }


async def shoot(made: World, folder: Path | None) -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for size, suffix in ((WIDE, ""), (PHONE, "-phone")) if folder else ((WIDE, ""),):
                context = await browser.new_context(viewport=size, color_scheme=scheme)
                page = await context.new_page()
                for name, path in pages(made).items():
                    if folder is None and name not in COMMITTED:
                        continue
                    await page.goto(f"{made.url}/console{path}")
                    await page.wait_for_timeout(700)  # the stream of events has begun
                    place = (folder or ROOT / "docs/images") / f"{name}-{scheme}{suffix}.png"
                    await page.screenshot(path=place, full_page=folder is not None)
                    print(place, place.stat().st_size // 1024, "KB")
                await context.close()
        await browser.close()


async def remember(database: str) -> None:
    """An hour that lies back: some thousand runs, some of which failed."""
    chance = random.Random(1)
    ledger = Ledger(database)
    error = json.dumps({"code": "model_refused", "title": "The model refused", "detail": "It is no invoice."})
    for minute in range(2, 60):
        for _ in range(int(12 + 9 * math.sin(minute / 7) + chance.random() * 8)):
            ago = minute * 60 + chance.random() * 50
            state = "failed" if chance.random() < (0.3 if 20 < minute < 27 else 0.03) else "completed"
            at = datetime.now(UTC) - timedelta(seconds=ago)
            await ended.add(
                ledger,
                uuid7(ago=ago),
                since=ago - 2,
                task="extract_invoice",
                pool="default",
                owner="billing",
                lane="openai",
                priority=0,
                state=state,
                run_at=at,
                fence=1,
                attempts_used=1,
                retries_used=0,
                max_attempts=3,
                signature="",
                input="{}",
                metadata="{}",
                created_at=at,
                started_at=at,
                **({"error": error} if state == "failed" else {"result": "1", "result_key": "k"}),
            )
    await ledger.aclose()


async def main() -> None:
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as text, postgres.running(Path(text) / "data") as server:
        database = databases.create(server)
        await remember(database)
        async with world(database, Path(text), odd=HOSTILE if given else "archive") as made:
            await shoot(made, given)


if __name__ == "__main__":
    asyncio.run(main())
