"""How many things happened in the last minute: a count that fades, in a row that is written at each of them anyway.

It is approximate: each one counts by how long ago it was, `exp(-age / 60 s)`, which adds up to those of the last minute
if their pace is steady, and follows a change of pace within about two minutes.
"""

_FADED = """case when {since} between now() - interval '10 minutes' and now() and {count} between 0.01 and 1e9
    then {count} * exp(-extract(epoch from now() - {since})::float8 / 60) else 0 end"""
"""Only for values with which neither the difference nor the power leaves the range of its type."""


def faded(count: str, since: str) -> str:
    """SQL: what the count of `since` amounts to now."""
    return _FADED.format(count=count, since=since)


def counted(count: str, since: str, more: str) -> str:
    """SQL: the new value of the count, as the row's last one was written at `since`."""
    return f"({faded(count, since)} + least(greatest({more}, 0), 1000000))"
