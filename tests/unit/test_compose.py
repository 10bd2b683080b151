"""compose.yaml: valid, complete, without a secret, and in agreement with the files that repeat its facts."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from backcast.settings import load
from tests.support.chart import CHART
from tests.support.dockerfile import ROOT, stages

TEXT = (ROOT / "compose.yaml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])([^}]*))?\}")
OURS = ("setup", "api", "steward", "worker", "llm")


def test_it_is_what_the_specification_allows() -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text())
    document = yaml.safe_load(TEXT)
    assert [error.message for error in Draft202012Validator(schema).iter_errors(document)] == []
    document["services"]["api"]["develop"]["watch"][0]["action"] = "guess"
    assert list(Draft202012Validator(schema).iter_errors(document))


def test_what_it_builds_is_in_the_dockerfile() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for service in SERVICES.values():
        if build := service.get("build"):
            found = stages(dockerfile, **build.get("args", {}))
            assert build["target"] in found
            assert all(part in found for part in build.get("args", {}).values())


def test_servers_of_others_are_those_of_the_chart() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    minio, postgres = values["store"]["bundled"]["images"]["minio"], values["postgres"]["bundled"]["image"]
    assert SERVICES["minio"]["image"] == f"{minio['registry']}/{minio['repository']}:{minio['tag']}"
    assert SERVICES["postgres"]["image"] == f"{postgres['repository'].removeprefix('library/')}:{postgres['tag']}"


def test_it_has_no_password_and_is_reached_from_this_machine_only() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET", variable):
                assert re.fullmatch(r"\$\{\w+_PASSWORD:\?.+\}", value), f"{name}: {variable}"
            for password in re.findall(r"://\w+:([^@]*)@", str(value)):
                assert re.fullmatch(r"\$\{\w+_PASSWORD(:\?[^}]+)?\}", password), f"{name}: {variable}"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_make_env_gives_the_passwords_that_it_asks_for_and_never_others(tmp_path: Path) -> None:
    make = ["make", "--silent", "--no-print-directory", "-f", str(ROOT / "Makefile"), ".env"]
    subprocess.run(make, cwd=tmp_path, check=True)
    file = tmp_path / ".env"
    made = file.read_text()
    given = dict(line.split("=", 1) for line in made.splitlines() if line and not line.startswith("#"))
    required = {name for name, how, _ in VARIABLE.findall(TEXT) if how == ":?"}
    assert required == {name for name in given if name.endswith("_PASSWORD")}
    passwords = [given[name] for name in required]
    assert all(re.fullmatch("[0-9a-f]{32}", password) for password in passwords)
    assert len(set(passwords)) == len(passwords)
    assert file.stat().st_mode & 0o077 == 0
    subprocess.run(make, cwd=tmp_path, check=True)
    assert file.read_text() == made
    assert given["COMPOSE_PROFILES"] in SERVICES["llm"]["profiles"]


@pytest.mark.parametrize("name", OURS)
def test_our_processes_understand_their_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [it for it in os.environ if it.startswith("BACKCAST_")]:
        monkeypatch.delenv(variable)
    for variable, value in SERVICES[name]["environment"].items():
        if variable.startswith("BACKCAST_"):
            monkeypatch.setenv(
                variable, VARIABLE.sub(lambda it: it[3] if it[2] in ("-", ":-") else "secret", str(value))
            )
    settings = load()
    assert settings.database.url.get_secret_value().endswith(":secret@postgres:5432/backcast") or name == "llm"
    assert settings.model.embedded


def test_the_order_of_starting_can_be_kept() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for {other}, which has no health check"


def test_sources_are_copied_to_where_the_image_runs_them() -> None:
    live = [
        rest.split() for word, rest in stages((ROOT / "Dockerfile").read_text())["dev"].instructions if word == "COPY"
    ]
    homes = {source: target.replace("/app/live", "/tmp/live") for source, target in (it for it in live if len(it) == 2)}
    for name in ("api", "steward", "worker"):
        copied = {it["path"]: it["target"] for it in SERVICES[name]["develop"]["watch"] if it["action"] == "sync"}
        assert copied == {source: homes[source] for source in ("src", "examples")}
        assert not SERVICES[name].get("read_only")
