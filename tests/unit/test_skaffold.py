"""skaffold.yaml: valid by its schema with every profile, and in agreement with Dockerfile, chart and repository."""

import copy
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonpatch
import pytest
import yaml
from jsonschema import Draft7Validator

from tests.chart.rendering import Values, render
from tests.support.dockerfile import ROOT, stages

Config = dict[str, Any]
BASE: Config = yaml.safe_load((ROOT / "skaffold.yaml").read_text())
PROFILES: dict[str, Config] = {profile["name"]: profile for profile in BASE["profiles"]}
CHOICES = [chosen for count in range(len(PROFILES) + 1) for chosen in combinations(PROFILES, count)]
VALIDATOR = Draft7Validator(json.loads((Path(__file__).parent / "schemas" / "skaffold-v4beta13.json").read_text()))


def config(*profiles: str) -> Config:
    """The configuration with these profiles, as Skaffold merges it."""
    it = copy.deepcopy(BASE)
    for name in profiles:
        it = jsonpatch.apply_patch(it, PROFILES[name]["patches"])
    return it


def merged(one: Values, other: Values) -> dict[str, Any]:
    """As Helm merges values."""
    both = dict(one)
    for key, value in other.items():
        mine = both.get(key)
        both[key] = merged(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return both


def image_names(it: Config) -> list[str]:
    return [artifact["image"] for artifact in it["build"]["artifacts"]]


def suffix(image: str) -> str:
    return re.sub(r"[./:-]", "_", image)


@pytest.mark.parametrize("profiles", CHOICES)
def test_its_schema_allows_it(profiles: tuple[str, ...]) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(config(*profiles))] == []


def test_its_schema_refuses_a_mistake() -> None:
    wrong = config()
    wrong["build"]["artifacts"][0]["docker"]["tarqet"] = "dev"
    assert list(VALIDATOR.iter_errors(wrong))


def test_it_builds_targets_of_the_dockerfile() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for artifact in config("llm")["build"]["artifacts"]:
        part = artifact["image"].removeprefix("ghcr.io/backcast/")
        if docker := artifact.get("docker"):
            assert docker == {"target": "dev", "buildArgs": {"PART": part}}
            assert stages(dockerfile, PART=part)["dev"].base == part
        else:
            assert f"docker build --target {part} " in artifact["custom"]["buildCommand"]
            assert part in stages(dockerfile)
            for path in artifact["custom"]["dependencies"]["paths"]:
                assert (ROOT / path).is_file()


def test_a_changed_python_file_is_copied_and_rebuilds_nothing() -> None:
    # By Skaffold's own builder, an artifact without a rule for a file that the Dockerfile copies would be built again.
    rules = [artifact["sync"]["manual"] for artifact in BASE["build"]["artifacts"] if "docker" in artifact]
    assert len(rules) == 2
    for each in rules:
        assert {rule["strip"] for rule in each} == {"src/", "examples/"}


@pytest.mark.parametrize("profiles", CHOICES)
def test_the_chart_takes_its_values_and_runs_its_images(profiles: tuple[str, ...]) -> None:
    it = config(*profiles)
    [release] = it["deploy"]["helm"]["releases"]
    values: dict[str, Any] = {}
    for file in release["valuesFiles"]:
        values = merged(values, yaml.safe_load((ROOT / file).read_text()))
    built = {}
    for image in image_names(it):
        domain, _, repository = image.partition("/")
        known = {"DOMAIN": domain, "REPO_NO_DOMAIN": repository, "TAG": "built", "DIGEST": ""}
        built |= {f"{{{{.IMAGE_{key}_{suffix(image)}}}}}": value for key, value in known.items()}
    for path, template in release["setValueTemplates"].items():
        for key in reversed(path.split(".")):
            template = {key: template if isinstance(template, dict) else built[template]}
        values = merged(values, template)
    pods = render(values, name=release["name"]).pods
    ours = {pod.main["image"] for pod in pods if "backcast/" in pod.main["image"]}
    assert ours == {f"{image}:built" for image in image_names(it)}
    for pod in pods:
        if pod.component in ("api", "worker", "steward"):
            assert {"name": "tmp", "mountPath": "/tmp"} in pod.main["volumeMounts"], "files are copied to below /tmp"


def test_files_are_copied_to_where_the_image_runs_them() -> None:
    live = [
        rest.split() for word, rest in stages((ROOT / "Dockerfile").read_text())["dev"].instructions if word == "COPY"
    ]
    homes = {source: target.replace("/app/live", "/tmp/live") for source, target in (it for it in live if len(it) == 2)}
    rules = [rule for artifact in BASE["build"]["artifacts"] for rule in artifact.get("sync", {}).get("manual", [])]
    assert rules
    for rule in rules:
        assert list(ROOT.glob(rule["src"]))
        assert rule["dest"] == homes[rule["strip"].rstrip("/")]
        assert rule["src"].startswith(rule["strip"])


def test_the_forwarded_and_verified_objects_exist() -> None:
    it = config("llm")
    [release] = it["deploy"]["helm"]["releases"]
    values = yaml.safe_load((ROOT / "skaffold/values.yaml").read_text())
    services = render(values, name=release["name"]).of("Service")
    ports = {(each["metadata"]["name"], port["port"]) for each in services for port in each["spec"]["ports"]}
    assert {(each["resourceName"], each["port"]) for each in it["portForward"]} <= ports
    for check in it["verify"]:
        assert check["container"]["image"] in image_names(it)
        [variable] = check["container"]["env"]
        assert variable["value"] == f"http://{release['name']}-api.{release['namespace']}:8000"
