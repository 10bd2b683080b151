"""Registers a user's Prefect `Task`: decides on the task type that callers see, and on the copy that is executed. Knows
nothing of runs.
"""

import contextlib
import copy
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from prefect import Task
from prefect.cache_policies import NO_CACHE, CachePolicy, RunId
from prefect.filesystems import WritableFileSystem
from prefect.settings import PREFECT_LOGGING_LOG_PRINTS
from prefect.tasks import MaterializingTask
from pydantic import TypeAdapter, ValidationError

from backcast import names
from backcast.errors import ConfigurationError, InvalidTarget, UsageError
from backcast.executor import numbers
from backcast.executor.cache import PlainJSON
from backcast.executor.parameters import Filler, Parameters, hints_of, parameters_of
from backcast.models import JSON, WARNINGS, TaskType
from backcast.options import Options, options_of

T = TypeVar("T")


def discover(modules: Iterable[str]) -> dict[str, "Task[..., Any]"]:
    """The tasks of these modules, by name. Runs are routed by the name alone: files may move, and lines may change.

    Raises:
        ConfigurationError: a module can't be imported, or two tasks have the same name.
    """
    found: dict[str, Task[..., Any]] = {}
    for module in modules:
        try:
            members = vars(importlib.import_module(module))
        except (Exception, SystemExit) as error:
            raise ConfigurationError(
                f"BACKCAST_TASKS names {module}, which can't be imported ({type(error).__name__}: {error}): correct the"
                " name, or put its folder on PYTHONPATH."
            ) from error
        for task in members.values():
            if not isinstance(task, Task):
                continue
            other = found.setdefault(task.name, task)
            if other is not task:
                raise ConfigurationError(
                    f"Two tasks are named {task.name!r}: give one of them another `name=`, or leave out the"
                    " built-in ones by BACKCAST_BUILTIN_TASKS=false."
                )
    return found


@dataclass(frozen=True, slots=True)
class RegisteredTask:
    """A task that this process serves: its type, as callers see it, and the copy that is executed."""

    type: TaskType
    given: "Task[..., Any]"
    """The user's own object."""
    task: "Task[..., Any]"
    parameters: Mapping[str, Filler]
    """Make parameters of types beyond plain JSON (dates, models) from JSON."""
    options: Options
    is_cached: bool
    """Whether a run may take the value of another run."""
    needs_engine: bool
    """Whether the task uses a feature of Prefect's engine: its cache, hooks, assets, names for runs."""
    is_by_name: bool
    """Whether the function takes every parameter by name."""
    log_prints: bool
    policy: Mapping[str, JSON]
    """The retry policy in Prefect's terms, for its pages."""

    def bind(self, given: dict[str, JSON]) -> dict[str, Any]:
        """The parameters in the function's order, in whichever order they come: a cache key depends on it.

        Raises:
            UsageError: a parameter is missing, unknown or invalid; the message names it.
        """
        bound = dict(given)
        for name, adapter in self.parameters.items():
            if name in bound:
                try:
                    bound[name] = adapter.validate_python(bound[name])
                except ValidationError as error:
                    first = error.errors(include_url=False)[0]
                    where = "/".join(str(part) for part in (name, *first["loc"]))
                    raise UsageError(f"{where}: {first['msg']}", code="invalid_input") from None
                except InvalidTarget as error:
                    raise UsageError(f"{name}{error.detail}", code=error.code) from None
        missing = [name for name in self.type.input_schema.get("required", []) if name not in bound]
        unknown = [name for name in bound if name not in self.type.input_schema.get("properties", {})]
        if missing or unknown:
            raise UsageError(f"Missing parameters: {missing}; unknown: {unknown}.", code="invalid_input")
        return {name: bound[name] for name in self.type.input_schema["properties"] if name in bound}


def prepare(task: "Task[..., Any]", *, pool: str, max_attempts: int, storage: WritableFileSystem) -> RegisteredTask:
    """Describe this task for callers, and copy it for execution. The user's object stays as it is. The copy has our
    storage (otherwise each run asks the server for one), no tags (each costs a call, and fails without the server) and,
    unless a cache policy needs it, no persistence: we write results ourselves.

    Raises:
        ConfigurationError: its name is none that a run can be submitted by.
    """
    try:
        names.check(task.name)
    except ValueError as error:
        raise ConfigurationError(f"The task {task.name!r} can't be served: {error}.") from None
    parameters, hints = parameters_of(task), hints_of(task)
    output: dict[str, JSON] = {}
    if "return" in hints:
        with contextlib.suppress(Exception):  # a return type that pydantic can't describe is no error
            output = TypeAdapter(hints["return"]).json_schema(mode="serialization")
    cached, options = _is_cached(task.cache_policy), options_of(task)
    ours = _copy(task, cached, storage)
    return RegisteredTask(
        type=TaskType(
            name=task.name,
            pool=pool,
            version=task.version or "",
            description=inspect.cleandoc(task.description or ""),
            input_schema=_input_schema(task, parameters),
            output_schema=output,
            retries=ours.retries or 0,
            timeout=timedelta(seconds=ours.timeout_seconds) if ours.timeout_seconds else None,
            max_attempts=max_attempts,
            lane=options.lane,
            history=options.history == "full",
        ),
        given=task,
        task=ours,
        parameters=parameters.fillers,
        options=options,
        is_cached=cached,
        needs_engine=cached or bool(task.task_run_name) or _has_assets(task) or any(getattr(task, on) for on in _HOOKS),
        is_by_name=all(p.kind in _BY_NAME for p in inspect.signature(task.fn).parameters.values()),
        log_prints=PREFECT_LOGGING_LOG_PRINTS.value() if task.log_prints is None else task.log_prints,
        policy={"retries": ours.retries, "retry_delay": ours.retry_delay_seconds} if ours.retries else {},
    )


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_HOOKS = ("on_completion_hooks", "on_failure_hooks", "on_running_hooks", "on_rollback_hooks", "on_commit_hooks")


def _input_schema(task: "Task[..., Any]", parameters: Parameters) -> dict[str, JSON]:
    """The input, with notes on what of the task is not as in Prefect. A task that can't be run takes no input."""
    lost = " and ".join(map(repr, parameters.unfillable))
    reason = "it is a generator, and a stream of values is no result" if task.isgenerator else ""
    if lost:
        reason = f"no JSON can fill {lost}: give a default, or a type that pydantic knows"
    notes = [f"It can't be run here: {reason}."] if reason else []
    notes += [f"{name!r} always has its default: no JSON can fill it." for name in parameters.only_default]
    if task.tags:
        tags = ", ".join(sorted(task.tags))
        notes.append(f"Prefect's tags ({tags}), and limits by them, have no effect here: use options(lane=…).")
    schema = parameters.schema if not reason else {"type": "object", "properties": {}, "not": {}}
    return {**schema, WARNINGS: notes} if notes else schema


def _copy(task: "Task[..., Any]", cached: bool, storage: WritableFileSystem) -> "Task[..., Any]":
    ours = copy.copy(task)
    numbers.bound(ours)
    ours.tags = set()
    ours.cache_policy = task.cache_policy if cached else NO_CACHE
    ours.persist_result = cached
    ours.result_storage = storage
    ours.result_serializer = PlainJSON()
    ours.result_storage_key = None  # a user's key would silently disable the cache
    ours.cache_result_in_memory = False  # one result store serves all runs, and would keep a thousand values
    return ours


def _is_cached(policy: object) -> bool:
    """Whether a policy can hit for another run; Prefect's default one includes the run's id and never does."""
    if not isinstance(policy, CachePolicy) or policy == NO_CACHE:
        return False
    return not any(isinstance(part, RunId) for part in [policy, *getattr(policy, "policies", [])])


def _has_assets(task: "Task[..., Any]") -> bool:
    return isinstance(task, MaterializingTask) or bool(task.asset_deps)
