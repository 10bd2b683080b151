"""The built-in tasks: plain Prefect tasks, run by a backcast worker as well as by stock `.delay()` and `serve()`.

Their parameters are plain JSON, because Prefect hashes and shows them; other modules interpret them.
"""

from functools import partial
from typing import Annotated, Any

from prefect import State, Task, task
from prefect.cache_policies import INPUTS, TASK_SOURCE, CachePolicy
from prefect.client.schemas.objects import TaskRun
from prefect.context import TaskRunContext
from pydantic import Field

from backcast import llm, settings, targets
from backcast.errors import InvalidTarget, RunError, UsageError
from backcast.models import CAST
from backcast.reporting import emit

Target = Annotated[str | dict[str, Any], Field(json_schema_extra={"format": "target"})]
"""The API checks parameters of this format before it accepts a run."""


def _model(_context: TaskRunContext, _inputs: dict[str, Any]) -> str:
    """Part of the cache key: another model gives another answer."""
    model = _connected()
    return f"embedded {model.size}" if model.embedded else f"{model.name} at {model.base_url}"


async def _may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    error = await state.aresult(raise_on_failure=False)
    return not isinstance(error, RunError) or error.retryable


@task(
    name=CAST,
    retries=5,
    retry_delay_seconds=[1, 4, 15, 60, 120],
    retry_jitter_factor=0.5,
    retry_condition_fn=_may_pass,
    cache_policy=INPUTS - "stream" + TASK_SOURCE + CachePolicy.from_cache_key_fn(_model),
)
async def create_structured_output(
    data: Any, target: Target, instructions: str | None = None, stream: bool = False
) -> Any:
    """Cast messy data into a wanted shape with a language model.

    Args:
        data: The data to cast: usually text, but any JSON value will do.
        target: The wanted shape: a name (int, float, bool, str, date, datetime, list[str], …) or a JSON Schema.
        instructions: The thing to look for, in plain words; needed when the target is str.
        stream: Whether the run's stream of events shows the answer as it grows: outputs of the kind `partial`, each
            with all that is there of it. They are not checked; the result is.
    """
    _connected()
    try:
        wanted = targets.parse(target)
    except InvalidTarget as error:
        raise UsageError(error.detail, code=error.code) from None
    return await llm.cast(data, wanted, instructions, partial(emit, kind="partial") if stream else None)


def _connected() -> settings.Model:
    """The process's model; Prefect's own worker has not chosen one yet, so the first run does."""
    return llm.connected() or llm.connect(settings.load().model)
