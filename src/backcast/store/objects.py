"""The objects of a store, and the error for one that is missing."""

from dataclasses import dataclass
from datetime import datetime

CHUNK = 4 * 1024 * 1024
"""Bytes read at a time: no connection or file stays open while a slow reader takes them."""
PAGE = 1000
"""Objects listed at a time, the most that S3 gives."""


class Missing(Exception):
    """There is no such object, in a store that is there."""


@dataclass(frozen=True, slots=True)
class Object:
    key: str
    changed: datetime
    """When it was put, by the store's clock."""
