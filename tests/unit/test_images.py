"""The images, as far as the Dockerfile shows; tests/e2e builds and runs them."""

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from backcast import __version__
from tests.support.chart import CHART
from tests.support.dockerfile import PARTS, ROOT, command, effective, lines, stages

DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = stages(DOCKERFILE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("target", [*PARTS, "dev"])
def test_every_image_runs_unprivileged_and_without_a_shell_around_it(target: str) -> None:
    assert effective(STAGES, target, "USER") == "10001:10001"
    program = {"prefect-server": "prefect", "dev": "live"}.get(target, "backcast")
    assert command(STAGES, target, "ENTRYPOINT") == ["tini", "--", program], "Python is not PID 1"
    assert command(STAGES, target, "CMD")


@pytest.mark.parametrize("target", PARTS)
def test_every_image_has_labels(target: str) -> None:
    labels = " ".join(rest for word, rest in STAGES[target].instructions if word == "LABEL")
    assert f'title="backcast {target}"' in labels
    assert 'version="${VERSION}"' in labels
    assert 'revision="${REVISION}"' in labels
    assert effective(STAGES, "runtime", "LABEL")


@pytest.mark.parametrize("part", ["api", "worker"])
def test_the_image_for_development_is_one_of_the_others(part: str) -> None:
    assert stages(DOCKERFILE, PART=part)["dev"].base == part


def test_no_image_holds_the_tools_that_built_it() -> None:
    def ancestors(name: str) -> list[str]:
        return [name, *ancestors(STAGES[name].base)] if name in STAGES else []

    for part in PARTS:
        assert "uv" not in ancestors(part)


def test_the_oldest_builders_can_build_it() -> None:
    assert not re.search(r"^#\s*syntax\s*=", DOCKERFILE, re.MULTILINE)
    assert not re.search(r"^(COPY|ADD)\b.*--link", DOCKERFILE, re.MULTILINE)
    assert "<<" not in DOCKERFILE


def test_dependencies_come_before_the_source() -> None:
    for part in ("api", "worker", "llm"):
        copies = [rest for word, rest in STAGES[part].instructions if word in ("COPY", "RUN")]
        assert copies[-1] == "COPY --from=package /package /app/.venv".removeprefix("COPY ")
    for name, stage in STAGES.items():
        sources = [rest for word, rest in stage.instructions if word == "COPY" and re.search(r"(^| )src\b", rest)]
        assert not sources or name in ("package", "weights", "dev")


def test_the_model_is_fetched_by_modules_that_need_no_others() -> None:
    copied = {
        word.removeprefix("src/")
        for instruction, rest in STAGES["weights"].instructions
        if instruction == "COPY"
        for word in rest.split()
        if word.startswith("src/")
    }
    assert copied
    for name in copied:
        for module, names in re.findall(
            r"^from (backcast[.\w]*) import (.+)$", (ROOT / "src" / name).read_text(), re.MULTILINE
        ):
            folder = module.replace(".", "/")
            needed = {f"{folder}.py"} if (ROOT / "src" / f"{folder}.py").is_file() else set[str]()
            needed = needed or {f"{folder}/{each.strip()}.py" for each in names.split(",")}
            assert needed <= copied, f"{name} needs {needed - copied}"


def sent(path: str) -> bool:
    """Whether .dockerignore lets a file or folder of the repository's root through."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch(path, line.removeprefix("!").removeprefix("**/")):
            kept = line.startswith("!")
    return kept


def test_only_copied_files_reach_the_builder() -> None:
    copied = {
        word.split("/")[0]
        for line in lines(DOCKERFILE)
        if line.startswith("COPY ") and "--from=" not in line
        for word in [it for it in line.split()[1:] if not it.startswith("--")][:-1]
    }
    for name in copied:
        assert sent(name), f"{name} is copied, but .dockerignore keeps it out"
    for name in (
        ".git",
        ".venv",
        ".tools",
        ".backcast",
        ".env",
        "tests",
        "docs",
        "charts",
        "Dockerfile",
        "__pycache__",
    ):
        assert not sent(name)
    for path in ROOT.iterdir():
        assert path.name in copied or not sent(path.name), f"{path.name} is sent, but never copied"


def test_the_chart_names_these_images_and_this_version() -> None:
    version = PROJECT["project"]["version"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version == __version__
    named = set(re.findall(r"repository: backcast/([\w-]+)", (CHART / "values.yaml").read_text()))
    assert named == set(PARTS)


def test_the_server_is_of_the_version_that_workers_speak_to() -> None:
    def pin(requirements: list[str]) -> list[str]:
        return [it for it in requirements if it.startswith("prefect>=")]

    server = pin(PROJECT["dependency-groups"]["prefect-server"])
    assert server == pin(PROJECT["project"]["optional-dependencies"]["worker"])
    assert len(server) == 1


def test_everything_is_built_by_the_same_uv() -> None:
    pins = re.findall(r"\buv==([\d.]+)", DOCKERFILE + (ROOT / "Makefile").read_text())
    assert len(pins) == 2
    assert len(set(pins)) == 1


def test_make_image_builds_them_all() -> None:
    make: list[Any] = ["make", "-n", "image", "DOCKER=podman", "REGISTRY=registry.example/team", "IMAGE_TAG=9.9.9"]
    commands = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for part in PARTS:
        assert re.search(rf"podman build --target {part} --tag registry.example/team/{part}:9.9.9 ", commands)
    default = subprocess.run(["make", "-n", "image"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"docker build --target api --tag ghcr.io/backcast/api:{__version__} " in default


def test_make_cluster_names_the_program_that_it_lacks(tmp_path: Path) -> None:
    """tests/e2e has no run of it, because it takes the current context; what it makes is what they install."""
    command = subprocess.run(
        ["make", "--no-print-directory", "-n", "cluster"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "--target worker" in command
    assert command.rstrip().endswith("charts/cluster")
    (tmp_path / "docker").symlink_to("/bin/true")
    env = {"PATH": str(tmp_path), "DOCKER": "docker", "REGISTRY": "r", "IMAGE_TAG": "1"}
    done = subprocess.run(["/bin/sh", "charts/cluster"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "make cluster needs kubectl on the PATH: https://kubernetes.io/docs/tasks/tools\n"
