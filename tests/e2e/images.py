"""Builds the images that the tests run, once for each state of the sources: those of `make image`, the same with the
tests' tasks, and a "next release" that has one more migration.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

import yaml
from alembic.config import Config
from alembic.script import ScriptDirectory

from tests.e2e.cluster import KIT, short
from tests.e2e.programs import run, run_aloud
from tests.support.stack import ROOT

log = logging.getLogger("e2e")

CHART = ROOT / "charts" / "backcast"
RENDER = ("helm", "template", "any", str(CHART), "--kube-version", "1.34.0")
"""Asks no cluster; without the option helm may assume a version of Kubernetes that the chart refuses."""
REGISTRY = "ghcr.io/backcast"
PARTS = ("api", "worker", "prefect-server", "llm")
VERSION = str(yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]) if CHART.is_dir() else "0"
NOW, NEXT = "e2e", "e2e-next"
"""Tags: with the tests' tasks; with those and one more migration."""
NEXT_SCHEMA = "e2e_next"
BASE = "python:3.13-slim-trixie"

_SOURCES = ("Dockerfile", ".dockerignore", "pyproject.toml", "uv.lock", "README.md", "LICENSE", "src")
_STAMP = ROOT / ".backcast" / "e2e" / "images.json"
_HERE = Path(__file__).parent

# The tests' tasks; a worker finds them as it finds those of a user.
_WITH_TASKS = f"""
FROM {REGISTRY}/worker:{VERSION}
COPY tasks /opt/e2e
ENV PYTHONPATH=/opt/e2e
"""
_WITH_MIGRATION = """
FROM {base}
USER 0
COPY migration.py /tmp/migration.py
RUN ["python", "-c", "import shutil, backcast.ledger.migrations.versions as v; \
shutil.copy('/tmp/migration.py', v.__path__[0] + '/{schema}.py')"]
USER 10001:10001
"""
_MIGRATION = '''
"""Only adds, as every migration does: the release before runs on it too."""
from alembic import op

revision = "{schema}"
down_revision = "{head}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
    alter table runs add column e2e_next integer not null default 1;
    create table e2e_next (n integer primary key);
    """)
'''


def head() -> str:
    """The schema of the present sources."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "src" / "backcast" / "ledger" / "migrations"))
    found = ScriptDirectory.from_config(config).get_current_head()
    assert found is not None
    return found


async def build() -> dict[str, str]:
    """Build the missing images; returns every image of ours by name, with its id."""
    base = {f"{REGISTRY}/{part}:{VERSION}" for part in PARTS}
    source = _digest(_SOURCES)
    stamp = json.loads(_STAMP.read_text()) if _STAMP.is_file() else {}
    if stamp.get("source") != source or stamp.get("ids") != await ids(base):
        given = {"DOCKER": await _client(), "REGISTRY": REGISTRY, "IMAGE_TAG": VERSION, "IMAGES": " ".join(PARTS)}
        words = [f"{name}={value}" for name, value in given.items()]
        await run_aloud("make", "-C", str(ROOT), "image", *words, timeout=1800)
        built = await ids(base)
        absent = base - built.keys()
        assert not absent, f"`make image` did not build {', '.join(sorted(absent))}"
        _STAMP.parent.mkdir(parents=True, exist_ok=True)
        _STAMP.write_text(json.dumps({"source": source, "ids": built}))
    await _derive()
    tags = {f"{REGISTRY}/{part}:{tag}" for part in PARTS if part != "llm" for tag in (NOW, NEXT)}
    return await ids(base | tags)


async def _derive() -> None:
    await _build(f"{REGISTRY}/worker:{NOW}", _WITH_TASKS)
    for part in ("api", "prefect-server"):
        await _docker("tag", f"{REGISTRY}/{part}:{VERSION}", f"{REGISTRY}/{part}:{NOW}")
    await _docker("tag", f"{REGISTRY}/prefect-server:{VERSION}", f"{REGISTRY}/prefect-server:{NEXT}")
    for part in ("api", "worker"):
        dockerfile = _WITH_MIGRATION.format(base=f"{REGISTRY}/{part}:{NOW}", schema=NEXT_SCHEMA)
        await _build(f"{REGISTRY}/{part}:{NEXT}", dockerfile)


async def _build(name: str, dockerfile: str) -> None:
    with tempfile.TemporaryDirectory() as context:
        shutil.copytree(_HERE / "image", Path(context) / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(context) / "migration.py").write_text(_MIGRATION.format(schema=NEXT_SCHEMA, head=head()))
        (Path(context) / "Dockerfile").write_text(dockerfile)
        await _docker("build", "--quiet", "--tag", name, context, timeout=300)


async def _client() -> str:
    """The docker client that can drive BuildKit here."""
    return (await run(str(KIT), "docker")).out.strip() if KIT.is_file() else "docker"


async def _docker(*arguments: str, timeout: float = 60) -> None:
    await run(await _client(), *arguments, timeout=timeout, env={**os.environ, "DOCKER_BUILDKIT": "1"})


async def ids(names: set[str]) -> dict[str, str]:
    """The images that the host's docker has, with their ids."""
    done = await run("docker", "image", "inspect", "-f", "{{json .RepoTags}} {{.Id}}", *sorted(names), check=False)
    have: dict[str, str] = {}
    for line in done.out.splitlines():
        tags, _, identity = line.rpartition(" ")
        have |= {short(tag): identity for tag in json.loads(tags)}
    return {name: have[short(name)] for name in names if short(name) in have}


async def others(*manifests: str) -> dict[str, str]:
    """The images of others that these manifests name and the host's docker has; a node pulls the rest by itself."""
    named = {
        image for text in manifests for image in re.findall(r"^\s*(?:- )?image: \"?([^\s\"]+)", text, re.MULTILINE)
    }
    return await ids({name for name in named if not name.startswith(REGISTRY)})


def _digest(names: tuple[str, ...]) -> str:
    digest = hashlib.sha256(VERSION.encode())
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
