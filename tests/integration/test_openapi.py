"""The OpenAPI document is true: schemathesis calls a real API by it, in every phase and with every check."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backcast.api import problems
from backcast.ledger import fleet
from backcast.ledger.connection import Ledger
from backcast.models import TaskType, uuid7
from tests.support.stack import ROOT, stack

SUPPORT = ROOT / "tests" / "support"
DOCUMENT = json.loads((ROOT / "docs" / "openapi.json").read_text())
OPERATIONS = [(path, each) for path, operations in DOCUMENT["paths"].items() for each in operations.values()]
TASKS = [TaskType(name=name, pool="default", input_schema={}) for name in ("echo", "create_structured_output")]


async def test_schemathesis_finds_nothing(database: str, ledger: Ledger, tmp_path: Path) -> None:
    await fleet.register(ledger, uuid7(), pool="default", host="h", version="1", slots=10, tasks=TASKS)
    async with stack(database, tmp_path, BACKCAST_API__LONGEST_STREAM="0.2") as running:
        await running.up("api")
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            "--config-file",
            str(SUPPORT / "schemathesis.toml"),
        ]
        command += ["run", str(running.http.base_url.join("/openapi.json")), "--checks", "all", "--max-examples", "10"]
        command += ["--continue-on-failure", "--no-color", "--suppress-health-check", "all", "--warnings", "off"]
        command += ["--seed", "1", "--generation-database", "none", "--max-time", "40"]
        environment = running.environment(SCHEMATHESIS_HOOKS="tests.support.json_lines", NO_PROXY="*")
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert "Stateful" in done.stdout


def test_every_code_has_a_page_and_every_page_says_what_to_do() -> None:
    """Codes are found where they are written, and the errors of routes by their classes. Not those of `why`."""
    sources = {path: path.read_text() for path in (ROOT / "src" / "backcast").rglob("*.py") if path.name != "why.py"}
    written = {code for text in sources.values() for code in re.findall(r'\bcode\s*=\s*"([a-z_]+)"', text)}
    assert len(written) > 40
    for code in written:
        page = asyncio.run(problems.explain(code))
        assert (page.code, len(page.title) > 5, len(page.about) > 10) == (code, True, True), code


@pytest.mark.parametrize(("path", "operation"), OPERATIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_operation_states_its_problems(path: str, operation: dict[str, Any]) -> None:
    statuses = set(operation["responses"])
    assert {"403", "405", "422", "500"} <= statuses
    if path.startswith(("/v1", "/tasks")):
        assert {"401", "503"} <= statuses
    if "requestBody" in operation:
        assert {"400", "408", "413", "415"} <= statuses
    for status, response in operation["responses"].items():
        if int(status) >= 400:
            assert list(response["content"]) == ["application/problem+json"]


def test_the_form_of_the_compatibility_route_is_described() -> None:
    content = DOCUMENT["paths"]["/tasks"]["post"]["requestBody"]["content"]
    assert {"application/json", "application/x-www-form-urlencoded", "multipart/form-data"} == set(content)
