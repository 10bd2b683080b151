"""The states in which runs wait, and SQL for the one of a run that waits for nothing but a worker."""

STATES = ("paused", "held", "scheduled", "queued")
"""Those that callers see as queued."""
WAITING, NOT_READY = str(STATES), str(STATES[:-1])
"""SQL: these states, and those of them that no worker claims."""


def paused(row: str, *, pool: str | None = None, which: str = "true") -> str:
    """Whether a pause holds for the run `row` (in `pool`, if it is about to move there) for `which` this is true. While
    there is no pause at all, the first half is asked once a statement, and the second one never."""
    return f"""((select exists (select from pauses)) and exists (
        select from pauses where (until is null or until > now())
           and {which} and (kind, name) in (
             ('task', {row}.task), ('lane', {row}.lane), ('pool', {pool or f"{row}.pool"}))))"""  # noqa: S608  # constants


def ready(row: str, *, pool: str | None = None) -> str:
    """`paused`; `held` if its lane has limits; else `queued`."""
    return f"""case when {paused(row, pool=pool)} then 'paused'
        when {row}.lane is not null and exists (select from lanes l where l.name = {row}.lane and l.limited) then 'held'
        else 'queued' end"""  # constants
