"""Wrong settings fail at the start, with a sentence that never holds a value."""

import pwd
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import BaseModel

from backcast.errors import ConfigurationError
from backcast.settings import Model, Settings, load


def every_model(model: type[BaseModel] = Settings) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from every_model(field.annotation)


def test_the_environment_and_the_file_are_read_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("worker: {slots: 3, pool: gpu}\nlease: 20\ntasks: [a]\n")
    monkeypatch.setenv("BACKCAST_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("BACKCAST_WORKER__SLOTS", "7")
    monkeypatch.setenv("BACKCAST_TASKS", "b, c,")
    settings = load()
    assert (settings.worker.slots, settings.worker.pool, settings.tasks) == (7, "gpu", ["b", "c"])
    assert settings.lease == timedelta(seconds=20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BACKCAST_WORKER__SLOTZ", "1"),
        ("BACKCAST_SLOTS", "1"),
        ("BACKCAST_WORKER__SLOTS", "many"),
        ("BACKCAST_LEASE", "0"),
        ("BACKCAST_STEWARD__KEEP_RUNS", "P36501D"),
        ("BACKCAST_WORKER__POOL", "Not A Pool"),
        ("BACKCAST_MODEL__BACKEND", "magic"),
        ("BACKCAST_MODEL", "{hunter2"),
        ("BACKCAST_CONFIG", "/nowhere/config.yaml"),
    ],
)
def test_a_wrong_setting_is_named_and_its_value_is_not(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=name) as caught:
        load()
    assert value in ("1", "0", "/nowhere/config.yaml") or value not in str(caught.value)


@pytest.mark.parametrize("name", ["BACKCAST_DATABASE__URL", "BACKCAST_SETUP__ADMIN_URL", "BACKCAST_SETUP__PREFECT_URL"])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter%2@h/db",
        "postgresql://u:hunter2%@h/db",
        "postgresql://u:hunter2/s@h/db",
        "postgresql://u:1/hunter2@h/db",
        "postgresql://u:hunter2?s=1@h/db",
        "postgresql://u:1?hunter2=1@h/db",
        "postgresql://u:1?hunter2=1",
        "postgresql://u:hunter2#s@h/db",
        "postgresql://u:hunter2@s@h/db",
        "postgresql://u:hunter2[@h/db",
        "postgresql://u:hunter2@h:port/db",
        "postgresql://u:hunter2@h/db\n",
        "postgresql://u:hunter2@h/db?pgbouncer=true",
        "mysql://u:hunter2@h/db",
        "hunter2",
    ],
)
def test_a_url_that_a_driver_cannot_read_is_refused_and_no_part_is_quoted(
    monkeypatch: pytest.MonkeyPatch, name: str, url: str
) -> None:
    monkeypatch.setenv(name, url)
    with pytest.raises(ConfigurationError, match=f"^{name}: ") as caught:
        load()
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2@h/db",
        "postgres+asyncpg://u:hunter2@h/db",
        "postgresql+asyncpg://u:hunter2@h/db?sslmode=require",
        "postgresql+asyncpg://u:hunter2@h/db?ssl=require&application_name=ours",
        "postgresql+asyncpg://u:hunter2@h:5432,i:5432/db",
    ],
)
def test_a_url_that_prefect_can_not_read_is_refused_and_no_part_is_quoted(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("BACKCAST_DATABASE__URL", url)
    monkeypatch.setenv("BACKCAST_SETUP__PREFECT_URL", url)
    with pytest.raises(ConfigurationError, match=r"^BACKCAST_SETUP__PREFECT_URL: .*prefect-database-url") as caught:
        load()
    assert "hunter" not in str(caught.value)
    monkeypatch.setenv("BACKCAST_SETUP__PREFECT_URL", "postgresql+asyncpg://u:1,2@h:5432/db?host=/run&ssl=require")
    load()


@pytest.mark.parametrize(
    "url",
    [
        "postgres://h",
        "postgresql+asyncpg://u:p:w%40@h.example.org:5432/db?ssl=require",
        "postgresql://u@[::1]:5432,h:6432/db?target_session_attrs=read-write",
        "postgresql://postgres@/db?host=/run/a%20b",
    ],
)
def test_a_url_that_every_driver_can_read_is_taken(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("BACKCAST_DATABASE__URL", url)
    assert load().database.url.get_secret_value() == url


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("BACKCAST_WORKER_SLOTS", "BACKCAST_WORKER__SLOTS"),
        ("BACKCAST_WROKER__SLOTS", "BACKCAST_WORKER__SLOTS"),
        ("backcast_worker__sltos", "BACKCAST_WORKER__SLOTS"),
        ("backcast_taks", "BACKCAST_TASKS"),
        ("BACKCAST__LEASE", "BACKCAST_LEASE"),
        ("BACKCAST_APIKEY", "BACKCAST_API_KEY"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, wrong: str, meant: str
) -> None:
    monkeypatch.setenv(wrong, "1")
    with pytest.raises(ConfigurationError, match=f"{wrong.upper()} is not a setting .* mean {meant}\\?"):
        load()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("worker: {slotz: 3}", "BACKCAST_WORKER__SLOTZ is not .* mean BACKCAST_WORKER__SLOTS"),
        ("wroker: {slots: 3}", "BACKCAST_WROKER is not .* mean BACKCAST_WORKER\\?"),
        ("model: {apiKey: x}", "BACKCAST_MODEL__APIKEY is not .* mean BACKCAST_MODEL__API_KEY"),
        ("worker__slots: 3", "BACKCAST_WORKER__SLOTS is written in a file as"),
        ("worker: [1]", "BACKCAST_WORKER: "),
        ("worker: {slots: 3", "not YAML"),
        ("- worker", "settings by name"),
        ("1: 2", "settings by name"),
    ],
)
def test_a_wrong_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setenv("BACKCAST_CONFIG", str(tmp_path / "config.yaml"))
    with pytest.raises(ConfigurationError, match=sentence):
        load()


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCAST_DATABASE__URL", "postgresql://u:hunter2@h/d")
    monkeypatch.setenv("BACKCAST_MODEL__API_KEY", "hunter2")
    monkeypatch.setenv("BACKCAST_STORE__SECRET_KEY", "hunter2")
    assert "hunter2" not in repr(load()) + load().model_dump_json()


def test_every_setting_has_a_description() -> None:
    for model in every_model():
        for name, field in model.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            assert is_section or field.description, f"{model.__name__}.{name}"


def test_the_embedded_model_is_chosen_only_without_a_provider() -> None:
    assert Settings().model.embedded
    assert not Settings.model_validate({"model": {"api_key": "k"}}).model.embedded
    assert not Settings.model_validate({"model": {"base_url": "http://h/v1"}}).model.embedded
    assert Settings.model_validate({"model": {"backend": "embedded", "api_key": "k"}}).model.embedded


@pytest.mark.parametrize(("text", "seconds"), [("20", 20), ("2.5", 2.5), ("PT1M", 60), ("00:00:30", 30)])
def test_durations_in_the_environment_are_seconds_or_iso_8601(
    monkeypatch: pytest.MonkeyPatch, text: str, seconds: float
) -> None:
    monkeypatch.setenv("BACKCAST_LEASE", text)
    assert load().lease == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["inf", "nan", "1e300", "soon"])
def test_a_wrong_duration_is_explained(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("BACKCAST_LEASE", text)
    with pytest.raises(ConfigurationError, match="BACKCAST_LEASE: "):
        load()


def test_a_variable_can_say_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKCAST_STEWARD__KEEP_RUNS", "BACKCAST_PREFECT__API_URL", "BACKCAST_STORE__REGION"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("BACKCAST_MODEL__BACKEND", "none")
    settings = load()
    assert (settings.steward.keep_runs, settings.prefect.api_url, settings.store.region) == (None, None, None)
    assert settings.model.backend == "none", "its own value, where none is not allowed"
    monkeypatch.setenv("BACKCAST_LEASE", "none")
    with pytest.raises(ConfigurationError, match="BACKCAST_LEASE: "):
        load()


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKCAST_MODEL__API_KEY", "BACKCAST_MODEL__BASE_URL", "BACKCAST_API__KEYS", "BACKCAST_LEASE"):
        monkeypatch.setenv(name, "")
    settings = load()
    assert settings.model.embedded
    assert (settings.model.api_key, settings.model.base_url, settings.api.keys) == (None, None, [])
    assert settings.lease == timedelta(seconds=15)


def test_the_cache_is_in_the_users_folder_if_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Model().cache == tmp_path / "backcast"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert Model().cache == Path.home() / ".cache/backcast"

    def nobody(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert Model().cache == Path(tempfile.gettempdir()) / "backcast"
