"""`delay`, for those who come from Prefect's: queue a run of a task, and hold its future."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from pydantic_core import to_jsonable_python

from backcast.client import DEFAULT_URL, AsyncClient, Client, authorization, raise_for_state
from backcast.errors import InvalidInput
from backcast.models import JSON, Run
from backcast.variables import KEY_VARIABLE, URL_VARIABLE


@dataclass(frozen=True, slots=True)
class Future:
    """A run that was queued by `delay`. Each method may be called any number of times, in any process that has the id.

    Raises (`result`): RunError if the run failed, was cancelled or expired; WaitTimeout after `timeout` seconds.
    """

    task_run_id: UUID

    def wait(self, timeout: float | None = None) -> Run:
        """The run once it has ended, however it ended."""
        with Client(**_service()) as client:
            return client.wait(self.task_run_id, timeout=timeout)

    def result(self, timeout: float | None = None, *, raise_on_failure: bool = True) -> JSON:
        """Its result; without `raise_on_failure`, None for a run that has none."""
        with Client(**_service()) as client:
            run = client.wait(self.task_run_id, timeout=timeout)
            if raise_on_failure:
                raise_for_state(run)
            return client.result(self.task_run_id) if run.state == "completed" else None

    async def wait_async(self, timeout: float | None = None) -> Run:
        async with AsyncClient(**_service()) as client:
            return await client.wait(self.task_run_id, timeout=timeout)

    async def result_async(self, timeout: float | None = None, *, raise_on_failure: bool = True) -> JSON:
        async with AsyncClient(**_service()) as client:
            run = await client.wait(self.task_run_id, timeout=timeout)
            if raise_on_failure:
                raise_for_state(run)
            return await client.result(self.task_run_id) if run.state == "completed" else None


def delay(task: Callable[..., Any] | str, /, *args: Any, **params: Any) -> Future:
    """Queue a run of a task, by the service at BACKCAST_URL, and return at once.

    Args:
        task: the Prefect task, or its name; a name takes keyword arguments only.
        args, params: its parameters, as in a call of it: JSON values, models, dates and the like.

    Raises:
        TypeError: the parameters do not fit the task's signature.
        UnknownTask, InvalidInput, Unavailable: as for `Client.submit`.
    """
    name, given = _bound(task, args, params)
    with Client(**_service()) as client:
        return Future(client.submit(name, given).id)


async def delay_async(task: Callable[..., Any] | str, /, *args: Any, **params: Any) -> Future:
    """`delay` for code on an event loop, which it does not block."""
    name, given = _bound(task, args, params)
    async with AsyncClient(**_service()) as client:
        return Future((await client.submit(name, given)).id)


def _bound(task: Callable[..., Any] | str, args: tuple[Any, ...], params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(task, str):
        if args:
            raise TypeError(f"delay({task!r}, …) takes the task's parameters by name.")
        return task, to_jsonable_python(params)
    name = getattr(task, "name", None) or getattr(task, "__name__", None)
    if not isinstance(name, str):
        raise InvalidInput(f"{task!r} is no task: give a Prefect task, or its name.")
    bound = inspect.signature(getattr(task, "fn", task)).bind(*args, **params)
    given = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return name, to_jsonable_python(given)


def _service() -> dict[str, Any]:
    return {
        "url": os.environ.get(URL_VARIABLE, DEFAULT_URL),
        "headers": authorization(os.environ.get(KEY_VARIABLE)),
    }
