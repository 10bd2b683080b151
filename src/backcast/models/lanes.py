"""What holds work back: the limits of lanes, and pauses of tasks, lanes and pools."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from backcast.models.values import Figure, Moment, Noun, Number, Text

MOST = 1_000_000
"""The highest limit of a lane."""


SLOWEST = 0.000001
"""The lowest rate of a lane, about one run in two years: computing with a lower one would underflow."""


class Limits(Noun):
    """The limits of a lane; at least one of the two is set."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": [name], "not": {"properties": {name: {"type": "null"}}}}
                for name in ("max_running", "max_per_minute")
            ]
        }
    )

    max_running: Annotated[int, Field(ge=0, le=MOST), Number] | None = None
    """Runs of the lane that may run at the same time; 0 holds them all."""
    max_per_minute: Annotated[float, Field(ge=SLOWEST, le=MOST), Number] | None = None
    """Attempts that may start in a minute, retries included."""


class PauseKind(StrEnum):
    """What can be paused."""

    TASK = "task"
    LANE = "lane"
    POOL = "pool"


class Release(StrEnum):
    """What becomes of runs that have begun when their task, lane or pool is paused."""

    CONTINUE = "continue"
    RELEASE = "release"


class PauseRequest(Noun):
    """A request to start nothing new of a task, a lane or a pool."""

    reason: Annotated[Text, Field(max_length=300)] = ""
    """Shown to everybody who asks why a run waits."""
    by: Annotated[Text, Field(max_length=100)] = ""
    """Who asks for it."""
    until: Moment | None = None
    """When it ends by itself; it must lie in the future. None: when it is resumed."""
    running: Release = Release.CONTINUE
    """`release` also stops the runs that have begun, as when a worker drains: they begin again once it has ended, and
    no attempt is counted."""


class Pause(Noun):
    """A pause of a task, a lane or a pool."""

    kind: PauseKind
    name: str
    reason: str
    by: str
    since: datetime
    until: datetime | None = None
    running: Release


class Lane(Noun):
    """A lane that has limits or is paused, and its runs; each number is counted up to 10,000."""

    name: str
    max_running: int | None = None
    max_per_minute: float | None = None
    running: int
    queued: int
    """Its runs that may start as soon as a slot is free."""
    held: int
    """Its runs that wait for the lane: for a place, or for the end of a pause."""
    oldest_age_seconds: Figure | None = None
    """How long the oldest of the queued and held ones that are counted has waited since it could have started."""
    per_minute: Figure | None = None
    """Runs that it let start in the last minute, about; None if it has no limits."""
    paused: Pause | None = None
    problem: str | None = None
    """What is wrong with its limits, if they were not set by this interface."""
