"""How many runs came and went lately."""

from datetime import datetime
from enum import StrEnum

from backcast.models.runs import State
from backcast.models.values import Noun


class Within(StrEnum):
    """A time up to now."""

    HOUR = "hour"
    DAY = "day"


class TaskCounts(Noun):
    """The runs of one task; as in `Counts`."""

    task: str
    submitted: int
    states: dict[State, int]


class ErrorCount(Noun):
    """How many runs of a task failed with a code."""

    task: str
    code: str
    runs: int


class Flow(Noun):
    """What came in and went out in a minute, or in half an hour."""

    at: datetime
    """Its beginning."""
    submitted: int
    ended: dict[State, int]


class Counts(Noun):
    """How many runs were submitted and have ended lately."""

    since: datetime
    """The beginning of a minute, or of half an hour."""
    until: datetime
    approximate: bool
    """Whether the numbers are estimated from a sample, as there are too many runs to be counted. A rare task or error
    may be missing then."""
    submitted: int
    states: dict[State, int]
    """The runs that ended since then, by state; and those that were submitted since then and have not ended."""
    tasks: list[TaskCounts]
    """Those with the most runs first, at most 100."""
    errors: list[ErrorCount]
    """Of the failed runs: the most frequent first, at most 100."""
    flow: list[Flow]
    """By minute of the last hour, or by half an hour of the last day, the oldest first. The last one is not over."""
