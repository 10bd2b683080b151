"""Runs what the pages for users show, in the order of the page, against an API and a worker of its own.

Each fence of such a page has one of these info strings; any other one fails the test:

    python file=shop.py              a file of the reader's folder, written before the processes start
    python file=shop.py tasks        also a module whose tasks the worker serves
    python run, sh run               run in that folder; it has to end with exit code 0, or with N if it has `exit=N`
    text output, json output         all that the block before it prints; an … stands for anything
    LANGUAGE skip="REASON"           not run

The comment `<!-- model: JSON -->` is the model's next answer; without one it answers as `backcast.testing` does by
itself. `localhost:8000` stands for the API of the test.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from backcast.settings import PREFIX, Settings
from backcast.testing import Reply, Request, ScriptedModel, extract
from tests.support.stack import ROOT, free_port, stack
from tests.support.waiting import PATIENCE

PAGES = ("client", "coming-from", "guarantees", "testing-tasks", "tutorial", "writing-tasks")
LONGEST = 3 * PATIENCE
"""Seconds for a block, which may start a whole product."""
_FENCE = re.compile(r"^\s*```(.*)$")
_MODEL = re.compile(r"^<!-- model: (.*) -->$")
_KINDS = (
    ("file", re.compile(r"python file=(?P<name>\w+\.py)(?P<tasks> tasks)?")),
    ("run", re.compile(r"(?P<language>python|sh) run( exit=(?P<exit>\d+))?")),
    ("output", re.compile(r"(text|json) output")),
    ("skip", re.compile(r'\w+ skip="[^"]{10,}"')),
)


@dataclass
class Block:
    place: str
    """Page and line of the fence."""
    kind: str
    given: dict[str, str | None]
    text: str


def read(page: Path) -> Iterator[Block]:
    lines = enumerate(page.read_text().splitlines(), 1)
    for number, line in lines:
        place = f"{page.relative_to(ROOT)}:{number}"
        if found := _MODEL.match(line):
            yield Block(place, "model", {}, found[1])
        elif found := _FENCE.match(line):
            assert line.startswith("`"), f"{place}: a block that is indented is not read"
            kinds = [(kind, fits) for kind, pattern in _KINDS if (fits := pattern.fullmatch(found[1]))]
            assert kinds, f"{place}: {found[1]!r} is no kind of block that this test knows"
            text = []
            for _, inner in lines:
                if inner == "```":
                    break
                text.append(f"{inner}\n")
            yield Block(place, kinds[0][0], kinds[0][1].groupdict(), "".join(text))


def run(block: Block, folder: Path, address: str) -> str:
    """What the block prints."""
    text = block.text.replace("localhost:8000", address)
    command = (
        ["bash", "-euo", "pipefail", "-c", text] if block.given["language"] == "sh" else [sys.executable, "-c", text]
    )
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "BACKCAST_URL": f"http://{address}",
        "COLUMNS": "200",
    }
    ended = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=LONGEST,
    )
    wanted = int(block.given["exit"] or 0)
    assert ended.returncode == wanted, f"{block.place}: exit code {ended.returncode}, not {wanted}:\n{ended.stdout}"
    return ended.stdout


def check(block: Block, printed: str) -> None:
    pattern = r".*?".join(map(re.escape, block.text.rstrip().split("…")))
    assert re.fullmatch(pattern, printed.rstrip(), re.DOTALL), f"{block.place}: the block before it prints\n{printed}"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}.md" for page in PAGES)])
async def test_the_blocks_of_a_page_do_what_it_shows(page: str, database: str, tmp_path: Path) -> None:
    blocks = list(read(ROOT / page))
    for block in blocks:
        if block.kind == "file":
            (tmp_path / str(block.given["name"])).write_text(block.text)
    modules = [str(block.given["name"]).removesuffix(".py") for block in blocks if block.given.get("tasks")]
    answers: list[object] = []

    def script(request: Request) -> Reply:
        return Reply(answers.pop(0)) if answers else extract(request)

    port = free_port()
    address = f"localhost:{port}"
    with ScriptedModel(script) as model:
        env = {
            "BACKCAST_URL": f"http://{address}",
            "BACKCAST_MODEL__BASE_URL": model.url,
            "BACKCAST_MODEL__API_KEY": "any",
            "BACKCAST_TASKS": ",".join(modules),
            "PYTHONPATH": str(tmp_path),
        }
        async with stack(database, tmp_path, **env) as product:
            parts = [product.start("api", port), product.start("worker")]
            await asyncio.gather(*[part.ready() for part in parts])
            printed: str | None = None
            for block in blocks:
                if block.kind == "model":
                    answers.append(json.loads(block.text))
                elif block.kind == "run":
                    printed = await asyncio.to_thread(run, block, tmp_path, address)
                    assert not answers, f"{block.place}: the model was not asked for {answers}"
                elif block.kind == "output":
                    assert printed is not None, f"{block.place}: no block before it is run"
                    check(block, printed)
                    printed = None
                else:
                    printed = None


_UNITS = {"": 1, "KiB": 1024, "MiB": 1024**2, "s": 1, "minutes": 60, "hour": 3600, "days": 24 * 3600}
_LIMIT = re.compile(r"\| ([\d,]+) ?(\w*) \| `(\w+)` \|$", re.MULTILINE)


def test_the_limits_that_a_setting_changes_are_its_defaults() -> None:
    rows = _LIMIT.findall((ROOT / "docs" / "guarantees.md").read_text())
    assert len(rows) > 20
    for number, unit, variable in rows:
        value: object = Settings()
        for name in variable.removeprefix(PREFIX).lower().split("__"):
            value = getattr(value, name)
        value = value.total_seconds() if isinstance(value, timedelta) else value
        assert int(number.replace(",", "")) * _UNITS[unit] == value, variable


_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for path, anchor in _LINK.findall(page.read_text()):
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name}: {path}"
            assert not anchor or anchor in anchors(there), f"{page.name}: {path}#{anchor}"
