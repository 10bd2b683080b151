"""Bounds the numbers of a task: decides which delay, time-out and count of retries stand for one that no clock,
database or engine can work with. Each change is a sentence in the worker's log.
"""

import logging
from typing import Any

from prefect import Task

log = logging.getLogger("backcast.worker")

LONGEST = 365 * 24 * 3600.0
"""Seconds, a year: longer delays count as this one, and a longer time-out as none."""
MOST_RETRIES = 1_000_000


def bound(task: "Task[..., Any]") -> None:
    """Change this copy of a task, so that its numbers can be used."""
    given = task.retry_delay_seconds
    task.retry_delay_seconds = (
        [_delay(task, each) for each in given]
        if isinstance(given, list)
        else None
        if given is None
        else _delay(task, given)
    )
    jitter, limit = task.retry_jitter_factor, task.timeout_seconds
    if jitter is not None and jitter != jitter:
        task.retry_jitter_factor = _changed(task, "retry_jitter_factor", jitter, None)
    if limit is not None and not limit <= LONGEST:
        task.timeout_seconds = _changed(task, "timeout_seconds", limit, None)
    if task.retries > MOST_RETRIES:
        task.retries = _changed(task, "retries", task.retries, MOST_RETRIES)


def _delay(task: "Task[..., Any]", given: float) -> float:
    if not given >= 0:
        return _changed(task, "retry_delay_seconds", given, 0.0)
    return given if given <= LONGEST else _changed(task, "retry_delay_seconds", given, LONGEST)


def _changed(task: "Task[..., Any]", name: str, given: float, used: Any) -> Any:
    log.warning("task %r: %s=%r can't be kept, so it counts as %r", task.name, name, given, used)
    return used
