"""The built-in task under stock Prefect: its own server and engine, nothing of ours but the task."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.testing.utilities import prefect_test_harness
from prefect.utilities.callables import parameter_schema

from backcast import llm
from backcast.errors import FatalError, UsageError
from backcast.llm.tasks import create_structured_output
from backcast.settings import Model
from backcast.testing import Reply, ScriptedModel
from tests.support.waiting import PATIENCE

now = create_structured_output.with_options(retry_delay_seconds=0, retry_jitter_factor=0)


@pytest.fixture(scope="module")
def _prefect() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=int(PATIENCE)):
        yield


@pytest.fixture
async def _storage(_prefect: None, tmp_path: Path) -> AsyncIterator[None]:
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path, PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield
    await llm.aclose()


def connect(model: ScriptedModel, name: str = "m") -> None:
    llm.connect(Model.model_validate({"base_url": model.url, "api_key": "k", "name": name}))


@pytest.mark.usefixtures("_storage")
async def test_the_task_casts_and_remembers() -> None:
    with ScriptedModel() as model:
        connect(model)
        assert await now("31 chairs", "int") == 31
        assert await now("31 chairs", "int") == 31
        assert await now("31 chairs", "int", stream=True) == 31, "the same value"
        assert len(model.requests) == 1
        connect(model, "another")
        await now("31 chairs", "int")
        assert len(model.requests) == 2


@pytest.mark.usefixtures("_storage")
async def test_what_may_pass_is_retried() -> None:
    with ScriptedModel([Reply(status=503), Reply(status=429), Reply(31)]) as model:
        connect(model)
        assert await now("31 chairs, after two failures", "int") == 31


@pytest.mark.usefixtures("_storage")
async def test_what_will_not_pass_is_not_retried() -> None:
    with ScriptedModel([Reply(status=401)]) as model:
        connect(model)
        with pytest.raises(FatalError):
            await now("31 chairs, with a wrong key", "int")
    assert len(model.requests) == 1


@pytest.mark.usefixtures("_storage")
async def test_a_process_that_is_not_connected_reads_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedModel() as model:
        monkeypatch.setattr(llm, "_model", None)
        monkeypatch.setenv("BACKCAST_MODEL__BASE_URL", model.url)
        monkeypatch.setenv("BACKCAST_MODEL__API_KEY", "k")
        assert await now("31 chairs, not connected", "int") == 31


@pytest.mark.parametrize("target", ["os.system", {"type": "nonsense"}])
async def test_a_target_that_is_none(target: Any) -> None:
    with ScriptedModel() as model:
        connect(model)
        with pytest.raises(UsageError) as caught:
            await create_structured_output.fn("31", target)
    assert caught.value.code == "invalid_target"


def test_the_task_explains_itself() -> None:
    schema = parameter_schema(create_structured_output.fn).model_dump()
    assert set(schema["properties"]) == {"data", "target", "instructions", "stream"}
    assert all(field.get("description") for field in schema["properties"].values())
    assert schema["required"] == ["data", "target"]
    assert create_structured_output.description.startswith("Cast messy data")  # type: ignore[union-attr]
