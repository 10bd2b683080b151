"""The images' contents, and that they run without privileges on a root that can't be written."""

import json
import logging
from typing import Any

import pytest

from backcast.local import weights
from tests.e2e.images import BASE, PARTS, REGISTRY, VERSION
from tests.e2e.programs import Done, run

log = logging.getLogger("e2e")

MODULES = {
    "api": "backcast.api.main",
    "worker": "backcast.worker.main",
    "prefect-server": "prefect.server",
    "llm": "backcast.local.model_server",
}
LARGEST = {"api": 87, "worker": 184, "prefect-server": 147, "llm": 606}
"""Megabytes over the base image: what the Dockerfile states, and a little."""
TOOLS = ("cc", "gcc", "make", "uv", "git")
PYTHON = ("--entrypoint", "python")


def name(part: str) -> str:
    return f"{REGISTRY}/{part}:{VERSION}"


async def inside(part: str, *command: str, options: tuple[str, ...] = (), check: bool = True) -> Done:
    """Run in a container as the chart does, without a network: only /tmp can be written."""
    hard = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    return await run("docker", "run", "--rm", "--network", "none", *hard, *options, name(part), *command, check=check)


async def inspect(image: str) -> dict[str, Any]:
    return dict(json.loads((await run("docker", "image", "inspect", image)).out)[0])


async def size(part: str) -> float:
    """Megabytes over the base image."""
    return ((await inspect(name(part)))["Size"] - (await inspect(BASE))["Size"]) / 1e6


@pytest.mark.parametrize("part", PARTS)
async def test_runs_unprivileged_on_a_root_that_cannot_be_written(built: dict[str, str], part: str) -> None:
    config = (await inspect(name(part)))["Config"]
    assert config["User"].partition(":")[0] == "10001", config["User"]
    entrypoint = ["tini", "--", "prefect" if part == "prefect-server" else "backcast"]
    assert config["Entrypoint"] == entrypoint, "an exec form: signals reach the process"
    assert (await inside(part, "--version")).out.strip()
    code = f"import os, {MODULES[part]}; print(os.getuid(), os.getgid(), os.getcwd(), os.environ['HOME'])"
    done = await inside(part, "-c", code, options=PYTHON)
    assert done.out.split() == ["10001", "10001", "/app", "/tmp"]


@pytest.mark.parametrize("part", PARTS)
async def test_has_labels_and_no_build_tools(built: dict[str, str], part: str) -> None:
    labels = (await inspect(name(part)))["Config"]["Labels"] or {}
    for label in ("title", "source", "licenses", "version"):
        assert labels.get(f"org.opencontainers.image.{label}"), f"no label {label}: {labels}"
    code = f"import shutil; print(*[tool for tool in {TOOLS} if shutil.which(tool)])"
    assert (await inside(part, "-c", code, options=PYTHON)).out.split() == []


@pytest.mark.parametrize("module", ["prefect", "marvin"])
async def test_the_api_has_neither_prefect_nor_marvin(built: dict[str, str], module: str) -> None:
    done = await inside("api", "-c", f"import {module}", options=PYTHON, check=False)
    assert f"No module named '{module}'" in done.err
    # The same import works in an image that has them.
    await inside("worker", "-c", f"import {module}", options=(*PYTHON, "--env", "MARVIN_HOME_PATH=/tmp/marvin"))


async def test_sizes(built: dict[str, str]) -> None:
    over = {part: await size(part) for part in PARTS}
    for part, megabytes in over.items():
        log.info("image %s: %.0f MB over %s", part, megabytes, BASE)
    too_large = {part: round(over[part]) for part, most in LARGEST.items() if over[part] > most}
    assert not too_large, f"MB over the base: {too_large}, at most {LARGEST}"


async def test_the_model_is_inside_its_image(built: dict[str, str]) -> None:
    code = (
        "import hashlib, os; file = open(os.environ['BACKCAST_MODEL__WEIGHTS'], 'rb');"
        "print(hashlib.file_digest(file, 'sha256').hexdigest())"
    )
    assert (await inside("llm", "-c", code, options=PYTHON)).out.strip() == weights.MODEL.sha256
