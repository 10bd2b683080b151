"""The keys of the objects that a store has of runs, and nothing else is taken for one: who shares a bucket with us may
have keys that look alike.
"""

import re
from uuid import UUID

_RUN = "([0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12})"  # version 7, as `uuid7` makes them
_OF_A_RUN = re.compile(rf"inputs/{_RUN}\.json|results/{_RUN}/\d+\.json|logs/{_RUN}/\d+\.jsonl", re.ASCII)
_CACHED = re.compile("cache/[0-9a-f]{64}")


def input_key(run_id: UUID) -> str:
    """Of a large input."""
    return f"inputs/{run_id}.json"


def result_key(run_id: UUID, fence: int) -> str:
    """Of an attempt's value: attempts never share one."""
    return f"results/{run_id}/{fence}.json"


def log_key(run_id: UUID, fence: int) -> str:
    """Of the log of an attempt, as JSON lines."""
    return f"logs/{run_id}/{fence}.jsonl"


def run_of(key: str) -> UUID | None:
    """The run that an object belongs to; None: it is none of these."""
    found = _OF_A_RUN.fullmatch(key)
    return UUID(next(filter(None, found.groups()))) if found else None


def is_cached_value(key: str) -> bool:
    """Whether it is a value of a cached task: its key ends with the hash of the cache key."""
    return _CACHED.fullmatch(key) is not None
